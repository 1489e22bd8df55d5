"""Linear layers of few bits (``native/few_bits.cpp``): 2-bit ternary and 4-bit code books.

Ternary: every row is ``scale * {-1, 0, 1}``; activations are signed bytes, a scale a sample. Code
book: at most 16 values, 0 among them, kept as bytes; activations have seven bits and a zero point.
Dense formats: a weight costs 2 or 4 bits whether it is zero or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels.arrays import (
    LINEAR,
    Clamp,
    Packed,
    array,
    called,
    countable,
    frozen,
    weights,
)
from gossamer.runtime.kernels.gemv_int8 import book_codes, ended, seven_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FewBits", "fields", "linear_few_bits", "pack_book", "pack_ternary", "signed_bytes"]


class FewBits(Packed):
    """A packed matrix.

    Attributes:
        shape: (outputs, inputs).
        codes: uint8, (outputs / 4 * chunks * 4 * 64): four rows at a time, 64 bytes of each in
            turn. Ternary: 256 columns are 64 bytes, field k (two bits) of byte i is column
            64 k + i, weight + 1. Book: 128 columns are 64 bytes, the low half
            of byte i is column i, the high half column 64 + i.
        book: int8, (16); None for ternary.
        scale: float32, (outputs). sums: int32, (outputs): what each row takes off per zero point
            (book) or per unit of the activations' sum (ternary: 1).

    Raises :class:`ArgumentError` where they do not fit together.
    """

    shape: tuple[int, int]
    codes: NDArray[np.uint8]
    book: NDArray[np.int8] | None
    scale: NDArray[np.float32]
    sums: NDArray[np.int32]

    def check(self) -> None:
        """Check that parts fit."""
        array("codes", self.codes, np.uint8, (-(-self.shape[0] // 4) * 256 * self.chunks,))
        array("scale", self.scale, np.float32, (self.shape[0],))
        array("sums", self.sums, np.int32, (self.shape[0],))
        if self.book is not None:
            array("book", self.book, np.int8, (16,))

    @property
    def columns(self) -> int:
        """Columns of a chunk of 64 bytes."""
        return 256 if self.book is None else 128

    @property
    def chunks(self) -> int:
        """Chunks of a row; the last is filled up."""
        return -(-self.shape[1] // self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes that the kernel reads of the weight."""
        return self.codes.nbytes + 2 * self.scale.nbytes

    @property
    def integers(self) -> NDArray[np.int8]:
        """The weight in units of each row's scale, (outputs, inputs)."""
        tiles = self.codes.reshape(-1, self.chunks, 4, 64).transpose(0, 2, 1, 3)
        chunks = tiles.reshape(-1, self.chunks, 1, 64)[: self.shape[0]]
        if self.book is None:
            fields = (chunks >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
            full = fields.astype(np.int8) - np.int8(1)
        else:
            full = self.book[(chunks >> np.array([0, 4], np.uint8)[:, None]) & 15]
        return full.reshape(self.shape[0], -1)[:, : self.shape[1]]


def fields(codes: NDArray[Any], count: int, filling: int) -> NDArray[np.uint8]:
    """Codes (outputs, inputs) packed ``count`` to a byte, chunks of 64 bytes, rows by fours."""
    rows, inputs = -(-len(codes) // 4) * 4, codes.shape[1]
    full = np.full((rows, -(-inputs // (64 * count)) * 64 * count), filling, np.uint8)
    full[: len(codes), :inputs] = codes
    parts = full.reshape(rows, -1, count, 64)
    packed = np.zeros_like(parts[:, :, 0])
    for k in range(count):
        packed |= parts[:, :, k] << np.uint8(8 // count * k)
    tiles = packed.reshape(rows // 4, 4, -1, 64).transpose(0, 2, 1, 3)
    return frozen(tiles.reshape(-1))


def pack_ternary(weight: NDArray[np.float32]) -> FewBits:
    """Pack a float32 matrix (outputs, inputs) whose rows are ``scale * {-1, 0, 1}``.

    Raises :class:`ArgumentError` for a row of more values, naming it, for another dtype or shape,
    NaN and infinities.
    """
    weight = weights("weight", weight, 2)
    countable(weight.shape[1])
    size = np.abs(weight)
    scale = size.max(axis=1)
    bad = ((size != 0) & (size != scale[:, None])).any(axis=1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ArgumentError(
            f"row {row} of weight is not scale * {{-1, 0, 1}}: it has {len(np.unique(size[row]))} "
            "absolute values; quantize to ternary with one scale a row first"
        )
    codes = np.sign(weight).astype(np.int8) + 1
    shape: tuple[int, int] = weight.shape
    # the activations beyond the last column are zero, whatever the weight
    return FewBits(
        shape,
        fields(codes, 4, 1),
        None,
        frozen(scale),
        frozen(np.ones(len(weight), np.int32)),
    )


def pack_book(weight: NDArray[np.float32]) -> FewBits:
    """Pack a float32 matrix (outputs, inputs) of at most 16 values, 0 among them.

    The values become bytes of one scale: to half a 127th of the greatest.

    Raises :class:`ArgumentError` for more values, another dtype or shape, NaN and infinities.
    """
    weight = weights("weight", weight, 2)
    countable(weight.shape[1])
    slots, values = book_codes(weight, 16)
    top = float(np.abs(values).max()) or 127.0
    book = np.zeros(16, np.int8)
    book[: len(values)] = np.rint(values / (top / 127))
    shape: tuple[int, int] = weight.shape
    return FewBits(
        shape,
        fields(slots, 2, 0),
        frozen(book),
        frozen(np.full(len(weight), top / 127, np.float32)),
        frozen(book[slots].sum(axis=1, dtype=np.int32)),
    )


def signed_bytes(
    x: NDArray[np.float32], columns: int
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32]]:
    """Codes (batch, columns, zeros at the end), each sample's scale, and the sum of its codes.

    Raises :class:`ArgumentError` for NaN and infinities.
    """
    n, inputs = x.shape
    codes = np.empty((n, columns), np.int8)
    scale, total = np.empty(n, np.float32), np.empty(n, np.int32)
    module = kernel("few_bits")
    try:
        if module is not None:
            module.signed_bytes(x, codes, scale, total)
            return codes, scale, total
        if not np.isfinite(x).all():
            raise ValueError("x has entries that are NaN or infinite")
    except ValueError as e:
        raise ArgumentError(str(e)) from e
    top = np.abs(x).max(axis=1, initial=0)
    scale[:] = np.where(top > np.float32(1e-36), top / np.float32(127), np.float32(1))
    codes[:, inputs:] = 0
    inverse = np.float32(1) / scale
    codes[:, :inputs] = np.clip(np.rint(x * inverse[:, None]), -127, 127)
    total[:] = codes.sum(axis=1, dtype=np.int32)
    return codes, scale, total


def linear_few_bits(
    packed: FewBits,
    x: NDArray[np.float32],
    *,
    bias: NDArray[np.float32] | None = None,
    clamp: Clamp = LINEAR,
    threads: int = 1,
) -> NDArray[np.float32]:
    """``clamp(x W^T + bias)``, (batch, outputs), with 8-bit activations.

    Args:
        x: float32, (batch, inputs).
        threads: at most. Results do not depend on their number.

    Raises :class:`ArgumentError` for another dtype or shape, NaN and infinities.
    """
    outputs, inputs = packed.shape
    x, bias, low, high = called(packed.shape, x, bias, clamp)
    columns = packed.chunks * packed.columns
    codes: NDArray[Any]
    if packed.book is None:
        codes, step, zero = signed_bytes(x, columns)
    else:
        codes, step, zero = seven_bits(x, columns)
    module = kernel("few_bits")
    if module is None:
        exact = codes[:, :inputs].astype(np.float64) @ packed.integers.astype(np.float64).T
        sums: NDArray[np.int64] = exact.astype(np.int64)
        if packed.book is not None:
            sums -= zero[:, None] * packed.sums.astype(np.int64)
        return ended(sums, packed.scale, step, bias, low, high)
    out = np.empty((len(x), outputs), np.float32)
    module.Coded(
        packed.codes, packed.book, codes.view(np.uint8), step, zero, packed.scale, packed.sums,
        bias, low, high, out, threads,
    )()  # fmt: skip
    return out
