"""Section bytes to bit patterns: the plain numpy decoder of every layout."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gossamer.errors import FormatError
from gossamer.pack import context
from gossamer.pack.fused import can_fuse, expand_fused
from gossamer.pack.gaps import fixed_positions, from_bitmap, from_gaps
from gossamer.pack.limits import Reader
from gossamer.pack.raw import decode_raw
from gossamer.pack.section import (
    BITMAP,
    CONTEXT,
    DENSE,
    PAPER,
    RAW,
    RAW_VALUES,
    TRANSPOSED,
    ZERO,
    Section,
    Stream,
    parse,
    symbols,
)
from gossamer.pack.values import BY_TORCH, Bits, DType
from gossamer.seeded import Seed, fill

__all__ = ["decode_section", "expand"]


def decode_section(
    data: bytes | memoryview,
    dtype: DType,
    shape: tuple[int, ...],
    numel: int,
    where: str,
    out: Bits | None = None,
) -> Bits:
    """The flat bit patterns of a tensor, C order; :class:`FormatError` for anything odd.

    Args:
        data: the section's payload.
        dtype: of the tensor.
        shape: of the tensor.
        numel: its elements.
        where: file and tensor, for messages.
        out: written and returned, if given: flat, contiguous bit patterns.
    """
    reader = Reader(data, where)
    section = parse(reader, dtype, shape, numel)
    if section.seed is not None:
        return _seeded(reader, section, section.seed, numel, out)
    if can_fuse(section, dtype):
        target = np.empty(numel, dtype.bits) if out is None else out
        expand_fused(reader, section, dtype, target)
        return target
    bits = expand(reader, section, dtype, numel)
    if out is None:
        return bits
    out[:] = bits
    return out


def _seeded(reader: Reader, section: Section, seed: Seed, numel: int, out: Bits | None) -> Bits:
    """The seed's values where the mask is set."""
    mask = expand(reader, section, BY_TORCH[torch.bool], numel)
    if mask.size and mask.max() > 1:
        raise reader.fail(f"a mask holds the byte {mask.max()}")
    values = np.empty(numel, np.float32) if out is None else out.view(np.float32)
    fill(seed, values)
    bits = values.view(np.uint32)
    bits[mask == 0] = 0
    return bits


def expand(reader: Reader, section: Section, dtype: DType, numel: int) -> Bits:
    """Decode a parsed section in numpy; ``reader`` only names the place in errors."""
    if section.layout == RAW:
        inner = Reader(section.raw, reader.where)
        bits = decode_raw(inner, dtype, numel)
        inner.done()
        return bits
    if section.layout == CONTEXT:
        bits = _context(reader, section, dtype)
    elif section.layout == PAPER:
        bits = _paper(reader, section, dtype, numel)
    else:
        bits = _matrix(reader, section, dtype)
    return bits


def _matrix(reader: Reader, section: Section, dtype: DType) -> Bits:
    """Dense, gaps and bitmap: one part per column class, put together."""
    rows, cols = section.shape
    values = None if section.layout == DENSE else _values(reader, section, dtype)
    out = np.zeros((rows, cols), dtype.bits)
    used = 0
    for i, (member, stream) in enumerate(zip(section.members, section.positions, strict=True)):
        size = rows * (cols if member is None else len(member))
        if values is None:
            part = _dense(reader, section, stream, dtype, size)
        else:
            kept = section.kept[i]
            part = np.zeros(size, dtype.bits)
            if stream is not None:
                place = _places(reader, section, stream, kept, size)
                part[place] = values[used : used + kept]
            used += kept
        if member is None:
            out = part.reshape(rows, cols)
        else:
            out[:, member] = part.reshape(rows, len(member))
    if section.layout == DENSE and section.flags & ZERO:
        _check_kept(reader, section, int(np.count_nonzero(out)))
    return (
        np.ascontiguousarray(out.T).reshape(-1) if section.flags & TRANSPOSED else out.reshape(-1)
    )


def _check_kept(reader: Reader, section: Section, found: int) -> None:
    if found != sum(section.kept):
        raise reader.fail(f"{found} non-zero entries, {sum(section.kept)} are declared")


def _dense(
    reader: Reader, section: Section, stream: Stream | None, dtype: DType, size: int
) -> Bits:
    book = section.book
    assert book is not None
    if section.flags & ZERO:
        book = np.insert(book, dtype.negatives(book), 0)
    if stream is None:
        return np.full(size, book[0], dtype.bits)
    return book[symbols(reader, stream, "symbols")]


def _places(
    reader: Reader, section: Section, stream: Stream, kept: int, size: int
) -> NDArray[np.integer]:
    coded = symbols(reader, stream, "positions")
    try:
        if section.layout == BITMAP:
            return from_bitmap(coded, kept, size)
        return from_gaps(coded, kept, size)
    except FormatError as e:
        raise FormatError(f"{reader.where}: {e}") from None


def _values(reader: Reader, section: Section, dtype: DType) -> Bits:
    total = sum(section.kept)
    if section.flags & RAW_VALUES:
        inner = Reader(section.raw, reader.where)
        bits = decode_raw(inner, dtype, total)
        inner.done()
        if not bits.all():
            raise reader.fail("a stored non-zero value is zero")
        return bits
    assert section.book is not None
    if section.codes is None:
        return np.full(total, section.book[0] if total else 0, dtype.bits)
    return section.book[symbols(reader, section.codes, "codes")]


def _paper(reader: Reader, section: Section, dtype: DType, numel: int) -> Bits:
    gaps_stream, codes_stream = section.positions[0], section.codes
    assert gaps_stream is not None
    assert codes_stream is not None
    assert section.book is not None
    gaps = symbols(reader, gaps_stream, "gaps")
    codes = symbols(reader, codes_stream, "codes")
    try:
        place = fixed_positions(gaps, numel)
    except FormatError as e:
        raise FormatError(f"{reader.where}: {e}") from None
    _check_kept(reader, section, int(np.count_nonzero(codes)))
    bits = np.zeros(numel, dtype.bits)
    bits[place] = np.insert(section.book, 0, 0)[codes]
    return bits


def _context(reader: Reader, section: Section, dtype: DType) -> Bits:
    book = section.book
    assert book is not None
    below = dtype.negatives(book)
    try:
        ranks = context.decode(bytes(section.raw), *section.shape).reshape(-1)
    except FormatError as e:
        raise FormatError(f"{reader.where}: {e}") from None
    if ranks.size and (ranks.min() < -below or ranks.max() > len(book) - below):
        raise reader.fail(f"a rank lies outside the code book of {len(book)} values")
    bits = np.insert(book, below, 0)[ranks.astype(np.int64) + below]
    _check_kept(reader, section, int(np.count_nonzero(bits)))
    return bits
