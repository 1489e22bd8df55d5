import gzip
import hashlib
import importlib
import io
import math
import struct
import tarfile
from typing import Any

import numpy as np
import pytest
import torch

from gossamer import datasets
from gossamer.core.errors import ArgumentError, DatasetError
from gossamer.datasets import Dataset, Split, batches, cifar10, load, text
from gossamer.datasets import fetch as fetch_module

# The submodule: the package exports a function of the same name.
cifar = __import__("gossamer.datasets.cifar10", fromlist=["cifar10"])


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    # No data of this machine, and a current directory without a shared folder beside it.
    (tmp_path / "a" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GOSSAMER_DATA", raising=False)


def idx(array, *, kind=8, claim=None):
    shape = claim or array.shape
    return (
        bytes([0, 0, kind, len(shape)])
        + b"".join(struct.pack(">I", n) for n in shape)
        + array.astype(np.uint8).tobytes()
    )


def write_mnist(folder, train=200, test=50):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, n in (("train", train), ("t10k", test)):
        images, labels = rng.integers(0, 256, (n, 28, 28)), np.arange(n) % 10
        with gzip.open(folder / f"{name}-images-idx3-ubyte.gz", "wb") as f:
            f.write(idx(images))
        with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz", "wb") as f:
            f.write(idx(labels))
        if name == "train":
            first = images[0]
    return first


def test_digits_are_split_by_class_and_keep_their_test():
    a, b = load("digits", seed=0), load("digits", seed=1)
    assert a.in_shape == (1, 8, 8)
    assert a.classes == 10
    assert len(a.train) + len(a.validation) + len(a.test) == 1797
    assert a.train.inputs.min() == 0
    assert a.train.inputs.max() == 1
    assert torch.equal(a.test.inputs, b.test.inputs)
    assert not torch.equal(a.train.inputs, b.train.inputs)
    counts = a.test.targets.bincount()
    assert counts.max() - counts.min() <= 2
    rows = {x.numpy().tobytes() for x in a.test.inputs}
    assert not rows & {x.numpy().tobytes() for x in a.validation.inputs}


def test_mnist_is_standardised_from_idx(tmp_path):
    first = write_mnist(tmp_path / "data" / "mnist")
    data = load("mnist", root=tmp_path / "data", validation=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (200, 0, 50)
    expected = (torch.tensor(first).float() / 255 - 0.1307) / 0.3081
    assert torch.allclose(data.train.inputs[0, 0], expected, atol=1e-6)
    held = load("mnist", root=tmp_path / "data", validation=0.25, seed=3)
    assert (len(held.train), len(held.validation)) == (150, 50)
    again = load("mnist", root=tmp_path / "data", validation=50, seed=3)
    assert torch.equal(held.validation.inputs, again.validation.inputs)


def test_the_data_folder_is_found(tmp_path, monkeypatch):
    write_mnist(tmp_path / "a" / "shared" / "data" / "mnist")
    assert len(load("mnist", download=False, validation=0.1).test) == 50
    write_mnist(tmp_path / "env" / "mnist", test=20)
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path / "env"))
    assert len(load("mnist", download=False, validation=0.1).test) == 20


def test_missing_data_name_every_place_and_the_fix(tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path / "env"))
    with pytest.raises(DatasetError) as e:
        load("mnist", download=False)
    assert str(tmp_path / "env" / "mnist" / "train-images-idx3-ubyte.gz") in str(e.value)
    assert str(tmp_path / "cache" / "gossamer" / "mnist") in str(e.value)
    assert "GOSSAMER_DATA" in str(e.value)
    assert "f68b3c2dcbeaaa9fbdd348bbdeb94873" in str(e.value)


def test_failed_and_forged_downloads(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_module, "_TIMEOUT", (0.2, 0.2))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DatasetError, match=r"http://127\.0\.0\.1:9.*Connection") as e:
        fetch_module.fetch(
            "x", "y.bin", md5="0" * 32, mirrors=["http://127.0.0.1:9"], root=tmp_path
        )
    assert str(tmp_path / "x" / "y.bin") in str(e.value)


def test_downloads_are_checked(tmp_path):
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            mirror = f"http://127.0.0.1:{server.server_port}"
            with pytest.raises(DatasetError, match="hash"):
                fetch_module.fetch("x", "y", md5="0" * 32, mirrors=[mirror], root=tmp_path)
            assert not (tmp_path / "x" / "y").exists()
            md5 = hashlib.md5(b"hello").hexdigest()
            got = fetch_module.fetch("x", "y", md5=md5, mirrors=[mirror], root=tmp_path)
        finally:
            server.shutdown()
            thread.join()
    assert got.read_bytes() == b"hello"
    assert got == tmp_path / "x" / "y"


GOOD = idx(np.arange(12).reshape(3, 2, 2))


def test_idx_reads_plain_and_packed(tmp_path):
    for content in (GOOD, gzip.compress(GOOD, mtime=0)):
        (tmp_path / "f").write_bytes(content)
        assert np.array_equal(datasets.read_idx(tmp_path / "f"), np.arange(12).reshape(3, 2, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (b"\x01" + GOOD[1:], "no IDX file"),
        (GOOD[:9], "inside its header"),
        (GOOD[:-1], "only 11"),
        (GOOD + b"x", "more follow"),
        (gzip.compress(GOOD, mtime=0)[:-9], "truncated or corrupt"),
        (b"\x1f\x8b" + bytes(40), "truncated or corrupt|cannot be read"),
        (idx(np.zeros(4), kind=13), "0x0d"),
        (bytes([0, 0, 8, 0]), "0 dimensions"),
        (bytes([0, 0, 8, 9]) + b"\xff" * 36, "9 dimensions"),
        (idx(np.zeros(4), claim=(0xFFFFFFFF, 0xFFFFFFFF, 9)), "claims"),
        (idx(np.zeros(4), claim=(1 << 30,)), "only 4"),
    ],
)
def test_hostile_idx_is_refused(tmp_path, content, message):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        datasets.read_idx(tmp_path / "f")


def test_idx_of_other_shapes_is_no_mnist(tmp_path):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(idx(np.zeros(3)), mtime=0)
    )
    with pytest.raises(DatasetError, match="do not fit 50 images"):
        load("mnist", root=tmp_path, validation=0)


def fake_cifar():
    # Pixels that tell their image, so that any mix-up of order or axes shows.
    rng = np.random.default_rng(0)
    rows = np.empty((10_000, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(10_000) % 10
    rows[:, 1:] = rng.integers(0, 256, 3072)
    rows[:, 1:3] = np.arange(10_000).astype("<u2").view(np.uint8).reshape(-1, 2)
    return rows


def test_cifar_binary_is_decoded_once_and_mapped(tmp_path, monkeypatch):
    rows = fake_cifar()
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in cifar._BATCHES:
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    data = load("cifar10", root=tmp_path / "data", seed=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (45_000, 5_000, 10_000)
    assert data.train.stored.dtype == torch.uint8
    inputs, targets = data.test.batch(torch.tensor([7, 4321]))
    assert targets.tolist() == [7, 1]
    pixels = torch.tensor(rows[[7, 4321], 1:]).view(2, 3, 32, 32).double() / 255
    for c in range(3):
        expected = (pixels[:, c] - cifar.IMAGENET_MEAN[c]) / cifar.IMAGENET_STD[c]
        assert torch.allclose(inputs[:, c].double(), expected, atol=1e-5)

    def never(*_):
        raise AssertionError("decoded twice")

    monkeypatch.setattr(cifar, "_records", never)
    assert torch.equal(load("cifar10", root=tmp_path / "data").test.stored, data.test.stored)
    # A corrupt cache is made anew, and a changed source is another cache.
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (cached,) = (tmp_path / "cache" / "gossamer").glob("*.npy")
    whole = cached.read_bytes()
    flipped = bytearray(whole)
    flipped[-3000] ^= 16  # one pixel: the shape and the labels are right
    without = whole[:-64]  # as caches were before they had a checksum
    for damaged in (whole[:5000], bytes(flipped), without, b""):
        cached.unlink()  # the mapped one lives on
        cached.write_bytes(damaged)
        assert torch.equal(load("cifar10", root=tmp_path / "data").test.stored, data.test.stored)
        assert cached.read_bytes() == whole
    (folder / "test_batch.bin").write_bytes(rows.tobytes()[:-1])
    with pytest.raises(DatasetError, match="30729999 bytes, expected 30730000"):
        load("cifar10", root=tmp_path / "data")
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(DatasetError, match=r"missing.*data_batch_3"):
        load("cifar10", root=tmp_path / "data")


def test_an_unwritable_cache_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "source").write_text("x")
    images = np.zeros((5, 3, 32, 32), dtype=np.uint8)
    images[3] = 9
    with pytest.warns(UserWarning, match="cannot be written"):
        got, labels = cifar._cached(
            [tmp_path / "source"], lambda: (images, np.arange(5, dtype=np.uint8))
        )
    assert np.array_equal(got, images)
    assert labels.tolist() == [0, 1, 2, 3, 4]


def python_batch(data):
    # Python 2's pickle, protocol 2, as in the published archive: bytes are BINSTRINGs.
    def string(b):
        return b"T" + struct.pack("<i", len(b)) + b

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + string(b"b")
        + b"\x87R(K\x01"
        + b"J"
        + struct.pack("<i", data.shape[0])
        + b"M\x00\x0c\x86"  # 3072
        + b"cnumpy\ndtype\n"
        + string(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + string(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + string(data.tobytes())
        + b"tb"
    )
    labels = b"](" + b"".join(b"K" + bytes([i % 10]) for i in range(len(data))) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + labels + b"u."


def archive(path, member, content):
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name in cifar._BATCHES:
            info = tarfile.TarInfo(member.format(name))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar_archives(tmp_path, monkeypatch):
    rows = fake_cifar()
    rows[:, 3:] = 5  # packs fast
    for name, member, content in (
        ("_PYTHON", "cifar-10-batches-py/{}", python_batch(rows[:, 1:].copy())),
        ("_BINARY", "cifar-10-batches-bin/{}.bin", rows.tobytes()),
    ):
        file = getattr(cifar, name)[0]
        (tmp_path / name).mkdir()
        md5 = archive(tmp_path / name / file, member, content)
        with pytest.raises(DatasetError, match=f"md5 {md5}, published is"):
            load("cifar10", root=tmp_path / name)
        monkeypatch.setattr(cifar, name, (file, md5))
        data = cifar10(root=tmp_path / name)
        assert data.test.targets[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
        assert np.array_equal(data.test.stored[777].reshape(-1), rows[777, 1:])


def test_a_pickle_may_not_call_anything(tmp_path, monkeypatch):
    file = cifar._PYTHON[0]
    md5 = archive(tmp_path / file, "cifar-10-batches-py/{}", b"cos\nsystem\n(S'true'\ntR.")
    monkeypatch.setattr(cifar, "_PYTHON", (file, md5))
    with pytest.raises(DatasetError, match=r"os\.system is not allowed"):
        load("cifar10", root=tmp_path)


def test_atlases_keep_the_order_of_the_images(tmp_path):
    from PIL import Image

    tiles = np.zeros((1000, 32, 32, 3), dtype=np.uint8)
    tiles[..., 0] = (np.arange(1000) % 251)[:, None, None]
    tiles[..., 1] = np.arange(32)[None, :, None]
    tiles[..., 2] = np.arange(32)[None, None, :]
    page = tiles.reshape(40, 25, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(1280, 800, 3)
    for name in [f"train_{i:02}" for i in range(50)] + [f"test_{i:02}" for i in range(10)]:
        if name == "train_00":
            Image.fromarray(page).save(tmp_path / "train_00.webp", lossless=True, quality=0)
        else:
            (tmp_path / f"{name}.webp").write_bytes((tmp_path / "train_00.webp").read_bytes())
    for half, n in (("train", 50_000), ("test", 10_000)):
        np.save(tmp_path / f"{half}_labels.npy", np.arange(n) % 10)
    files = cifar._source(tmp_path, False)[0]
    images, labels = cifar._atlases(files)
    assert np.array_equal(images[27_333], tiles[333].transpose(2, 0, 1))
    assert labels[27_333] == 3
    (tmp_path / "train_07.webp").write_bytes(b"RIFF")
    with pytest.raises(DatasetError, match=r"train_07\.webp is no sound image"):
        cifar._atlases(files)


def test_crop_and_flip_is_pad_crop_and_mirror():
    images = torch.arange(1, 1 + 16 * 3 * 8 * 8, dtype=torch.int32).view(16, 3, 8, 8)
    out = datasets.crop_and_flip(images, torch.Generator().manual_seed(0), pad=2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for i in range(16):
        matches = [
            (dy, dx, flip)
            for dy in range(5)
            for dx in range(5)
            for flip in (False, True)
            if torch.equal(
                out[i],
                padded[i, :, dy : dy + 8, dx : dx + 8].flip(2)
                if flip
                else padded[i, :, dy : dy + 8, dx : dx + 8],
            )
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 8
    assert {flip for *_, flip in seen} == {False, True}
    again = datasets.crop_and_flip(images, torch.Generator().manual_seed(0), pad=2)
    assert torch.equal(out, again)


def test_batches_visit_everything_once():
    split = Split(torch.arange(10.0), torch.arange(10))
    plain = [x.tolist() for x, _ in batches(split, 4, generator=None)]
    assert plain == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    shuffled = [x for x, _ in batches(split, 4, generator=torch.Generator().manual_seed(0))]
    assert torch.cat(shuffled).tolist() != list(range(10))
    assert sorted(torch.cat(shuffled).tolist()) == list(range(10))
    doubled = batches(
        split, 10, generator=torch.Generator().manual_seed(0), augment=lambda x, g: 2 * x
    )
    ((x, y),) = doubled
    assert torch.equal(x, 2.0 * y)
    with pytest.raises(ArgumentError, match="batch_size=0"):
        next(batches(split, 0, generator=None))


def test_subsets_are_balanced():
    targets = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    split = Split(torch.arange(100.0), targets)
    chosen = datasets.balanced(split, 30, 3, seed=0)
    assert chosen.targets.bincount().tolist() == [13, 12, 5]
    assert len(set(chosen.inputs.tolist())) == 30
    assert load("digits", subset=100).train.targets.bincount().tolist() == [10] * 10
    with pytest.raises(ArgumentError, match="subset=101"):
        datasets.balanced(split, 101, 3, seed=0)


@pytest.mark.parametrize("validation", [-1, 1.0, 100, math.nan, True])
def test_validation_must_leave_something(validation):
    with pytest.raises(ArgumentError, match="validation="):
        datasets.carve(
            Split(torch.zeros(100), torch.zeros(100).long()), validation, default=0.1, seed=0
        )


def test_text_windows_are_shifted_by_one(tmp_path):
    content = "abracadabra " * 60
    (tmp_path / "t.txt").write_text(content)
    data = load(f"text:{tmp_path / 't.txt'}?bptt=7")
    words = data.vocabulary
    joined = torch.cat([data.train.inputs, data.validation.inputs, data.test.inputs]).reshape(-1)
    assert "".join(words[i] for i in joined) == content[: len(joined)]
    assert words[:2] == ("<unk>", "a")
    assert torch.equal(data.train.inputs[0, 1:], data.train.targets[0, :-1])
    assert data.train.targets[0, -1] == data.train.inputs[1, 0]
    assert data.classes == len(words) == 7
    assert (len(data.train), len(data.validation), len(data.test)) == (83, 9, 10)


def test_words_of_the_test_alone_are_unknown(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("the cat, the dog's bowl.\n" * 40 + "a zebra " * 15)
    data = text(str(path), level="word", bptt=5)
    assert "zebra" not in data.vocabulary
    assert set(data.vocabulary) >= {"the", "dog's", ",", "\n", "<unk>"}
    assert (data.test.inputs == 0).any()
    assert not (data.train.inputs == 0).any()
    small = text(str(path), level="word", bptt=5, vocabulary=1)
    assert small.vocabulary == ("<unk>", "the")


def test_bad_texts_are_refused(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 1000)
    with pytest.raises(DatasetError, match="too few"):
        load(f"text:{tmp_path / 'short.txt'}")
    with pytest.raises(DatasetError, match="UTF-8"):
        load(f"text:{tmp_path / 'latin.txt'}")
    with pytest.raises(DatasetError, match="tiny-shakespeare"):
        load("text:absent.txt")
    with pytest.raises(ArgumentError, match="level"):
        load(f"text:{tmp_path / 'short.txt'}?level=byte")
    with pytest.raises(ArgumentError, match="bptt='x'"):
        load(f"text:{tmp_path / 'short.txt'}?bptt=x")
    with pytest.raises(ArgumentError, match="levle"):
        load(f"text:{tmp_path / 'short.txt'}?levle=word")


USERS = """
import torch
from gossamer.datasets import Dataset, Split

def make(seed=0, n=30, bad=None, dtype=torch.float32):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = torch.arange(n) % 3
    if bad == "nan": x[3, 2] = float("nan")
    if bad == "length": y = y[:-1]
    if bad == "range": y = y + 1
    s = Split(x, y)
    e = Split(x[:0], y[:0])
    return Dataset("mine", e if bad == "empty" else s, e, s, 3)

def nothing():
    return 3
"""


def test_a_users_own_function(tmp_path):
    from pathlib import Path

    Path("my_own_data.py").write_text(USERS)
    data = load("my_own_data:make", seed=5, subset=6)
    assert isinstance(data, Dataset)
    assert data.train.targets.bincount().tolist() == [2, 2, 2]
    assert not torch.equal(
        load("my_own_data:make", seed=6).test.inputs, load("my_own_data:make").test.inputs
    )
    for bad, message in (
        ("nan", "NaN"),
        ("length", "30 inputs but 29"),
        ("range", "allows 0 to 2"),
        ("empty", "train is empty"),
    ):
        with pytest.raises(DatasetError) as e:
            load("my_own_data:make", bad=bad)
        assert message in str(e.value)
    with pytest.raises(DatasetError, match=r"float64.*float32"):
        load("my_own_data:make", dtype=torch.float64)
    with pytest.raises(DatasetError, match="train is int; give tensors"):
        load("my_own_data:nothing")
    with pytest.raises(ArgumentError, match=r"no function 'mkae'.*make"):
        load("my_own_data:mkae")
    with pytest.raises(ArgumentError, match="takes no validation="):
        load("my_own_data:make", validation=0.1)
    with pytest.raises(ArgumentError, match="no module named 'absent_module'"):
        load("absent_module:make")


def test_unknown_names_list_the_known():
    with pytest.raises(ArgumentError, match=r"'mnits'.*digits, mnist, cifar10"):
        load("mnits")
    with pytest.raises(ArgumentError, match="colour"):
        load("digits", colour=True)


@pytest.mark.filterwarnings("ignore")  # of what the package imports
def test_digits_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    digits: Any = importlib.import_module("gossamer.datasets.digits")
    images, labels = digits._read()
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    again = digits._read()
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
