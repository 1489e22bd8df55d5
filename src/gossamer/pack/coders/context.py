"""The context coder: the smallest file for a matrix of signed ranks.

The stream is a varint with the largest magnitude of a rank, a varint with the kernel (how many
entries of a row belong to one input channel), and the coder's bytes. The compiled coder and
:mod:`gossamer.pack.coders.context_reference` write and read the same ones.
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel as load_kernel
from gossamer.pack.coders import context_reference
from gossamer.pack.coders.limits import Reader, varint

__all__ = ["decode", "encode", "largest_of", "unpaid", "work"]

LARGEST = 1 << 20
"""The largest magnitude of a rank."""

_TRIED = 1 << 20  # entries up to which a linear layer is tried as if it followed a convolution
_MOST = 363_500  # entries a byte can hold: a decision takes at least log2(65536 / 65535) bits
_RATE = 1024
_WIDEST = 1 << 20
_STATE = 64  # bytes that the models hold for a column
_KERNELS = (4, 9, 16, 25, 36, 49, 64)


def work(shape: tuple[int, int], nonzeros: int, largest: int, itemsize: int) -> int:
    """What it takes to decode a tensor, in entries that are zero (a fifth of a microsecond each).

    A non-zero entry takes a sign and up to a decision for each quarter of an octave below
    ``largest``, however few bits they cost. A wide tensor of few rows, for whose columns the models
    would hold far more memory than it claims itself, is beyond any bound.

    Args:
        shape: rows and columns.
        nonzeros: how many entries are not zero.
        largest: the largest magnitude of a rank, or more.
        itemsize: bytes of an element.
    """
    rows, cols = shape
    if cols > _WIDEST and 2 * rows * itemsize < _STATE:
        return 1 << 62
    return rows * cols + nonzeros * (3 + (4 * largest.bit_length() + 1) // 2)


def unpaid(work: int, size: int) -> int:
    """The part of ``work`` that a section of ``size`` bytes is too small for.

    A file of nothing but predictable entries would else work for hours. A thousandth of non-zeros
    takes a byte for 600 entries; emptier matrices the other layouts code as well, and a writer
    leaves them to those.
    """
    return max(0, work - _RATE * size)


def encode(ranks: NDArray[np.signedinteger], kernel: int = 1) -> bytes:
    """Code ``ranks`` (rows, cols), ``cols`` being input channels times ``kernel``.

    ``kernel``: height times width of a convolution's; for 1 (linear layers) those of a flattened
    convolution's output are tried, and the shortest stream is returned.

    Raises :class:`ArgumentError` for another number of dimensions, a kernel that does not divide
    the columns, and magnitudes above 2^20.
    """
    if ranks.ndim != 2 or kernel < 1 or ranks.shape[1] % kernel:
        raise ArgumentError(
            f"ranks of shape {ranks.shape} with kernel {kernel}: want 2-D, columns a multiple "
            "of the kernel"
        )
    values = np.ascontiguousarray(ranks, np.int32)
    largest = int(np.abs(values.astype(np.int64)).max(initial=1))
    if largest > LARGEST:
        raise ArgumentError(f"ranks reach {largest}, beyond {LARGEST}; code the tensor raw")
    cols = values.shape[1]
    kernels = [kernel]
    if kernel == 1 and values.size <= _TRIED:
        kernels += [k for k in _KERNELS if cols % k == 0 and cols > k]
    return min((_encode(values, k, largest) for k in kernels), key=len)


def largest_of(reader: Reader) -> int:
    """The largest magnitude of a rank that a stream declares, which is read first."""
    return reader.varint("the largest rank", LARGEST)


def decode(data: bytes, rows: int, cols: int) -> NDArray[np.signedinteger]:
    """The ranks (rows, cols) of :func:`encode`; FormatError when ``data`` is not their coding.

    They are int8 or int16 where the compiled coder reads a stream whose largest rank fits.
    """
    reader = Reader(data, f"context stream of {len(data)} bytes")
    largest = largest_of(reader)
    kernel = reader.varint("the kernel", max(1, cols))
    if largest < 1 or kernel < 1 or cols % kernel:
        raise reader.fail(f"largest rank {largest} or kernel {kernel} of {cols} columns is wrong")
    payload = bytes(reader.rest())
    if rows * cols > _MOST * (len(payload) + 4):
        raise reader.fail(f"{rows} x {cols} entries cannot come from it")
    if not rows * cols:
        if payload:
            raise reader.fail("an empty matrix has no bytes")
        return np.zeros((rows, cols), np.int32)
    native = _native()
    shape = (rows, cols, kernel, _stride(cols, kernel), largest)
    if native is None:
        found = context_reference.decode(payload, *shape)
        return np.array(found, np.int32).reshape(rows, cols)
    try:
        ranks: NDArray[np.signedinteger] = native.decode(payload, *shape)
    except ValueError as e:
        raise reader.fail(str(e)) from None
    return ranks


def _encode(values: NDArray[np.int32], kernel: int, largest: int) -> bytes:
    head = varint(largest) + varint(kernel)
    if not values.size:
        return head
    rows, cols = values.shape
    native, stride = _native(), _stride(cols, kernel)
    if native is None:
        flat = values.reshape(-1).tolist()
        return head + context_reference.encode(flat, rows, cols, kernel, stride, largest)
    coded: bytes = native.encode(values, kernel, stride, largest)
    return head + coded


def _stride(cols: int, kernel: int) -> int:
    """How far apart entries above each other are: a square kernel's side, or a picture's."""
    side = math.isqrt(kernel if kernel > 1 else cols)
    return side if kernel > 1 or (side * side == cols and side > 3) else 1


def _native() -> ModuleType | None:
    return load_kernel("context")
