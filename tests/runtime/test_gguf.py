"""GGUF files of ternary weights: what goes in comes out, and what TQ2_0 cannot hold is named."""

from __future__ import annotations

import copy
import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gossamer
from gossamer import cli
from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.experiments.inference import ggml
from gossamer.runtime import gguf as door

gguf = pytest.importorskip("gguf")


def ternary(shape: tuple[int, ...], scale: float = 0.1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(-1, 2, shape, generator=draw) * scale


class Net(nn.Module):
    """Two ternary layers, one with a scale a row; a dense one; an embedding, a norm, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 256)
        self.first = nn.Linear(256, 512)
        self.norm = nn.BatchNorm1d(512)
        self.second = nn.Linear(512, 6, bias=False)
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.arange(1280.0).view(5, 256) / 8)  # exact in 16 bits
            self.first.weight.copy_(ternary((512, 256)))
            self.second.weight.copy_(ternary((6, 512), 1.0) * torch.arange(6.0).view(6, 1) / 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (N) -> (N, 3)."""
        return self.head(self.second(torch.relu(self.norm(self.first(self.embedding(x))))))


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors, and their types' names."""
    held = gguf.GGUFReader(path).tensors
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in held if t.data.size}
    return values, {t.name: t.tensor_type.name for t in held}


def test_every_tensor_comes_back(tmp_path: Path) -> None:
    net = Net().eval()
    before = copy.deepcopy(net.state_dict())
    made = gossamer.export(net, None, tmp_path / "net.gguf", exclude=["head"])
    reader = gguf.GGUFReader(made.path)
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert list(kinds) == list(before)
    assert {n for n, k in kinds.items() if k == "TQ2_0"} == {"first.weight", "second.weight"}
    assert kinds["embedding.weight"] == "F16"
    assert kinds["head.weight"] == kinds["first.bias"] == "F32"
    assert kinds["norm.num_batches_tracked"] == "I64"
    for t in reader.tensors:
        wanted = before[t.name].numpy()
        assert tuple(reversed(t.shape)) == wanted.shape
        if kinds[t.name] != "TQ2_0":
            assert np.array_equal(t.data, wanted)
            continue
        found = gguf.quants.dequantize(t.data, t.tensor_type)
        assert np.array_equal(np.sign(found), np.sign(wanted))
        assert np.allclose(found, wanted, rtol=2.0**-11, atol=0)
    assert made.bytes == made.path.stat().st_size < made.dense_bytes / 3
    assert (made.format, made.precision, made.check) == ("GGUF", "ternary", None)
    assert "every tensor, read back from the file" in str(made)
    assert "changes their scales by up to" in str(made)
    assert "inputs" not in str(made)
    assert reader.fields["general.architecture"].contents() == "gossamer"
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_TQ2_0
    assert [p.name for p in tmp_path.iterdir()] == ["net.gguf"]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_blocks_by_hand() -> None:
    row = np.zeros((2, 512), np.float32)
    assert door.fault(row) is None
    row[0, :256], row[0, 256:], row[1, 3] = 0.5, -0.25, 0.1  # a scale for each block
    assert door.fault(row) is None
    for wrong, match in (
        ({(0, 5): -0.4}, r"scales differ: 0\.5 for positive weights, 0\.4 for negative"),
        ({(0, 5): 0.4}, "not ternary: 2 magnitudes in 256 weights"),
        ({(1, 3): 1e-6}, r"scale 1e-06 is beyond half precision"),
        ({(1, 3): 7e4}, r"scale 70000 is beyond half precision \(inf there\)"),
        ({(1, 3): np.nan}, "NaN or infinity"),
    ):
        bad = row.copy()
        for place, value in wrong.items():
            bad[place] = value
        with np.errstate(all="raise"):
            assert (why := door.fault(bad)) is not None
        assert re.search(match, why), why
    assert "rows of 3 values" in str(door.fault(np.ones((256, 256, 3, 3), np.float32)))
    assert "rows of 384 values" in str(door.fault(np.ones((2, 384), np.float32)))
    near = np.nextafter(np.float64(0.5), 1)  # another value, which float32 does not tell
    assert "not ternary" in str(door.fault(np.where(np.arange(256) % 2, 0.5, near)[None]))


def test_what_does_not_fit_is_named_and_not_written(tmp_path: Path) -> None:
    net = Net()
    with torch.no_grad():
        net.second.weight[2, 0] = -5.0
    with pytest.raises(ArgumentError) as refused:
        gossamer.export(net, None, tmp_path / "a.gguf")
    assert "does not hold 2 of 3 weights: second.weight: " in str(refused.value)
    assert "head.weight: rows of 6 values" in str(refused.value)
    assert "--exclude second.weight --exclude head.weight" in str(refused.value)
    for wrong, match in (
        (nn.Sequential(nn.ReLU()), "has no weights"),
        (nn.Sequential(nn.ModuleDict({"n" * 60: nn.Linear(256, 1)})), "longer than ggml's 63"),
    ):
        with pytest.raises(ArgumentError, match=match):
            gossamer.export(wrong, None, tmp_path / "a.gguf")
    net = Net()
    net.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ArgumentError, match=r"phase is torch\.complex64"):
        gossamer.export(net, None, tmp_path / "a.gguf", exclude=["head"])
    net.phase = torch.zeros(1, 1, 1, 1, 1)
    with pytest.raises(ArgumentError, match=r"phase has shape .* at most 4 dimensions"):
        gossamer.export(net, None, tmp_path / "a.gguf", exclude=["head"])
    with pytest.raises(ArgumentError, match=r"precision='int8' is .*; \.gguf is ternary"):
        gossamer.export(Net(), None, tmp_path / "a.gguf", precision="int8")
    with pytest.raises(ArgumentError, match=r"exclude= is for \.gguf"):
        gossamer.export(Net(), torch.zeros(1), tmp_path / "a.onnx", exclude=["head"])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_otherwise_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = gguf.quants.quantize

    def turned(array: Any, kind: Any) -> Any:
        blocks = true(array, kind)
        blocks.reshape(-1)[7] ^= 1
        return blocks

    monkeypatch.setattr(gguf.quants, "quantize", turned)
    (tmp_path / "a.gguf").write_text("as it was")
    with pytest.raises(GossamerError, match=r"first\.weight reads back otherwise"):
        gossamer.export(Net(), None, tmp_path / "a.gguf", exclude=["head"], overwrite=True)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["as it was"]


def test_tied_and_derived_weights(tmp_path: Path) -> None:
    net = gossamer.nets.build(
        "gpt", classes=8, width=256, layers=1, heads=2, context=4, tied=True, seed=0
    )
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 2 and "position" not in name:
                p.copy_(ternary(tuple(p.shape), 0.25))
    made = gossamer.export(nn.DataParallel(net).half(), None, tmp_path / "net.gguf")
    values, kinds = read(made.path)
    assert "output.weight" not in kinds
    assert kinds["embedding.weight"] == "TQ2_0"
    assert np.array_equal(values["embedding.weight"], ternary((8, 256), 0.25).numpy())
    assert any(n.startswith("output.weight is embedding.weight") for n in made.notes)
    assert any("holds their scales exactly" in n for n in made.notes)
    told = gguf.GGUFReader(made.path).fields["gossamer.tied"].contents()
    assert told == ["output.weight=embedding.weight"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "of_signs.py").write_text(
        "import torch\n\n\ndef net():\n    made = torch.nn.Sequential(torch.nn.Linear(256, 2), "
        "torch.nn.Linear(2, 2))\n    made[0].weight.data.sign_()\n    return made\n"
    )
    arguments = ["export", f"{tmp_path}/of_signs.py:net", "--to", str(tmp_path / "a.gguf")]
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "1.weight: rows of 2 values" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        cli.main([*arguments, "--exclude", "1"])
    assert "512 weights in 1 tensors are TQ2_0" in capsys.readouterr().out


def test_ggml_reads_and_multiplies_the_file(tmp_path: Path) -> None:
    lib = ggml.library()
    if lib is None:
        pytest.skip(f"{ggml.VARIABLE} names no library")

    class Settings(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    net = Net()
    made = gossamer.export(net, None, tmp_path / "net.gguf", exclude=["head"])
    context = ctypes.c_void_p()
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, Settings]
    opened = lib.gguf_init_from_file(
        str(made.path).encode(),
        Settings(False, ctypes.cast(ctypes.byref(context), ctypes.c_void_p)),
    )
    assert opened
    lib.ggml_get_tensor.restype = lib.ggml_get_data.restype = ctypes.c_void_p
    lib.ggml_get_tensor.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    lib.ggml_get_data.argtypes = [ctypes.c_void_p]
    for name, weight in (("first.weight", net.first.weight), ("second.weight", net.second.weight)):
        found = lib.ggml_get_data(lib.ggml_get_tensor(context, name.encode()))
        product = ggml.Product(lib, weight.detach().numpy(), "TQ2_0", held=found)
        x = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
        wanted = (weight @ x).detach().numpy()
        assert np.abs(product(x.numpy()) - wanted).max() < 0.02 * np.abs(wanted).max()
    for name, tensor in net.state_dict().items():
        if tensor.dtype == torch.float32 and tensor.ndim == 1:
            at = lib.ggml_get_data(lib.ggml_get_tensor(context, name.encode()))
            got = np.ctypeslib.as_array((ctypes.c_float * tensor.numel()).from_address(at))
            assert np.array_equal(got, tensor.numpy())
