"""What a file's tensors are and where its bytes go: the rows of tables and reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import numpy as np

from gossamer.pack.coders.ans import Stream as RansStream
from gossamer.pack.coders.ans import parse as parse_rans
from gossamer.pack.coders.huffman import table_bytes
from gossamer.pack.coders.table import HUFFMAN, RANS
from gossamer.pack.format.container import Entry
from gossamer.pack.format.section import Section, Stream
from gossamer.pack.format.values import Bits

__all__ = ["Row", "grouped_row", "own_parts", "own_row", "tied_row"]


class Row(TypedDict):
    """One tensor of a file.

    ``density`` is the fraction of non-zeros; ``distinct`` counts values, zero included;
    ``bytes`` is its share of the file outside the header, and the sum of ``parts`` (among
    ``positions``, ``codes``, ``context`` for both together, ``codebook``, ``tables``,
    ``classes``, ``raw``, ``seed``, ``scales`` and ``framing``); ``tied_to`` names the tensor an
    alias stands for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    nonzeros: int
    density: float
    distinct: int
    codec: str
    bytes: int
    bits_per_weight: float
    parts: dict[str, int]
    tied_to: str | None


def own_row(entry: Entry, section: Section, decoded: Callable[[], Bits]) -> Row:
    """A tensor with a section of its own; ``decoded`` is asked for what that does not tell."""
    parts = own_parts(section)
    # the book of a seeded tensor is its mask's, that of a scaled one its codes'
    other = section.seed is not None or section.scales is not None
    if section.book is None or other:
        return _counted(entry, decoded(), section.chain, parts)
    nonzeros = sum(section.kept)
    distinct = len(section.book) + (nonzeros < entry.numel)
    return _row(entry, nonzeros, distinct, section.chain, parts)


def grouped_row(entry: Entry, bits: Bits, share: int) -> Row:
    """A member of the section of small tensors, with its share of the bytes."""
    return _counted(entry, bits, "raw, grouped", {"raw": share})


def tied_row(name: str, target: Row) -> Row:
    """An alias, which takes no bytes and is otherwise what its target is."""
    return Row(
        **target
        | {
            "name": name,
            "codec": "tied",
            "bytes": 0,
            "bits_per_weight": 0.0,
            "parts": {},
            "tied_to": target["name"],
        }
    )


def _counted(entry: Entry, bits: Bits, codec: str, parts: dict[str, int]) -> Row:
    return _row(entry, int(np.count_nonzero(bits)), len(np.unique(bits)), codec, parts)


def _row(entry: Entry, nonzeros: int, distinct: int, codec: str, parts: dict[str, int]) -> Row:
    total = sum(parts.values())
    return Row(
        name=entry.name,
        shape=entry.shape,
        dtype=entry.dtype.name,
        numel=entry.numel,
        nonzeros=nonzeros,
        density=nonzeros / entry.numel if entry.numel else 1.0,
        distinct=distinct,
        codec=codec,
        bytes=total,
        bits_per_weight=8 * total / entry.numel if entry.numel else 0.0,
        parts=parts,
        tied_to=None,
    )


def own_parts(section: Section) -> dict[str, int]:
    """Bytes by purpose: coders' tables out of positions and codes, the checksum in framing."""
    parts = dict(section.parts)
    for part, streams in (("positions", section.positions), ("codes", [section.codes])):
        # Dense symbols are codes, though there is one stream of them per class.
        part = part if part in parts else "codes"
        size = sum(_table_bytes(s) for s in streams if s is not None)
        if size:
            parts[part] -= size
            parts["tables"] = parts.get("tables", 0) + size
    parts["framing"] = parts.get("framing", 0) + 4
    return parts


def _table_bytes(stream: Stream) -> int:
    """What a stream spends on telling its code."""
    data = stream.data
    if stream.coder == RANS and len(data) and data[0] & 7 > 1:  # else it has no table
        found = parse_rans(data, stream.count, stream.alphabet)
        return len(data) - len(found.payload) if isinstance(found, RansStream) else 0
    if stream.coder == HUFFMAN:
        return table_bytes(data, stream.count, stream.alphabet)
    return 0
