"""Write a tensor in each of the layouts. ``docs/format.md`` says what every byte means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gossamer.pack import context
from gossamer.pack.bits import symbol_dtype
from gossamer.pack.book import encode_book
from gossamer.pack.coders import CODERS, FIXED, HUFFMAN, RANS
from gossamer.pack.gaps import fixed_gaps, to_bitmap, to_gaps
from gossamer.pack.limits import varint
from gossamer.pack.raw import encode_raw
from gossamer.pack.section import (
    BITMAP,
    CLASSES,
    CONTEXT,
    DENSE,
    FACTOR,
    GAPS,
    PAPER,
    RAW,
    RAW_VALUES,
    SEEDED,
    TRANSPOSED,
    ZERO,
)
from gossamer.pack.values import Bits, Values
from gossamer.seeded import SCHEMES, Seed

__all__ = [
    "Scan",
    "Settings",
    "bitmap_section",
    "context_section",
    "dense_section",
    "gaps_section",
    "paper_section",
    "row_scan",
    "seeded_section",
    "transposed",
]

SMALL = 4096
"""Up to this many symbols or entries, everything is tried instead of estimated."""

Classes = NDArray[np.uint8]


@dataclass(frozen=True)
class Settings:
    """How to choose among layouts and coders.

    Attributes:
        coders: symbol coders to consider.
        context: entries up to which the context coder is tried, where it is compiled (0: never).
        paper: Deep Compression's own coding, with gaps of ``index_bits``.
        index_bits: of the paper's gaps.
        level: of zstd.
        slack: candidates estimated within this fraction of the best are really encoded.
        gain: a layout that decodes slower must save this fraction.
    """

    coders: tuple[int, ...] = (FIXED, HUFFMAN, RANS)
    context: int = 1 << 24
    paper: bool = False
    index_bits: int = 5
    level: int = 19
    slack: float = 0.1
    gain: float = 0.0


@dataclass(frozen=True)
class Scan:
    """The non-zeros of a tensor in row or column order.

    Attributes:
        flags: ``TRANSPOSED`` for columns.
        rows, cols: of the matrix as scanned.
        positions: of the non-zeros, ascending.
        entries: their codes, or their bit patterns when there is no code book.
    """

    flags: int
    rows: int
    cols: int
    positions: NDArray[np.int64]
    entries: Bits


def row_scan(v: Values) -> Scan:
    """The tensor as it lies in memory."""
    entries = v.bits[v.positions] if v.codes is None else v.codes
    return Scan(0, v.rows, v.cols, v.positions, entries)


def transposed(scan: Scan) -> Scan:
    """The same non-zeros, column by column."""
    turned = scan.positions % scan.cols * scan.rows + scan.positions // scan.cols
    order = np.argsort(turned, kind="stable")
    return Scan(TRANSPOSED, scan.cols, scan.rows, turned[order], scan.entries[order])


def dense_section(v: Values, s: Settings, classes: Classes | None, turned: bool) -> bytes:
    """A symbol per entry, zero among them in its place by value."""
    assert v.book is not None
    assert v.codes is not None
    zero = len(v.positions) < len(v.bits)
    alphabet = len(v.book) + zero
    dense = v.codes
    if zero:
        dense = np.full(len(v.bits), v.negatives, symbol_dtype(alphabet))
        dense[v.positions] = v.codes + (v.codes >= v.negatives).astype(dense.dtype)
    flags = (ZERO if zero else 0) | (TRANSPOSED if turned else 0)
    out = _head(DENSE | flags, v, classes, s)
    if alphabet < 2:
        return out
    grid = dense.reshape(v.rows, v.cols)
    if turned:
        grid = grid.T
    if classes is None:
        return out + _stream(np.ascontiguousarray(grid).reshape(-1), alphabet, s)
    for c in range(int(classes.max()) + 1):
        part = np.ascontiguousarray(grid[:, classes == c]).reshape(-1)
        out += _stream(part, alphabet, s)
    return out


def gaps_section(v: Values, s: Settings, scan: Scan, classes: Classes | None) -> bytes:
    """Positions as gaps of a wide alphabet with an escape."""

    def code(positions: NDArray[np.int64], size: int) -> bytes:
        gaps = to_gaps(positions)
        return varint(len(gaps) - len(positions)) + _stream(gaps, 256, s)

    return _sparse_section(GAPS, v, s, scan, classes, code)


def bitmap_section(v: Values, s: Settings, scan: Scan, classes: Classes | None) -> bytes:
    """Positions as a bitmap, eight entries a symbol."""

    def code(positions: NDArray[np.int64], size: int) -> bytes:
        bitmap = np.zeros(size, bool)
        bitmap[positions] = True
        return _stream(to_bitmap(bitmap), 256, s)

    return _sparse_section(BITMAP, v, s, scan, classes, code)


def context_section(v: Values) -> bytes:
    """Positions and codes together, by the context-mixing coder."""
    assert v.book is not None
    assert v.codes is not None
    below = v.negatives
    ranks = np.zeros(len(v.bits), np.int32)
    codes = v.codes.astype(np.int32)
    ranks[v.positions] = codes - below + (codes >= below)
    data = context.encode(ranks.reshape(v.rows, v.cols), v.kernel)
    return bytes([CONTEXT]) + varint(len(v.positions)) + encode_book(v.book, v.dtype) + data


def paper_section(v: Values, s: Settings) -> bytes:
    """Deep Compression's coding of shared weights; everything else as it is."""
    if v.book is None or v.codes is None or len(v.shape) < 2 or len(v.book) == 0:
        return bytes([RAW, 0]) + v.bits.tobytes()
    gaps, fillers = fixed_gaps(v.positions, s.index_bits)
    codes = np.zeros(len(gaps), symbol_dtype(len(v.book) + 1))
    real = np.ones(len(gaps), bool)
    real[fillers] = False
    codes[real] = v.codes.astype(codes.dtype) + codes.dtype.type(1)
    out = bytes([PAPER]) + varint(len(v.positions)) + encode_book(v.book, v.dtype, plain=True)
    out += bytes([s.index_bits]) + varint(len(fillers))
    return out + _stream(gaps, 1 << s.index_bits, s) + _stream(codes, len(v.book) + 1, s)


def seeded_section(seed: Seed, mask: bytes) -> bytes:
    """A seed in place of values; ``mask`` is the section of the bool tensor of what is kept."""
    form = SCHEMES.index(seed.scheme) | (FACTOR if seed.factor != 1.0 else 0)
    out = bytes([SEEDED, form]) + seed.seed.to_bytes(8, "little") + varint(seed.stream)
    out += np.array([seed.scale, seed.factor][: 1 + bool(form & FACTOR)], "<f4").tobytes()
    return out + mask


def _stream(symbols: NDArray[np.unsignedinteger], alphabet: int, s: Settings) -> bytes:
    """The symbols by the best coder, after its number and length."""
    histogram = np.bincount(symbols, minlength=alphabet)
    costs = sorted((CODERS[c].estimate(histogram), c) for c in s.coders)
    tried = [c for cost, c in costs if len(symbols) <= SMALL or cost <= costs[0][0] * (1 + s.slack)]
    encoded = [(CODERS[c].encode(symbols, alphabet), c) for c in tried]
    data, coder = min(encoded, key=lambda pair: len(pair[0]))
    return varint(len(data) << 2 | coder) + data


def _head(layout: int, v: Values, classes: Classes | None, s: Settings) -> bytes:
    layout |= 0 if classes is None else CLASSES
    head = bytes([layout]) + varint(len(v.positions))
    if v.book is not None:
        head += encode_book(v.book, v.dtype)
    if classes is not None:
        count = int(classes.max()) + 1
        head += bytes([count]) + _stream(classes, count, s)
    return head


def _sparse_section(
    layout: int,
    v: Values,
    s: Settings,
    scan: Scan,
    classes: Classes | None,
    code: Callable[[NDArray[np.int64], int], bytes],
) -> bytes:
    """Head, positions of each class by ``code``, then the values in the same order."""
    flags = scan.flags | (RAW_VALUES if v.book is None else 0)
    out = _head(layout | flags, v, classes, s)
    parts, entries = [(scan.positions, len(v.bits))], scan.entries
    if classes is not None:
        parts, order = _split(scan, classes)
        entries = entries[order]
        out += b"".join(varint(len(p)) for p, _ in parts[:-1])
    out += b"".join(code(p, size) for p, size in parts if len(p))
    if v.book is None:
        return out + encode_raw(entries, v.dtype, level=s.level)
    return out + (_stream(entries, len(v.book), s) if len(v.book) > 1 else b"")


def _split(
    scan: Scan, classes: Classes
) -> tuple[list[tuple[NDArray[np.int64], int]], NDArray[np.int64]]:
    """Positions within each class's own matrix and its size; and the order of all entries."""
    line, column = np.divmod(scan.positions, scan.cols)
    own = classes[column]
    parts, order = [], []
    for c in range(int(classes.max()) + 1):
        members = classes == c
        width = int(members.sum())
        rank = np.cumsum(members) - 1
        inside = np.flatnonzero(own == c)
        parts.append((line[inside] * width + rank[column[inside]], scan.rows * width))
        order.append(inside)
    return parts, np.concatenate(order)
