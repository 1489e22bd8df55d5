"""Files written once are read by every release, bit for bit, compiled and plain."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from gossamer.pack import Archive
from gossamer.pack.coders.table import CODERS
from gossamer.pack.format.values import to_bits
from toy_coder import Toy

FILES = sorted((Path(__file__).parent / "golden").glob("*.gsm"))


def digest(tensor: torch.Tensor) -> str:
    _, bits = to_bits("t", tensor)
    shape = "x".join(map(str, tensor.shape))
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {shape} {hashlib.sha256(bits.tobytes()).hexdigest()}"


def test_there_are_files() -> None:
    assert {p.stem for p in FILES} == {
        "context",
        "fast",
        "grids",
        "huffman",
        "layouts",
        "names",
        "scaled",
        "seeded",
    }


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_file_reads_as_ever(path: Path, native: str, monkeypatch) -> None:
    monkeypatch.setenv("GOSSAMER_NATIVE", native)
    monkeypatch.setattr(CODERS, "_entries", {**CODERS._entries, "toy": Toy()})
    expected = json.loads(path.with_suffix(".json").read_text())
    with Archive(path) as archive:
        archive.verify()
        assert {n: digest(archive.tensor(n)) for n in archive} == expected
        assert sum(archive.parts().values()) == path.stat().st_size
        if path.stem == "fast":
            assert archive.metadata == {"v": 1, "t": "ab" * 50}
            assert archive.aliases == {"tied.weight": "fc.weight"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_bytes_are_those_specified(path: Path) -> None:
    # The fixed part of the header, straight from docs/format.md.
    data = path.read_bytes()
    assert data[:4] == b"\x89GSM"
    assert data[4] == {"seeded": 2, "names": 3, "scaled": 3}.get(path.stem, 1)
