"""Opening a file reads its header; a tensor is read when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.pack import Archive, pack
from gossamer.pack.format.container import Entry
from gossamer.pack.format.values import Bits
from gossamer.pack.read.source import Source


def test_opening_reads_the_header_and_one_tensor_its_own_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    state = {f"{i}": torch.randn(200, 200, generator=g) for i in range(4)}
    pack(state, tmp_path / "net.gsm").close()
    read: list[tuple[int, int]] = []
    whole = Source.read

    def counted(self: Source, at: int, count: int) -> bytes:
        if count > 0:
            read.append((at, count))
        return whole(self, at, count)

    monkeypatch.setattr(Source, "read", counted)
    with Archive(tmp_path / "net.gsm") as opened:
        assert opened.names == list(state)
        assert opened.entry("2").shape == (200, 200)
        assert read == [(0, 1 << 16)]
        assert torch.equal(opened["2"], state["2"])
        header = opened.header
        assert read[1:] == [(header.offsets[2], header.lengths[2] + 4)]


def test_a_listing_decodes_only_what_does_not_count_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    grid = torch.randint(-3, 4, (100, 90), generator=g) / 8
    state = {
        "dense": grid + 1.0,
        "sparse": torch.where(torch.rand(100, 90, generator=g) < 0.1, grid, 0.0),
        "raw": torch.randn(100, 90, generator=g),
        "small": torch.arange(3.0),
    }
    pack({**state, "tied": state["sparse"]}, tmp_path / "net.gsm").close()
    with Archive(tmp_path / "net.gsm", keep=True) as opened:
        opened.tensors()
        rows = opened.rows()
    decoded: list[str] = []
    decode = Archive._decode

    def counted(self: Archive, index: int, entry: Entry, *out: Any) -> Bits:
        decoded.append(entry.name)
        return decode(self, index, entry, *out)

    monkeypatch.setattr(Archive, "_decode", counted)
    with Archive(tmp_path / "net.gsm") as opened:
        parts = opened.parts()
        assert decoded == []
        assert sum(parts.values()) == opened.file_bytes
        assert opened.rows() == opened.rows() == rows
        assert decoded == ["raw", "small"]
        assert list(opened.parts().items()) == list(parts.items())
    for row in rows[:-1]:
        value = state[row["name"]]
        assert (row["nonzeros"], row["distinct"]) == (int((value != 0).sum()), len(value.unique()))
