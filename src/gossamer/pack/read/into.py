"""Coded tensors straight into float32 memory that is already there.

Fresh pages cost more than decoding, so these write into existing parameters: rANS symbols are
decoded a few thousand at a time and turned into values while they are in cache. Streams of other
coders are decoded first and then take the same path.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.kernels import kernel
from gossamer.pack.coders.ans import Rans, Stream, parse
from gossamer.pack.coders.bits import Symbols, pieces
from gossamer.pack.coders.gaps import gap_runs

__all__ = ["decode_dense_into", "decode_sparse_into"]

Data = bytes | memoryview
Decoder = Callable[[Data, int, int], Symbols]

_GAPS = 256
_Feed = tuple[NDArray[np.uint8], NDArray[np.uint32] | None, int, int]


def decode_sparse_into(
    out: NDArray[np.float32],
    gaps: Data,
    codes: Data,
    *,
    gap_count: int,
    code_count: int,
    codebook: NDArray[np.float32],
    gap_decoder: Decoder | None = None,
    code_decoder: Decoder | None = None,
) -> None:
    """Fill ``out`` with zeros and, where the gaps lead, with ``codebook[code]``.

    Args:
        out: float32, C-contiguous, writable; any shape, filled in C order.
        gaps: coded wide gap symbols (see :mod:`gossamer.pack.coders.gaps`), escapes included.
        codes: coded indices into ``codebook``, one for each non-zero; no bytes for a code book
            of one value.
        gap_count: how many gap symbols there are.
        code_count: how many non-zeros there are.
        codebook: ``(K,)`` values.
        gap_decoder: ``decode`` of the coder of ``gaps``; ``None`` for rANS.
        code_decoder: the same of ``codes``.

    Raises :class:`FormatError` when the streams are damaged or do not agree with the counts and
    the size of ``out``, the contents of which are then undefined (never anything beyond it).
    """
    flat, book = _check(out, codebook)
    native = kernel("entropy")
    if native is not None and len(book) <= 256:
        first = _feed(gaps, gap_count, _GAPS, gap_decoder)
        second = _feed(codes, code_count, len(book), code_decoder)
        try:
            native.expand_sparse(*first, gap_count, *second, code_count, book, flat)
        except ValueError as e:
            raise FormatError(str(e)) from None
        return
    places = _symbols(gaps, gap_count, _GAPS, gap_decoder)
    coded = _symbols(codes, code_count, len(book), code_decoder)
    flat[:] = 0
    for done, positions in gap_runs(places, code_count, len(flat)):
        flat[positions] = book[coded[done : done + len(positions)]]


def decode_dense_into(
    out: NDArray[np.float32],
    data: Data,
    *,
    codebook: NDArray[np.float32],
    decoder: Decoder | None = None,
) -> None:
    """Fill ``out`` with ``codebook[symbol]``, one symbol for each entry.

    Arguments and errors are those of :func:`decode_sparse_into`.
    """
    flat, book = _check(out, codebook)
    native = kernel("entropy")
    if native is not None and len(book) <= 256:
        feed = _feed(data, len(flat), len(book), decoder)
        try:
            native.expand_dense(*feed, book, flat)
        except ValueError as e:
            raise FormatError(str(e)) from None
        return
    for start, part in pieces(_symbols(data, len(flat), len(book), decoder)):
        flat[start : start + len(part)] = book[part]


def _check(
    out: NDArray[np.float32], codebook: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if out.dtype != np.float32 or not out.flags.c_contiguous or not out.flags.writeable:
        raise ArgumentError(
            f"out must be writable C-contiguous float32, got {out.dtype} with strides "
            f"{out.strides}; pass parameter.detach().numpy()"
        )
    if codebook.ndim != 1 or not len(codebook):
        raise ArgumentError(f"codebook must be 1-D and not empty, got shape {codebook.shape}")
    return out.reshape(-1), np.ascontiguousarray(codebook, np.float32)


def _symbols(data: Data, count: int, alphabet: int, decoder: Decoder | None) -> Symbols:
    if alphabet == 1 and not len(data):
        return np.zeros(count, np.uint8)
    if decoder is not None:
        return decoder(data, count, alphabet)
    return Rans().decode(data, count, alphabet)


def _feed(data: Data, count: int, alphabet: int, decoder: Decoder | None) -> _Feed:
    """What the kernel takes: coded bytes with frequencies, or plain symbols with ``None``."""
    if decoder is None and (alphabet > 1 or len(data)):
        found = parse(data, count, alphabet)
        if isinstance(found, Stream):
            payload = np.frombuffer(found.payload, np.uint8)
            return payload, found.table(alphabet), found.bits, found.lanes
        return found.astype(np.uint8, copy=False), None, 0, 1
    symbols = _symbols(data, count, alphabet, decoder)
    return symbols.astype(np.uint8, copy=False), None, 0, 1
