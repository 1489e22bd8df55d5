"""Opening a file reads its header; a tensor is read when it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gossamer.pack import Archive, pack
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
