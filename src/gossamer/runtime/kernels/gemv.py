"""Float32 sparse linear layer on one sample: compressed rows (``native/sparse_gemv.cpp``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from gossamer.runtime.kernels.entries import Entries, entries_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SparseRows", "gemv", "pack_rows"]


class SparseRows(Packed):
    """A float32 matrix in compressed rows with 16-bit columns.

    Attributes:
        shape: (outputs, inputs).
        starts: int32, (outputs + 1): where a row's entries begin.
        columns: uint16. values: float32, of the same length.

    Raises :class:`ArgumentError` where they do not fit together.
    """

    shape: tuple[int, int]
    starts: NDArray[np.int32]
    columns: NDArray[np.uint16]
    values: NDArray[np.float32]

    def check(self) -> None:
        """Check that parts fit."""
        array("starts", self.starts, np.int32, (self.shape[0] + 1,))
        array("columns", self.columns, np.uint16, (None,))
        array("values", self.values, np.float32, (len(self.columns),))
        inside = not len(self.columns) or int(self.columns.max()) < self.shape[1]
        ends = self.starts[0] == 0 and self.starts[-1] == len(self.columns)
        if not inside or not ends or (np.diff(self.starts) < 0).any():
            raise ArgumentError(f"starts or columns lead outside a matrix of {self.shape}")

    @property
    def nbytes(self) -> int:
        """Bytes that the kernel reads of the weight."""
        return self.starts.nbytes + self.columns.nbytes + self.values.nbytes

    @property
    def dense(self) -> NDArray[np.float32]:
        """The matrix."""
        full = np.zeros(self.shape, np.float32)
        full[np.repeat(np.arange(self.shape[0]), np.diff(self.starts)), self.columns] = self.values
        return full


def pack_rows(weight: NDArray[np.float32] | Entries) -> SparseRows:
    """Pack a float32 matrix (outputs, inputs) of at most 65536 inputs, or its entries.

    Raises :class:`ArgumentError` for another dtype or shape, NaN and infinities.
    """
    live = entries_of("weight", weight, np.float32, 2)
    outputs, inputs = live.shape
    countable(inputs)
    row = live.places // inputs
    starts = np.searchsorted(row, np.arange(outputs + 1)).astype(np.int32)
    columns = (live.places - row * inputs).astype(np.uint16)
    return SparseRows((outputs, inputs), frozen(starts), frozen(columns), frozen(live.values))


def gemv(
    packed: SparseRows,
    x: NDArray[np.float32],
    *,
    bias: NDArray[np.float32] | None = None,
    clamp: Clamp = LINEAR,
    threads: int = 1,
) -> NDArray[np.float32]:
    """``clamp(W x + bias)`` of one vector (inputs) in float32.

    For a batch, :func:`gossamer.runtime.kernels.conv.linear` is faster from about four samples.
    Raises :class:`ArgumentError` for another dtype or shape.
    """
    x, bias, low, high = called(packed.shape, x, bias, clamp, batch=False)
    module = kernel("sparse_gemv")
    if module is None:
        y = packed.dense @ x
        return np.clip(y if bias is None else y + bias, np.float32(low), np.float32(high))
    out = np.empty(packed.shape[0], np.float32)
    module.Rows(packed.starts, packed.columns, packed.values, x, bias, low, high, out, threads)()
    return out
