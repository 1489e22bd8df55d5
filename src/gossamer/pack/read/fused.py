"""Sections whose streams can be decoded straight into a resident array.

Only the layouts made for fast decoding come this way (row order, one class, at most 256 values of
four bytes); everything else, and everything without the compiled kernel, goes through
:mod:`gossamer.pack.read.decode`. Both give the same bits and refuse the same streams.
"""

from __future__ import annotations

import numpy as np

from gossamer.core.errors import FormatError
from gossamer.core.kernels import kernel
from gossamer.pack.coders.limits import Reader
from gossamer.pack.coders.table import CODERS, NUMBERED, RANS
from gossamer.pack.format.section import (
    CLASSES,
    DENSE,
    GAPS,
    RAW_VALUES,
    TRANSPOSED,
    ZERO,
    Section,
    Stream,
)
from gossamer.pack.format.values import Bits, DType
from gossamer.pack.read.into import Decoder, decode_dense_into, decode_sparse_into

__all__ = ["can_fuse", "expand_fused"]


def can_fuse(section: Section, dtype: DType) -> bool:
    """Whether :func:`expand_fused` takes this section."""
    fused = section.layout in (GAPS, DENSE) and dtype.size == 4 and section.book is not None
    if not fused or section.flags & (TRANSPOSED | CLASSES | RAW_VALUES):
        return False
    streams = [s for s in (section.positions[0], section.codes) if s is not None]
    if section.positions[0] is None or any(s.coder not in NUMBERED for s in streams):
        return False  # what another package decodes is checked first
    return len(_book(section, dtype)) <= 256 and kernel("entropy") is not None


def expand_fused(reader: Reader, section: Section, dtype: DType, out: Bits) -> None:
    """Decode into ``out``: flat, contiguous, the dtype's bit patterns.

    Raises :class:`FormatError` for a damaged stream, after which ``out`` may be written in part.
    """
    stream, codes, kept = section.positions[0], section.codes, section.kept[0]
    assert stream is not None
    book = _book(section, dtype)
    # Moved as float32, whatever the four bytes mean: moving changes no bit.
    flat, values = out.view(np.float32), book.view(np.float32)
    try:
        if section.layout == DENSE:
            decode_dense_into(flat, stream.data, codebook=values, decoder=_decoder(stream))
        else:
            decode_sparse_into(
                flat,
                stream.data,
                b"" if codes is None else codes.data,
                gap_count=stream.count,
                code_count=kept,
                codebook=values,
                gap_decoder=_decoder(stream),
                code_decoder=None if codes is None else _decoder(codes),
            )
    except FormatError as e:
        raise FormatError(f"{reader.where}: {e}") from None
    if section.flags & ZERO and int(np.count_nonzero(out)) != kept:
        raise reader.fail(f"{np.count_nonzero(out)} non-zero entries, {kept} are declared")


def _book(section: Section, dtype: DType) -> Bits:
    """What each symbol or code stands for."""
    book = section.book
    assert book is not None
    if section.layout == DENSE and section.flags & ZERO:
        return np.insert(book, dtype.negatives(book), 0)
    return book


def _decoder(stream: Stream) -> Decoder | None:
    return None if stream.coder == RANS else CODERS[stream.coder].decode
