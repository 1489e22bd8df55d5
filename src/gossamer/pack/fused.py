"""Entropy-coded streams straight into a resident array, without an array of symbols between.

Only the layouts made for fast decoding come this way (row order, one class, at most 256 values of
four bytes); everything else, and everything without the compiled kernel, goes through
:mod:`gossamer.pack.decode`. Both give the same bits and refuse the same streams.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import FormatError
from gossamer.pack.ans import Stream as RansStream
from gossamer.pack.ans import parse
from gossamer.pack.coders import RANS
from gossamer.pack.limits import Reader
from gossamer.pack.native import kernel
from gossamer.pack.section import (
    CLASSES,
    DENSE,
    GAPS,
    RAW_VALUES,
    TRANSPOSED,
    ZERO,
    Section,
    Stream,
    symbols,
)
from gossamer.pack.values import Bits, DType

__all__ = ["expand_fused"]


class _Feed(NamedTuple):
    """A stream as the kernel takes it: coded with frequencies, or plain symbols without."""

    data: memoryview | NDArray[np.uint8]
    frequencies: NDArray[np.uint32] | None
    bits: int
    lanes: int


def expand_fused(reader: Reader, section: Section, dtype: DType, out: Bits) -> bool:
    """Decode into ``out`` (flat, contiguous, the dtype's bit patterns) if that can be done fused.

    Returns whether it was. Raises :class:`FormatError` for a damaged stream, after which ``out``
    may be written in part.
    """
    native = kernel("entropy")
    book = section.book
    if native is None or dtype.size != 4 or book is None:
        return False
    if section.layout not in (GAPS, DENSE) or section.flags & (TRANSPOSED | CLASSES | RAW_VALUES):
        return False
    if section.layout == DENSE and section.flags & ZERO:
        book = np.insert(book, dtype.negatives(book), 0)
    stream = section.positions[0]
    if stream is None or len(book) > 256:
        return False
    try:
        _run(native, reader, section, stream, book.view(np.float32), out.view(np.float32))
    except (ValueError, FormatError) as e:
        raise FormatError(f"{reader.where}: {e}") from None
    if section.layout == DENSE and section.flags & ZERO:
        found = int(np.count_nonzero(out))
        if found != section.kept[0]:
            raise reader.fail(f"{found} non-zero entries, {section.kept[0]} are declared")
    return True


def _run(
    native: ModuleType,
    reader: Reader,
    section: Section,
    stream: Stream,
    book: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    first = _feed(reader, stream)
    if section.layout == DENSE:
        native.expand_dense(*first, book, out)
        return
    kept = section.kept[0]
    if section.codes is None:
        second = _Feed(np.zeros(kept, np.uint8), None, 0, 0)
    else:
        second = _feed(reader, section.codes)
    native.expand_sparse(*first, stream.count, *second, kept, book, out)


def _feed(reader: Reader, stream: Stream) -> _Feed:
    if stream.coder == RANS:
        found = parse(stream.data, stream.count, stream.alphabet)
        if isinstance(found, RansStream):
            return _Feed(found.payload, found.table(stream.alphabet), found.bits, found.lanes)
        return _Feed(found.astype(np.uint8), None, 0, 0)
    return _Feed(symbols(reader, stream, "symbols").astype(np.uint8), None, 0, 0)
