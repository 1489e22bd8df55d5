"""Draft a tensor in each of the layouts. ``docs/format.md`` says what every byte means."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gossamer.core.seeds import SCHEMES, Seed
from gossamer.pack.coders import context
from gossamer.pack.coders.bits import histogram, symbol_dtype
from gossamer.pack.coders.gaps import fixed_gaps, to_bitmap, to_gaps
from gossamer.pack.coders.limits import varint
from gossamer.pack.coders.table import FIXED, HUFFMAN, RANS
from gossamer.pack.format.book import encode_book
from gossamer.pack.format.raw import encode_raw
from gossamer.pack.format.scales import Scales
from gossamer.pack.format.section import (
    BITMAP,
    CLASSES,
    CONTEXT,
    DENSE,
    FACTOR,
    FURTHER,
    GAPS,
    PAPER,
    RAW,
    RAW_VALUES,
    SCALED,
    SEEDED,
    TRANSPOSED,
    ZERO,
)
from gossamer.pack.format.values import Bits, Values
from gossamer.pack.write.draft import Draft

__all__ = [
    "Scan",
    "Settings",
    "bitmap_section",
    "context_section",
    "dense_section",
    "gaps_section",
    "paper_section",
    "row_scan",
    "scaled_section",
    "seeded_section",
    "transposed",
]

Classes = NDArray[np.uint8]


@dataclass(frozen=True)
class Settings:
    """How to choose among layouts and coders.

    Attributes:
        coders: symbol coders to consider, by name.
        context: entries up to which the context coder is tried, where it is compiled (0: never).
        paper: Deep Compression's own coding, with gaps of ``index_bits``.
        index_bits: of the paper's gaps.
        level: of zstd.
        slack: candidates estimated within this fraction of the best are drafted.
        gain: a layout that decodes slower must save this fraction.
        lzma: whether the tensor's bytes are tried with LZMA.
        scales: whether codes are told apart from the scales of their rows or groups.
    """

    coders: tuple[str, ...] = (FIXED, HUFFMAN, RANS)
    context: int = 1 << 24
    paper: bool = False
    index_bits: int = 5
    level: int = 19
    slack: float = 0.1
    gain: float = 0.0
    lzma: bool = True
    scales: bool = True


@dataclass(frozen=True, eq=False)
class Part:
    """The non-zeros of one class of columns, all in a matrix of that class's own.

    Attributes:
        positions: in that matrix, ascending.
        size: its entries.
        entries: as of :class:`Scan`.
    """

    positions: NDArray[np.int64]
    size: int
    entries: Bits


@dataclass(frozen=True, eq=False)
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
    _split: dict[bytes, list[Part]] = field(default_factory=dict)

    def parts(self, classes: Classes | None) -> list[Part]:
        """The scan class by class, lowest first; ``None``: all of it as one."""
        if classes is None:
            return [Part(self.positions, self.rows * self.cols, self.entries)]
        key = classes.tobytes()
        if key not in self._split:
            self._split[key] = self._divide(classes)
        return self._split[key]

    def _divide(self, classes: Classes) -> list[Part]:
        count = int(classes.max()) + 1
        widths = np.bincount(classes, minlength=count)
        rank = np.empty(self.cols, np.int64)  # of a column among those of its class
        for c in range(count):
            rank[classes == c] = np.arange(widths[c])
        line, column = _place(self.positions, self.cols)
        own = classes[column]
        inside = line * widths[own] + rank[column]
        order = np.argsort(own, kind="stable")
        ends = np.cumsum(np.bincount(own, minlength=count))
        return [
            Part(positions, self.rows * int(width), entries)
            for positions, width, entries in zip(
                np.split(inside[order], ends[:-1]),
                widths,
                np.split(self.entries[order], ends[:-1]),
                strict=True,
            )
        ]


def row_scan(v: Values) -> Scan:
    """The tensor as it lies in memory."""
    entries = v.bits[v.positions] if v.codes is None else v.codes
    return Scan(0, v.rows, v.cols, v.positions, entries)


def transposed(scan: Scan) -> Scan:
    """The same non-zeros, column by column."""
    line, column = _place(scan.positions, scan.cols)
    order = _by_value(column, scan.cols)
    turned = column[order] * scan.rows + line[order]
    return Scan(TRANSPOSED, scan.cols, scan.rows, turned, scan.entries[order])


def _place(positions: NDArray[np.int64], cols: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Line and column; several times as fast as :func:`numpy.divmod`."""
    line = positions // cols
    return line, positions - line * cols


def _by_value(values: NDArray[np.int64], below: int) -> NDArray[np.int64]:
    """A stable argsort; numpy's sorts 16 bits at a time by counting, which is fast."""
    order = np.argsort(values.astype(np.uint16), kind="stable")
    for shift in range(16, max(1, below - 1).bit_length(), 16):
        digit = (values[order] >> shift).astype(np.uint16)
        order = order[np.argsort(digit, kind="stable")]
    return order


def dense_section(v: Values, s: Settings, scan: Scan, classes: Classes | None) -> Draft:
    """A symbol per entry, zero among them in its place by value."""
    assert v.book is not None
    zero = len(v.positions) < len(v.bits)
    alphabet = len(v.book) + zero
    draft = _head(DENSE | scan.flags | (ZERO if zero else 0), v, classes, s)
    if alphabet < 2:
        return draft
    kind = symbol_dtype(alphabet)
    names = np.arange(len(v.book), dtype=kind)  # the symbol of each code
    if zero:
        names[v.negatives :] += kind.type(1)
    for part in scan.parts(classes):
        counts = np.zeros(alphabet, np.int64)
        counts[names] = histogram(part.entries, len(v.book))
        if zero:
            counts[v.negatives] = part.size - len(part.positions)
        draft.later(counts, partial(_filled, part, names, v.negatives))
    return draft


def _filled(part: Part, names: Bits, zero: int) -> Bits:
    """The symbols of all entries of a part."""
    if len(part.positions) == part.size:
        return names[part.entries]
    out = np.full(part.size, zero, names.dtype)
    out[part.positions] = names[part.entries]
    return out


def gaps_section(v: Values, s: Settings, scan: Scan, classes: Classes | None) -> Draft:
    """Positions as gaps of a wide alphabet with an escape."""
    draft = _sparse_head(GAPS, v, s, scan, classes)
    for part in scan.parts(classes):
        if len(part.positions):
            gaps = to_gaps(part.positions)
            draft.add(varint(len(gaps) - len(part.positions)))
            draft.code(gaps, 256)
    return _with_entries(draft, v, s, scan, classes)


def bitmap_section(v: Values, s: Settings, scan: Scan, classes: Classes | None) -> Draft:
    """Positions as a bitmap, eight entries a symbol."""
    draft = _sparse_head(BITMAP, v, s, scan, classes)
    for part in scan.parts(classes):
        if len(part.positions):
            bitmap = np.zeros(part.size, bool)
            bitmap[part.positions] = True
            draft.code(to_bitmap(bitmap), 256)
    return _with_entries(draft, v, s, scan, classes)


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
    draft = Draft(s.coders, s.slack)
    draft.code(gaps, 1 << s.index_bits)
    draft.code(codes, len(v.book) + 1)
    return out + bytes(draft)


def seeded_section(seed: Seed, mask: bytes) -> bytes:
    """A seed in place of values; ``mask`` is the section of the bool tensor of what is kept."""
    form = SCHEMES.index(seed.scheme) | (FACTOR if seed.factor != 1.0 else 0)
    out = bytes([SEEDED, form]) + seed.seed.to_bytes(8, "little") + varint(seed.stream)
    out += np.array([seed.scale, seed.factor][: 1 + bool(form & FACTOR)], "<f4").tobytes()
    return out + mask


def scaled_section(scales: Scales, codes: bytes) -> bytes:
    """Scales, and ``codes``, the section of the integers that they multiply."""
    return bytes([FURTHER]) + varint(SCALED - FURTHER) + bytes(scales) + codes


def _head(layout: int, v: Values, classes: Classes | None, s: Settings) -> Draft:
    draft = Draft(s.coders, s.slack)
    layout |= 0 if classes is None else CLASSES
    draft.add(bytes([layout]) + varint(len(v.positions)))
    if v.book is not None:
        draft.add(encode_book(v.book, v.dtype))
    if classes is not None:
        count = int(classes.max()) + 1
        draft.add(bytes([count]))
        draft.code(classes, count)
    return draft


def _sparse_head(layout: int, v: Values, s: Settings, scan: Scan, classes: Classes | None) -> Draft:
    """What comes before the positions."""
    flags = scan.flags | (RAW_VALUES if v.book is None else 0)
    draft = _head(layout | flags, v, classes, s)
    for part in scan.parts(classes)[:-1]:
        draft.add(varint(len(part.positions)))
    return draft


def _with_entries(
    draft: Draft, v: Values, s: Settings, scan: Scan, classes: Classes | None
) -> Draft:
    """The values behind the positions, in the same order."""
    entries = np.concatenate([part.entries for part in scan.parts(classes)])
    if v.book is None:
        draft.add(encode_raw(entries, v.dtype, level=s.level))
    elif len(v.book) > 1:
        draft.code(entries, len(v.book))
    return draft
