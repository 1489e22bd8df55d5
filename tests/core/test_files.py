"""Files are whole or as they were, whoever writes beside and whatever stops the writer."""

import errno
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gossamer.compression import inputs
from gossamer.core import files
from gossamer.core.errors import ArgumentError, FormatError, GossamerError
from gossamer.experiments import write_json
from gossamer.pack import pack, pack_bytes, unpack
from gossamer.pack.safetensors_io import save_safetensors
from gossamer.training import load_checkpoint, save_atomic

WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda p: files.write_text(p, "new"),
    "json": lambda p: write_json(p, {"a": 1}),
    "checkpoint": lambda p: save_atomic({"a": torch.ones(300)}, p),
    "pack": lambda p: pack({"a": torch.ones(300)}, p).close(),
    "coded safetensors": lambda p: save_safetensors({"a": torch.ones(300)}, p),
    "plain safetensors": lambda p: inputs.save_safetensors({"a": torch.ones(300)}, p),
}


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    return WRITERS[request.param]


def test_no_link_is_followed(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for planted in ("out", "out.tmp", ".out.tmp"):
        (tmp_path / planted).symlink_to(victim)
    write(tmp_path / "out")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "out").is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"victim", "out", "out.tmp", ".out.tmp"}


@pytest.mark.parametrize("what", ["write", "fsync"])
def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Any], what: str
) -> None:
    (tmp_path / "out").write_text("old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if what == "fsync":
        monkeypatch.setattr(files.os, "fsync", full)
    else:
        real = os.fdopen

        def limited(*args: Any) -> Any:
            file = real(*args)

            class Limited:
                write = staticmethod(full)
                __getattr__ = staticmethod(lambda name: getattr(file, name))

                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: Any) -> None:
                    file.close()

            return Limited()

        monkeypatch.setattr(files.os, "fdopen", limited)
        monkeypatch.setattr(files, "_free", lambda path: 0)
    with pytest.raises(GossamerError, match=r"disk of .* is full .*make room"):
        write(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_missing_folder_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no' does not exist"):
        files.write_chunks(tmp_path / "no" / "x", [b""])
    with pytest.raises(ArgumentError, match="is a folder"):
        files.write_text(tmp_path, "")


def _write_often(path: Path, seed: int) -> None:
    for _ in range(20):
        save_atomic({f"w{i}": torch.full((50, 50), float(seed)) for i in range(3)}, path)
        files.write_text(path.with_suffix(".json"), json.dumps([seed] * 5000))


def test_two_processes_that_write_one_path_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    _write_often(path, 0)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_often, args=(path, i)) for i in (1, 2)]
    for writer in writers:
        writer.start()
    reads = 0
    while reads < 20 or any(w.is_alive() for w in writers):
        state = load_checkpoint(path)
        assert len({float(v) for t in state.values() for v in t.flatten()[[0, -1]]}) == 1
        assert len(set(json.loads(path.with_suffix(".json").read_text()))) == 1
        reads += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert {p.name for p in tmp_path.iterdir()} == {"s.pt", "s.json"}


STATE = {"model": {"w": torch.arange(24.0).reshape(4, 6)}, "step": 7, "names": ["a", "b"]}


def _same(found: Any) -> bool:
    same = torch.equal(found["model"]["w"], STATE["model"]["w"])  # type: ignore[index]
    return same and found["step"] == 7 and found["names"] == ["a", "b"]


def test_every_changed_byte_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_atomic(STATE, path)
    data = path.read_bytes()
    assert _same(load_checkpoint(path))
    assert _same(torch.load(path, weights_only=True))  # readable without this library
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])
        try:
            found = load_checkpoint(path)
        except FormatError:
            continue
        assert _same(found), i  # a flip in the digest's frame: the archive's CRCs are looked at
    archive = len(data) - 80  # what follows is the digest; without it the CRCs are looked at
    for i in range(0, archive, 7):
        path.write_bytes(data[:i])
        with pytest.raises(FormatError, match=r"c\.pt is"):
            load_checkpoint(path)


def test_a_checkpoint_without_a_digest_is_checked_by_its_crcs(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(STATE, path)
    assert _same(load_checkpoint(path))
    data = bytearray(path.read_bytes())
    at = bytes(data).index(torch.arange(24.0).numpy().tobytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="fails its CRC-32"):
        load_checkpoint(path)


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    save_atomic(STATE, tmp_path / "a.pt")
    first = (tmp_path / "a.pt").read_bytes()
    save_atomic(STATE, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == first


def test_the_name_that_safetensors_keeps_for_itself_is_refused(tmp_path: Path) -> None:
    tensors = unpack(
        pack_bytes({"__metadata__": torch.tensor([0.1, 0.2, 0.3]), "a": torch.zeros(2)})
    )
    for write in (inputs.save_safetensors, save_safetensors):
        with pytest.raises(ArgumentError, match=r"'__metadata__'.*rename"):
            write(tensors, tmp_path / "x.safetensors")
        assert not list(tmp_path.iterdir())
    inputs.save_safetensors(nn.Linear(2, 2), tmp_path / "x.safetensors")
    assert set(load_file(tmp_path / "x.safetensors")) == {"weight", "bias"}


def test_control_characters_of_a_file_are_escaped() -> None:
    assert files.shown("a\x1b[2Jb\n") == "a\\x1b[2Jb\\n"
    assert files.shown("Größe.weight") == "Größe.weight"
