"""Linear layers whose rows have few values each (``native/few_bits.cpp``): 2 or 4 bits a weight.

Rows of at most 4 values take 2 bits a weight, of at most 16 they take 4, whatever the values:
ternary rows of ``{-b, 0, a}``, grids, shared values. Each row has a book of its own. Activations
are float32, multiplied by the very weights; or, where weights are bytes, codes of seven bits.
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
)
from gossamer.runtime.kernels.few_bits import fields

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["RowBooks", "linear_row_books", "pack_row_books", "row_values"]

_BLOCK = 1 << 22  # weights that are looked through at a time


class RowBooks(Packed):
    """A packed matrix.

    Attributes:
        shape: (outputs, inputs).
        bits: 2 or 4.
        codes: uint8, (outputs / 4 * chunks * 4 * 64), as of
            :class:`gossamer.runtime.kernels.few_bits.FewBits`: field k of byte i is column
            64 k + i.
        book: float32 or int8, (outputs, filled up to fours, * 2 ** bits): each row's values.

    Raises :class:`ArgumentError` where they do not fit together.
    """

    shape: tuple[int, int]
    bits: int
    codes: NDArray[np.uint8]
    book: NDArray[Any]

    def check(self) -> None:
        """Check that parts fit."""
        if self.bits not in (2, 4):
            raise ArgumentError(f"bits={self.bits} must be 2 or 4")
        fours = -(-self.shape[0] // 4)
        array("codes", self.codes, np.uint8, (fours * 256 * self.chunks,))
        kind = np.int8 if self.book.dtype == np.int8 else np.float32
        array("book", self.book, kind, (4 * fours << self.bits,))

    @property
    def columns(self) -> int:
        """Columns of a chunk of 64 bytes."""
        return 512 // self.bits

    @property
    def chunks(self) -> int:
        """Chunks of a row; the last is filled up."""
        return -(-self.shape[1] // self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes that the kernel reads of the weight."""
        return self.codes.nbytes + self.book.nbytes

    @property
    def dense(self) -> NDArray[Any]:
        """The matrix."""
        outputs, inputs = self.shape
        tiles = self.codes.reshape(-1, self.chunks, 4, 64).transpose(0, 2, 1, 3)
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]
        parts = tiles.reshape(-1, self.chunks, 1, 64)[:outputs] >> shifts
        codes = (parts & np.uint8((1 << self.bits) - 1)).reshape(outputs, -1)[:, :inputs]
        found: NDArray[Any] = np.take_along_axis(
            self.book.reshape(-1, 1 << self.bits)[:outputs], codes.astype(np.intp), 1
        )
        return found


def row_values(
    weight: NDArray[Any], most: int, rows: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[Any]] | None:
    """(code of each entry, each row's values (rows, as many as the row with the most)) of a matrix.

    A row with fewer values repeats one of them. None where a row has more than ``most``.
    ``rows``: look at so many alone.

    >>> row_values(np.array([[0, 3, 3, -1], [5, 5, 5, 5]]), 4)[1]
    array([[ 0,  3, -1],
           [ 5,  5,  5]])
    """
    matrix = weight[:rows]
    codes = np.zeros(matrix.shape, np.uint8)
    book = np.zeros((len(matrix), most), weight.dtype)
    count = 1
    step = max(1, _BLOCK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        part = matrix[start : start + step]
        left = np.ones(part.shape, bool)
        each = np.arange(len(part))
        for k in range(most):
            values = part[each, left.argmax(1)]
            open_rows = left.any(1)
            book[start : start + step, k] = np.where(open_rows, values, part[:, 0])
            same = left & (part == values[:, None])
            codes[start : start + step][same] = k
            left ^= same
            count = max(count, k + 1)
            if not left.any():
                break
        else:
            return None
        book[start : start + step, k + 1 :] = part[:, :1]
    return codes, book[:, :count]


def pack_row_books(weight: NDArray[Any]) -> RowBooks:
    """Pack a float32 or int8 matrix (outputs, inputs) with at most 16 values in each row.

    Raises :class:`ArgumentError` for a row of more, another dtype or shape, NaN and infinities.
    """
    kind = np.int8 if isinstance(weight, np.ndarray) and weight.dtype == np.int8 else np.float32
    weight = array("weight", weight, kind, (None, None))
    if not weight.size or not np.isfinite(weight).all():
        raise ArgumentError(f"weight of {weight.shape} is empty, or has NaN or infinite entries")
    countable(weight.shape[1])
    found = row_values(weight, 16)
    if found is None:
        raise ArgumentError("a row of weight has more than 16 values: share or quantize first")
    codes, values = found
    bits = 2 if values.shape[1] <= 4 else 4
    book = np.zeros((-(-len(weight) // 4) * 4, 1 << bits), kind)
    book[: len(weight), : values.shape[1]] = values
    shape: tuple[int, int] = weight.shape
    return RowBooks(shape, bits, fields(codes, 8 // bits, 0), frozen(book.reshape(-1)))


def linear_row_books(
    packed: RowBooks,
    x: NDArray[np.float32],
    *,
    bias: NDArray[np.float32] | None = None,
    clamp: Clamp = LINEAR,
    threads: int = 1,
) -> NDArray[np.float32]:
    """``clamp(x W^T + bias)``, (batch, outputs), in float32.

    Args:
        x: float32, (batch, inputs).
        threads: at most. Results do not depend on their number.

    Raises :class:`ArgumentError` for another dtype or shape, and for a book of bytes.
    """
    x, bias, low, high = called(packed.shape, x, bias, clamp)
    if packed.book.dtype != np.float32:
        raise ArgumentError("a book of bytes is for activations of seven bits, not for float32")
    module = kernel("few_bits")
    if module is None:
        y: NDArray[np.float32] = x @ packed.dense.T
        return np.clip(y if bias is None else y + bias, np.float32(low), np.float32(high))
    out = np.empty((len(x), packed.shape[0]), np.float32)
    module.BookFloats(packed.bits, packed.codes, packed.book, x, bias, low, high, out, threads)()
    return out
