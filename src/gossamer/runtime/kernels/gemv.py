"""Float32 sparse linear layer on one sample: compressed rows (``native/sparse_gemv.cpp``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels.arrays import LINEAR, Clamp, array, bounds, frozen, weights

__all__ = ["SparseRows", "gemv", "pack_rows"]


@dataclass(frozen=True)
class SparseRows:
    """A float32 matrix in compressed rows with 16-bit columns.

    Attributes:
        shape: (outputs, inputs).
        starts: int32, (outputs + 1): where a row's entries begin.
        columns: uint16. values: float32, of the same length.

    Raises :class:`ArgumentError` where they do not fit together.
    """

    shape: tuple[int, int]
    starts: NDArray[np.int32] = field(repr=False)
    columns: NDArray[np.uint16] = field(repr=False)
    values: NDArray[np.float32] = field(repr=False)

    def __post_init__(self) -> None:
        """Check that parts fit."""
        array("starts", self.starts, np.int32, (self.shape[0] + 1,))
        array("columns", self.columns, np.uint16, (None,))
        array("values", self.values, np.float32, (len(self.columns),))
        inside = not len(self.columns) or int(self.columns.max()) < self.shape[1]
        ends = self.starts[0] == 0 and self.starts[-1] == len(self.columns)
        if not inside or not ends or (np.diff(self.starts) < 0).any():
            raise ArgumentError(f"starts or columns lead outside a matrix of {self.shape}")

    @classmethod
    def unchecked(cls, **parts: Any) -> SparseRows:
        """From parts that were packed before; the compiled kernel checks what it reaches."""
        made = object.__new__(cls)
        made.__dict__.update(parts)
        return made

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


def pack_rows(weight: NDArray[np.float32]) -> SparseRows:
    """Pack a float32 matrix (outputs, inputs) of at most 65536 inputs.

    Raises :class:`ArgumentError` for another dtype or shape, NaN and infinities.
    """
    weight = weights("weight", weight, 2)
    if weight.shape[1] > 65536:
        raise ArgumentError(f"weight has {weight.shape[1]} inputs; at most 65536 can be numbered")
    row, column = np.nonzero(weight)
    starts = np.searchsorted(row, np.arange(len(weight) + 1)).astype(np.int32)
    shape: tuple[int, int] = weight.shape
    return SparseRows(
        shape, frozen(starts), frozen(column.astype(np.uint16)), frozen(weight[row, column])
    )


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
    outputs, inputs = packed.shape
    x = array("x", x, np.float32, (inputs,))
    if bias is not None:
        bias = array("bias", bias, np.float32, (outputs,))
    low, high = bounds(clamp)
    module = kernel("sparse_gemv")
    if module is None:
        y = packed.dense @ x
        return np.clip(y if bias is None else y + bias, np.float32(low), np.float32(high))
    out = np.empty(outputs, np.float32)
    module.run_float(packed.starts, packed.columns, packed.values, x, bias, low, high, out, threads)
    return out
