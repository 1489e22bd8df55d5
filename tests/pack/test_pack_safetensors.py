"""The safetensors profile: codes and code books another tool can read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack.safetensors_io import load_safetensors, save_safetensors


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (20, 30), generator=generator)
    book = torch.tensor([0.0, -0.5, -0.25, -0.0, 0.125, 0.25, 0.5, 1.0])
    wide = torch.randint(0, 400, (60, 70), generator=generator).double() / 7
    return {
        "fc.weight": book[codes],
        "half": book[codes].half(),
        "wide": wide,
        "bias": torch.randn(30, generator=generator),
        "steps": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "int8": torch.zeros(4, 4, dtype=torch.int8),
    }


def test_round_trip_and_what_other_tools_see(tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = state()
    tied = {**tensors, "again": tensors["fc.weight"]}
    save_safetensors(tied, path, metadata={"accuracy": 0.5})
    out, metadata = load_safetensors(path)
    assert metadata == {"accuracy": 0.5}
    assert set(out) == set(tied)
    assert out["again"] is out["fc.weight"]
    for name, tensor in tensors.items():
        assert out[name].dtype == tensor.dtype
        assert torch.equal(out[name], tensor)
        if tensor.is_floating_point():
            assert torch.equal(out[name].signbit(), tensor.signbit())
    plain = load_file(path)
    assert plain["fc.weight.codes"].dtype == torch.uint8
    assert plain["fc.weight.codes"].shape == (20, 30)
    assert plain["wide.codes"].dtype == torch.uint16
    assert plain["fc.weight.codebook"][0] == 0
    assert "bias" in plain
    assert "int8" in plain
    book, codes = plain["fc.weight.codebook"], plain["fc.weight.codes"].long()
    assert torch.equal(book[codes], tensors["fc.weight"])


def test_a_file_of_another_origin_passes_through(tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(3)}, path)
    out, metadata = load_safetensors(path)
    assert out["a"].tolist() == [1, 1, 1]
    assert metadata == {}


def test_clash_of_names_is_refused(tmp_path) -> None:
    tensors = {"w": state()["fc.weight"], "w.codes": torch.zeros(1)}
    with pytest.raises(ArgumentError, match=r"'w\.codes' is needed for the codes of 'w'"):
        save_safetensors(tensors, tmp_path / "m.safetensors")
    with pytest.raises(ArgumentError, match="metadata is not JSON"):
        save_safetensors({}, tmp_path / "m.safetensors", metadata={"x": object()})
    assert list(tmp_path.iterdir()) == []


HEAD = {"version": 1, "coded": ["w"], "tied": {}, "metadata": {}}
CODES = torch.tensor([0, 1], dtype=torch.uint8)
BOOK = torch.tensor([0.0, 1.0])


@pytest.mark.parametrize(
    ("tensors", "head", "message"),
    [
        ({"w.codes": CODES}, HEAD, "lacks its codes or its code book"),
        ({"w.codes": CODES + 1, "w.codebook": BOOK}, HEAD, "outside the code book"),
        ({"w.codes": CODES.to(torch.int8) - 1, "w.codebook": BOOK}, HEAD, "outside the code book"),
        ({"w.codes": CODES.float(), "w.codebook": BOOK}, HEAD, "outside the code book"),
        ({"w.codes": CODES, "w.codebook": BOOK}, {**HEAD, "version": 9}, "version 9"),
        ({"w.codes": CODES, "w.codebook": BOOK}, {**HEAD, "tied": {"x": "y"}}, "missing"),
        ({"w.codes": CODES, "w.codebook": BOOK}, {**HEAD, "tied": {"x": 3}}, "missing"),
        ({"w.codes": CODES, "w.codebook": BOOK}, {**HEAD, "coded": [3]}, "lacks its codes"),
        ({}, {"version": 1}, "lacks one of"),
        ({}, "[", "no JSON"),
    ],
)
def test_damaged_files(tmp_path, tensors, head, message) -> None:
    path = tmp_path / "m.safetensors"
    text = head if isinstance(head, str) else json.dumps(head)
    save_file(tensors, path, metadata={"gossamer": text})
    with pytest.raises(FormatError, match=message):
        load_safetensors(path)


def test_truncated(tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    save_safetensors(state(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        load_safetensors(path)
