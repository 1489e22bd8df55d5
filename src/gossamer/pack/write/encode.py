"""Choose the coding of one tensor.

Sizes are first estimated. The most promising layouts are drafted, which tells their sizes nearly
to the byte; only those that may be the smallest are written, and the smallest wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from gossamer.core.kernels import kernel
from gossamer.pack.coders import context
from gossamer.pack.coders.bits import histogram
from gossamer.pack.coders.gaps import to_bitmap, to_gaps
from gossamer.pack.coders.limits import varint
from gossamer.pack.coders.table import CODERS, RANS, entropy_bytes
from gossamer.pack.format.book import encode_book
from gossamer.pack.format.lzma_bytes import encode_lzma
from gossamer.pack.format.raw import compress, encode_raw
from gossamer.pack.format.scales import scaled
from gossamer.pack.format.section import FURTHER, LZMA, RAW
from gossamer.pack.format.values import Bits, DType, Values, analyse
from gossamer.pack.write.classes import column_classes
from gossamer.pack.write.draft import SMALL, Draft, near
from gossamer.pack.write.layouts import (
    Classes,
    Scan,
    Settings,
    bitmap_section,
    context_section,
    dense_section,
    gaps_section,
    paper_section,
    row_scan,
    scaled_section,
    transposed,
)
from gossamer.pack.write.scales import find_scales

__all__ = ["context_bytes", "encode_section"]

_SAMPLED = 512  # rows and columns looked at to compare the scans of a large tensor
_MANY = 1 << 18  # non-zeros from which a sample must do
_SURE = 1 << 17  # entries up to which the context coder is tried without a look at a sample
_PART = 1 << 14  # entries of the sample
_LEARNING = 1.1
_WINDOW = 1 << 20  # bytes of the part that zstd looks at, for repeats across rows
_FEW = 16  # values of a tensor that one code book serves as well as one for each row
_LENGTHS = 8  # bytes of lengths and counts in a section, about


@dataclass(frozen=True)
class _Plan:
    estimate: float
    draft: Callable[[], Draft]


def encode_section(bits: Bits, dtype: DType, shape: tuple[int, ...], s: Settings) -> bytes:
    """The smallest section found for a tensor's flat bit patterns."""
    if len(bits) == 0:
        return _raw_section(bits, dtype, s)
    values = analyse(bits, dtype, shape)
    if s.paper:
        return paper_section(values, s)
    plans = sorted(_plans(values, s), key=lambda plan: plan.estimate)
    small, best = len(bits) <= SMALL, plans[0].estimate
    most = best + abs(best) * s.slack + 64  # what classes save may be estimated as more than all
    drafts = [plan.draft() for plan in plans if small or plan.estimate <= most]
    edge = near(min(draft.size for draft in drafts))
    built = [bytes(draft) for draft in drafts if small or draft.size <= edge]
    tried = len(bits) <= s.context and kernel("context") is not None
    book = values.book
    found = _scaled(values, s, min(map(len, built))) if s.scales else None
    if found is not None and len(found) * (1 + s.gain) < min(map(len, built)):
        return found  # the values' own structure is the codes', which were tried every way
    if tried and book is not None and len(book) and _context_pays(values, min(map(len, built))):
        section = context_section(values)
        grid = (values.rows, values.cols)
        work = context.work(grid, len(values.positions), len(book), dtype.size)
        if not context.unpaid(work, len(section)):  # what a reader decodes unasked
            built.append(section)
    if s.lzma and _lzma_pays(bits, dtype, min(map(len, built))):
        head = bytes([FURTHER]) + varint(LZMA - FURTHER)
        built.append(head + encode_lzma(bits.tobytes(), dtype.size))
    return min(built, key=len)


def _scaled(v: Values, s: Settings, least: int) -> bytes | None:
    """Codes apart from the scales of their rows or groups, where that may take less than ``least``.

    One scale for all is the code book's affair.
    """
    if v.book is not None and len(v.book) <= _FEW:
        return None
    found = find_scales(v.bits, v.dtype, v.shape)
    if found is None or not np.ptp(found[0].values):
        return None
    scales, codes = found
    counts = np.unique(codes, return_counts=True)[1]
    if entropy_bytes(counts) + scales.values.size > least:  # a byte each at the very least
        return None
    made = np.empty_like(v.bits)
    scaled(scales, codes, v.dtype, v.shape, made)
    if not np.array_equal(made, v.bits):
        return None
    inner = encode_section(codes, scales.codes, v.shape, replace(s, scales=False))
    return scaled_section(scales, inner)


def context_bytes(bits: Bits, dtype: DType, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor of few values by the context coder alone, in milliseconds.

    It is the smallest for nearly all of them. None where there are too many values or no kernel.
    """
    if not len(bits) or kernel("context") is None:
        return None
    values = analyse(bits, dtype, shape)
    return None if values.book is None or not len(values.book) else len(context_section(values))


def _lzma_pays(bits: Bits, dtype: DType, least: int) -> bool:
    """Whether LZMA may beat ``least`` bytes: whether rows repeat, which no other layout sees.

    zstd's fastest level looks at a part: without repeats it needs a tenth to three times more than
    what was found (weights pruned, shared or neither), and where it comes near, LZMA gets below.
    """
    most = _WINDOW // dtype.size
    start = max(0, len(bits) - most) // 2
    part = bits[start : start + most]
    return len(compress(part.tobytes(), 1)) < 1.05 * least * len(part) / len(bits)


def _context_pays(v: Values, least: int) -> bool:
    """Whether the context coder, some ten microseconds an entry, may beat ``least`` bytes.

    Large tensors: it codes some whole rows from four places, and their order-0 entropy, which is
    what the other layouts reach at best without positions of their own, is what it has to come
    near. Learning costs it up to a few per cent of such a sample.
    """
    if len(v.bits) <= _SURE or v.book is None:
        return True
    if len(encode_book(v.book, v.dtype)) >= least:
        return False
    rows = max(1, _PART // (4 * v.cols))
    if 8 * rows > v.rows:
        return True
    grid = v.bits.reshape(v.rows, v.cols)
    starts = [i * (v.rows - rows) // 3 for i in range(4)]
    part = np.ascontiguousarray(np.concatenate([grid[i : i + rows] for i in starts])).reshape(-1)
    some = analyse(part, v.dtype, (4 * rows, v.cols))
    if some.book is None or some.counts is None or not len(some.book):
        return True
    zeros = len(part) - len(some.positions)
    counts = np.append(some.counts, zeros) if zeros else some.counts
    coded = len(context_section(some)) - len(encode_book(some.book, some.dtype))
    return coded <= _LEARNING * entropy_bytes(counts) + 64


def _raw_section(bits: Bits, dtype: DType, s: Settings) -> bytes:
    return bytes([RAW]) + encode_raw(bits, dtype, level=s.level)


def _raw_draft(bits: Bits, dtype: DType, s: Settings) -> Draft:
    return Draft(s.coders, s.slack, [_raw_section(bits, dtype, s)])


def _plans(v: Values, s: Settings) -> Iterator[_Plan]:
    """Every candidate with its estimated bytes."""
    raw = _raw_estimate(v.bits, v.dtype)
    yield _Plan(raw, partial(_raw_draft, v.bits, v.dtype, s))
    kept, size = len(v.positions), len(v.bits)
    if v.counts is not None and v.book is not None:
        book = float(len(encode_book(v.book, v.dtype)))
        symbols = np.insert(v.counts, v.negatives, size - kept) if kept < size else v.counts
        cost = book + (_least(symbols, s) if len(symbols) > 1 else 0.0)
        if 2 * kept < size:  # all those zeros take time to decode
            cost *= 1 + s.gain
        yield _Plan(cost + _LENGTHS / 2, partial(dense_section, v, s, row_scan(v), None))
        fixed = book + (_least(v.counts, s) if len(v.counts) > 1 else 0.0)
    else:
        fixed = raw * kept / size
    if 0 < kept < (size if v.book is not None else 0.98 * size):
        yield from _sparse_plans(v, s, fixed + _LENGTHS)


def _sparse_plans(v: Values, s: Settings, fixed: float) -> Iterator[_Plan]:
    """Positions apart from values: ``fixed`` bytes besides the positions."""
    row = row_scan(v)
    gaps = _least(histogram(to_gaps(row.positions), 256), s)
    slow = s.gain * (fixed + gaps)
    yield _Plan(fixed + gaps, partial(gaps_section, v, s, row, None))
    bitmaps = len(v.positions) > len(v.bits) / 64
    if bitmaps:
        cost = _least(histogram(to_bitmap(v.bits != 0), 256), s)
        yield _Plan(fixed + cost + slow, partial(bitmap_section, v, s, row, None))
    if v.rows < 2 or v.cols < 2:
        return
    column = cache(lambda: transposed(row))
    by_column = gaps * _column_ratio(v, row, column)
    if by_column + slow < gaps:
        yield _Plan(fixed + by_column + slow, partial(_scanned, gaps_section, v, s, column, None))
    for turned, scan in ((False, lambda: row), (True, column)):
        rows, cols = (v.cols, v.rows) if turned else (v.rows, v.cols)
        line = v.positions // v.cols if turned else v.positions % v.cols
        found = column_classes(np.bincount(line, minlength=cols), rows)
        if found is None or found[1] <= slow:
            continue
        classes, saved = found
        cost = fixed + gaps - saved + slow
        for section in (gaps_section, bitmap_section)[: 1 + bitmaps]:
            yield _Plan(cost, partial(_scanned, section, v, s, scan, classes))
        if v.book is not None and len(v.book) < 64:
            yield _Plan(cost + slow, partial(_scanned, dense_section, v, s, scan, classes))


def _scanned(
    section: Callable[[Values, Settings, Scan, Classes | None], Draft],
    v: Values,
    s: Settings,
    scan: Callable[[], Scan],
    classes: Classes | None,
) -> Draft:
    """The scan is made only for a plan that is drafted."""
    return section(v, s, scan(), classes)


def _least(counts: NDArray[np.integer], s: Settings) -> float:
    return min(CODERS[c].estimate(counts) for c in s.coders)


def _raw_estimate(bits: Bits, dtype: DType) -> float:
    """Bytes of :func:`encode_raw`, from the entropy of the byte planes of a sample."""
    sample = np.ascontiguousarray(bits[:: max(1, len(bits) >> 16)])
    if dtype.kind == "float":
        one, top = bits.dtype.type(1), bits.dtype.type(8 * dtype.size - 1)
        sample = sample << one | sample >> top
    cost = 0.0
    for plane in sample.view(np.uint8).reshape(-1, dtype.size).T:
        counts = np.bincount(plane, minlength=256)
        cost += min(entropy_bytes(counts) + np.count_nonzero(counts) + 4, len(plane))
    return cost * len(bits) / len(sample) + 1


def _column_ratio(v: Values, row: Scan, column: Callable[[], Scan]) -> float:
    """Bytes of the gaps in column order over those in row order; from a sample if many."""
    if len(v.positions) <= _MANY:
        histograms = [histogram(to_gaps(p), 256) for p in (column().positions, row.positions)]
        down, across = (CODERS[RANS].estimate(h) for h in histograms)
    else:
        grid = v.bits.reshape(v.rows, v.cols)
        some_columns = grid[:, :: max(1, v.cols // _SAMPLED)] != 0
        some_rows = grid[:: max(1, v.rows // _SAMPLED)] != 0
        rates = []
        for part in (np.ascontiguousarray(some_columns.T), some_rows):
            positions = np.flatnonzero(part)
            counts = histogram(to_gaps(positions), 256)
            rates.append(CODERS[RANS].estimate(counts) / max(1, len(positions)))
        down, across = rates
    return down / across if across > 0 else 1.0
