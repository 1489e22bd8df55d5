"""Section bytes to bit patterns: the plain numpy decoder of every layout."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from gossamer.core.errors import FormatError
from gossamer.core.seeds import Seed, fill
from gossamer.pack.coders import context
from gossamer.pack.coders.bits import look_up, pieces
from gossamer.pack.coders.gaps import bitmap_runs, fixed_runs, gap_runs
from gossamer.pack.coders.limits import VERSION, Allowance, Reader
from gossamer.pack.format.lzma_bytes import decode_lzma
from gossamer.pack.format.raw import decode_raw
from gossamer.pack.format.scales import CODES, Scales, scaled
from gossamer.pack.format.section import (
    BITMAP,
    CONTEXT,
    DENSE,
    LZMA,
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
from gossamer.pack.format.values import BY_TORCH, Bits, DType
from gossamer.pack.read.fused import can_fuse, expand_fused

__all__ = ["decode_parsed", "decode_section", "expand"]

_AT_ONCE = 1 << 16  # entries moved at once where numpy indexes them, eight bytes each


def decode_section(
    data: bytes | memoryview,
    dtype: DType,
    shape: tuple[int, ...],
    numel: int,
    where: str,
    out: Bits | None = None,
    *,
    allowed: Callable[[int], bool] | None = None,
    version: int = VERSION,
) -> Bits:
    """The flat bit patterns of a tensor, C order; :class:`FormatError` for anything odd.

    Args:
        data: the section's payload.
        dtype: of the tensor.
        shape: of the tensor.
        numel: its elements.
        where: file and tensor, for messages.
        out: written and returned, if given: flat, contiguous bit patterns.
        allowed: whether the context coder may cost so much work (:func:`context.work`) beyond what
            the section's bytes pay for; by default what one :class:`Allowance` allows.
        version: of the file.
    """
    reader = Reader(data, where, version)
    section = parse(reader, dtype, shape, numel)
    return decode_parsed(reader, section, dtype, shape, out, allowed=allowed)


def decode_parsed(
    reader: Reader,
    section: Section,
    dtype: DType,
    shape: tuple[int, ...],
    out: Bits | None = None,
    *,
    allowed: Callable[[int], bool] | None = None,
) -> Bits:
    """:func:`decode_section` of a section that was taken apart."""
    numel = math.prod(shape)
    if section.layout == CONTEXT:
        _check_work(reader, section, dtype.size, allowed or Allowance().take)
    if section.seed is not None:
        return _seeded(reader, section, section.seed, numel, out)
    if section.scales is not None:
        return _scaled(reader, section, section.scales, dtype, shape, out)
    if can_fuse(section, dtype):
        target = np.empty(numel, dtype.bits) if out is None else out
        expand_fused(reader, section, dtype, target)
        return target
    bits = expand(reader, section, dtype, numel)
    if out is None:
        return bits
    out[:] = bits
    return out


def _check_work(
    reader: Reader, section: Section, itemsize: int, allowed: Callable[[int], bool]
) -> None:
    """Before the context coder is begun."""
    rows, cols = section.shape
    largest, size = context.largest_of(Reader(section.raw, reader.where)), len(reader.data)
    work = context.work((rows, cols), sum(section.kept), largest, itemsize)
    unpaid = context.unpaid(work, size)
    if unpaid and not allowed(unpaid):
        raise FormatError(
            f"{reader.where}: {rows * cols} entries by the context coder in {size} bytes are too "
            "many to be decoded unasked, for they take seconds a million; if you trust the file "
            "(one of an older version may hold such), pass max_bytes="
        )


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


def _scaled(
    reader: Reader,
    section: Section,
    scales: Scales,
    dtype: DType,
    shape: tuple[int, ...],
    out: Bits | None,
) -> Bits:
    """The codes times their scales."""
    numel = math.prod(shape)
    codes = expand(reader, section, scales.codes, numel)
    if scales.codes.kind == "float" and not np.isfinite(codes.view(CODES[scales.codes.code])).all():
        raise reader.fail("a code is not finite")
    bits = np.empty(numel, dtype.bits) if out is None else out
    scaled(scales, codes, dtype, shape, bits)
    return bits


def expand(reader: Reader, section: Section, dtype: DType, numel: int) -> Bits:
    """Decode a parsed section in numpy; ``reader`` only names the place in errors."""
    if section.layout == RAW:
        inner = Reader(section.raw, reader.where)
        bits = decode_raw(inner, dtype, numel)
        inner.done()
        return bits
    if section.layout == LZMA:
        return decode_lzma(section.raw, dtype, numel, reader)
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
    flat = _parts(reader, section, dtype, rows * cols)
    if section.classes is not None:
        flat = _mixed(flat, section, section.classes)
    if section.layout == DENSE and section.flags & ZERO:
        _check_kept(reader, section, int(np.count_nonzero(flat)))
    if section.flags & TRANSPOSED:
        flat = np.ascontiguousarray(flat.reshape(rows, cols).T).reshape(-1)
    return flat


def _parts(reader: Reader, section: Section, dtype: DType, size: int) -> Bits:
    """The classes one after the other, each a matrix of its own."""
    if section.layout == DENSE and section.classes is None:
        return _dense(reader, section, section.positions[0], dtype, size)
    out = np.zeros(size, dtype.bits)
    values = None if section.layout == DENSE else _values(reader, section, dtype)
    sizes = [section.shape[0] * w for w in section.widths] or [size]
    used = at = 0
    for part, stream, kept in zip(
        sizes, section.positions, section.kept if values is not None else sizes, strict=True
    ):
        target = out[at : at + part]
        if values is None:
            target[:] = _dense(reader, section, stream, dtype, part)
        elif stream is not None:
            _fill(reader, section, stream, target, values[used : used + kept])
        used, at = used + kept, at + part
    return out


def _mixed(flat: Bits, section: Section, classes: NDArray[np.unsignedinteger]) -> Bits:
    """The columns of all classes in their own order, some columns at a time."""
    rows, cols = section.shape
    out = np.empty((rows, cols), flat.dtype)
    step = max(1, _AT_ONCE // max(1, rows))
    at = 0
    for number, width in enumerate(section.widths):
        part = flat[at : at + rows * width].reshape(rows, width)
        used = 0
        for start in range(0, cols if width else 0, step):
            member = np.flatnonzero(classes[start : start + step] == number)
            out[:, start + member] = part[:, used : used + len(member)]
            used += len(member)
        at += rows * width
    return out.reshape(-1)


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
    return look_up(book, symbols(reader, stream, "symbols"))


def _fill(reader: Reader, section: Section, stream: Stream, out: Bits, values: Bits) -> None:
    """Put the values where the positions say."""
    coded = symbols(reader, stream, "positions")
    runs = bitmap_runs if section.layout == BITMAP else gap_runs
    try:
        for first, place in runs(coded, len(values), len(out)):
            out[place] = values[first : first + len(place)]
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
    if section.codes is None:  # one value, which takes no memory of its own
        return np.broadcast_to(section.book[:1] if total else np.zeros(0, dtype.bits), total)
    return look_up(section.book, symbols(reader, section.codes, "codes"))


def _paper(reader: Reader, section: Section, dtype: DType, numel: int) -> Bits:
    gaps_stream, codes_stream = section.positions[0], section.codes
    assert gaps_stream is not None
    assert codes_stream is not None
    assert section.book is not None
    gaps = symbols(reader, gaps_stream, "gaps")
    codes = symbols(reader, codes_stream, "codes")
    book = np.insert(section.book, 0, 0)
    bits = np.zeros(numel, dtype.bits)
    try:
        for first, place in fixed_runs(gaps, numel):
            bits[place] = book[codes[first : first + len(place)]]
    except FormatError as e:
        raise FormatError(f"{reader.where}: {e}") from None
    _check_kept(reader, section, int(np.count_nonzero(codes)))
    return bits


def _context(reader: Reader, section: Section, dtype: DType) -> Bits:
    book = section.book
    assert book is not None
    below = dtype.negatives(book)
    if context.largest_of(Reader(section.raw, reader.where)) > max(1, len(book)):
        raise reader.fail(f"the largest rank lies outside the code book of {len(book)} values")
    try:
        ranks = context.decode(bytes(section.raw), *section.shape).reshape(-1)
    except FormatError as e:
        raise FormatError(f"{reader.where}: {e}") from None
    if ranks.size and (ranks.min() < -below or ranks.max() > len(book) - below):
        raise reader.fail(f"a rank lies outside the code book of {len(book)} values")
    book = np.insert(book, below, 0)
    bits = np.empty(len(ranks), dtype.bits)
    for start, part in pieces(ranks):
        bits[start : start + len(part)] = book[part + np.int64(below)]
    _check_kept(reader, section, int(np.count_nonzero(bits)))
    return bits
