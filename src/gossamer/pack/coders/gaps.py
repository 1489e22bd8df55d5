"""Positions of non-zeros as gaps, and as bitmaps.

Two codings of gaps:

- wide: a symbol 0 to 254 is that many zeros and then a non-zero; 255 is 255 zeros, and the gap
  goes on. One symbol per non-zero, and an escape for each 255 zeros in a row.
- fixed (Han et al., "Deep Compression", ICLR 2016, section 2): ``b``-bit gaps, where a gap that
  does not fit is cut by a *filler*: an entry that stores the value 0 after ``2**b - 1`` zeros.

Both are in order of position; a column scan is the caller's transposition. Zeros after the last
non-zero are not coded: the number of entries and of non-zeros is known from outside.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack.coders.bits import Symbols, pieces, symbol_dtype

__all__ = [
    "ESCAPE",
    "bitmap_runs",
    "fixed_gaps",
    "fixed_positions",
    "fixed_runs",
    "from_bitmap",
    "from_gaps",
    "gap_runs",
    "mask_gaps",
    "to_bitmap",
    "to_gaps",
]

ESCAPE = 255
"""The wide gap symbol that continues a gap."""


def _between(positions: NDArray[np.integer]) -> NDArray[np.int64]:
    """Zeros before each position; the positions are checked."""
    if positions.ndim != 1:
        raise ArgumentError(f"positions must be 1-D, got shape {positions.shape}")
    gaps: NDArray[np.int64] = np.diff(positions, prepend=-1).astype(np.int64, copy=False)
    gaps -= 1
    if len(gaps) and int(gaps.min()) < 0:
        raise ArgumentError("positions must ascend strictly from 0 or more; sort them first")
    return gaps


def to_gaps(positions: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Wide gap symbols of strictly ascending ``positions``.

    >>> to_gaps(np.array([3, 4, 300])).tolist()
    [3, 0, 255, 40]
    """
    gaps = _between(positions)
    if not len(gaps) or int(gaps.max()) < ESCAPE:
        return gaps.astype(np.uint8)
    escapes = gaps // ESCAPE
    ends = np.cumsum(escapes + 1)
    out = np.full(int(ends[-1]), ESCAPE, np.uint8)
    out[ends - 1] = gaps % ESCAPE
    return out


def mask_gaps(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Wide gap symbols of a mask of any shape, in C order."""
    return to_gaps(np.flatnonzero(mask))


def from_gaps(symbols: NDArray[np.uint8], count: int, size: int) -> NDArray[np.int64]:
    """The positions of ``count`` non-zeros among ``size`` entries.

    Raises :class:`FormatError` when ``symbols`` do not give exactly those.
    """
    return _whole(gap_runs(symbols, count, size))


def gap_runs(
    symbols: NDArray[np.uint8], count: int, size: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """:func:`from_gaps` piece by piece, for eight bytes a position are a lot.

    Yields the number of the first non-zero of a piece, and where its non-zeros are.
    """
    if len(symbols) and symbols[-1] == ESCAPE:
        raise FormatError("gaps end in an escape")
    total = sum(int(np.count_nonzero(part != ESCAPE)) for _, part in pieces(symbols))
    if total != count:
        raise FormatError(f"gaps of {total} non-zeros, {count} are declared")
    found, at = 0, -1
    for _, part in pieces(symbols):
        ends = part != ESCAPE
        steps = part.astype(np.int64)
        steps += ends
        np.cumsum(steps, out=steps)
        steps += at
        at = int(steps[-1])
        positions = steps[ends]
        _check_within("gaps lead", positions, size)
        yield found, positions
        found += len(positions)


def _whole(runs: Iterator[tuple[int, NDArray[np.int64]]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *(positions for _, positions in runs)])


def _check_within(what: str, positions: NDArray[np.int64], size: int) -> None:
    if len(positions) and int(positions[-1]) >= size:
        raise FormatError(f"{what} to entry {positions[-1]} of {size}")


def fixed_gaps(positions: NDArray[np.integer], bits: int) -> tuple[Symbols, NDArray[np.int64]]:
    """Deep Compression's gaps of ``bits`` bits, fillers included.

    Returns the gaps, and which of them are fillers (ascending indices into the gaps). A filler
    has gap ``2**bits - 1``; so may a non-zero.

    >>> gaps, fillers = fixed_gaps(np.array([1, 4, 15]), bits=3)
    >>> gaps.tolist(), fillers.tolist()
    ([1, 2, 7, 2], [2])
    """
    _check_index_bits(bits)
    gaps = _between(positions)
    widest = (1 << bits) - 1
    # A filler covers `widest` zeros and the entry it sits on.
    fillers = gaps // (widest + 1)
    ends = np.cumsum(fillers + 1)
    out = np.full(int(ends[-1]) if len(ends) else 0, widest, symbol_dtype(1 << bits))
    out[ends - 1] = gaps - fillers * (widest + 1)
    real = np.zeros(len(out), np.bool_)
    real[ends - 1] = True
    return out, np.flatnonzero(~real)


def fixed_positions(gaps: Symbols, size: int) -> NDArray[np.int64]:
    """Where the entries of fixed gaps are, fillers included; :class:`FormatError` beyond
    ``size``."""
    return _whole(fixed_runs(gaps, size))


def fixed_runs(gaps: Symbols, size: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """:func:`fixed_positions` piece by piece, as of :func:`gap_runs`."""
    at = -1
    for start, part in pieces(gaps):
        positions = part.astype(np.int64)
        positions += 1
        np.cumsum(positions, out=positions)
        positions += at
        at = int(positions[-1])
        _check_within("gaps lead", positions, size)
        yield start, positions


def _check_index_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ArgumentError(f"index bits must be 1 to 16, got {bits}")


def to_bitmap(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A mask of any shape as ``ceil(size / 8)`` bytes, C order, low bits first."""
    return np.packbits(mask.reshape(-1), bitorder="little")


def from_bitmap(symbols: NDArray[np.uint8], count: int, size: int) -> NDArray[np.int64]:
    """The positions of the ``count`` bits set among ``size``; :class:`FormatError` for another
    number of bits or of bytes, or bits set beyond ``size``."""
    return _whole(bitmap_runs(symbols, count, size))


def bitmap_runs(
    symbols: NDArray[np.uint8], count: int, size: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """:func:`from_bitmap` piece by piece, as of :func:`gap_runs`."""
    if len(symbols) != (size + 7) // 8:
        raise FormatError(f"a bitmap of {size} entries in {len(symbols)} bytes")
    total = sum(int(np.count_nonzero(np.unpackbits(part))) for _, part in pieces(symbols))
    if total != count:
        raise FormatError(f"a bitmap of {total} non-zeros, {count} are declared")
    found = 0
    for start, part in pieces(symbols):
        positions = np.flatnonzero(np.unpackbits(part, bitorder="little")) + 8 * start
        _check_within("a bitmap leads", positions, size)
        yield found, positions
        found += len(positions)
