"""8-bit sparse linear layer by byte permutes (``native/sparse_gemv.cpp``).

Sixteen rows lie side by side; in each 32-bit lane four weights of one row beside the indexes of
their columns inside a block of 32, 64 or 128. The block's activations stay in registers, and one
permute picks the bytes that a step needs. Any pattern is taken; rows that have the same number of
weights in every block (balanced, N of 128) waste no slot. Weights are bytes with a scale for each
row, or 4-bit codes of a book of 15 values and zero.

Activations get seven bits and a zero point from each sample's extremes as they come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.core.errors import ArgumentError, one_of
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels.arrays import (
    LINEAR,
    Clamp,
    Packed,
    array,
    called,
    countable,
    dot_products,
    frozen,
    weights,
)
from gossamer.runtime.kernels.conv_int8 import weight_codes
from gossamer.runtime.kernels.entries import Entries, entries_of
from gossamer.runtime.kernels.taps import moved

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SparseBytes", "book_codes", "linear_int8", "pack_bytes", "pack_codes", "seven_bits"]

WIDTHS = (32, 64, 128)
_LANES = 16


class SparseBytes(Packed):
    """A packed matrix.

    Attributes:
        shape: (outputs, inputs).
        width: columns of a block, one of 32, 64, 128.
        starts: int32, (blocks * groups + 1): the first step of each group of 16 rows in each block.
        data: uint8: a step is 64 indexes and 64 weights; with a book, two steps are 128 indexes
            and 64 bytes of two codes.
        book: int8, (16), its first entry 0; None for bytes.
        order: int32, (groups * 16): the row at each place; -1 for none.
        scale: float32, (outputs). sums: int32, (outputs): of the row's codes.

    Raises :class:`ArgumentError` where they do not fit together.
    """

    shape: tuple[int, int]
    width: int
    starts: NDArray[np.int32]
    data: NDArray[np.uint8]
    book: NDArray[np.int8] | None
    order: NDArray[np.int32]
    scale: NDArray[np.float32]
    sums: NDArray[np.int32]

    def check(self) -> None:
        """Check that parts fit."""
        if self.width not in WIDTHS:
            raise ArgumentError(f"width={self.width} is not one of {WIDTHS}")
        outputs = self.shape[0]
        groups = -(-outputs // _LANES)
        array("starts", self.starts, np.int32, (self.blocks * groups + 1,))
        step = 128 if self.book is None else 96
        array("data", self.data, np.uint8, (int(self.starts[-1]) * step,))
        array("order", self.order, np.int32, (groups * _LANES,))
        array("scale", self.scale, np.float32, (outputs,))
        array("sums", self.sums, np.int32, (outputs,))
        if self.starts[0] != 0 or (np.diff(self.starts) < 0).any():
            raise ArgumentError("starts must ascend from 0")
        if not np.array_equal(np.sort(self.order[self.order >= 0]), np.arange(outputs)):
            raise ArgumentError("order must name every row once")
        if self.book is not None and array("book", self.book, np.int8, (16,))[0] != 0:
            raise ArgumentError("book must begin with 0, the value of empty slots")

    @property
    def blocks(self) -> int:
        """Blocks of columns; the last is filled up with zeros."""
        return -(-self.shape[1] // self.width)

    @property
    def nbytes(self) -> int:
        """Bytes that the kernel reads of the weight."""
        return self.starts.nbytes + self.data.nbytes + self.order.nbytes + 2 * self.scale.nbytes

    @property
    def codes(self) -> NDArray[np.int8]:
        """The weight's codes, (outputs, inputs)."""
        groups = len(self.order) // _LANES
        full = np.zeros((len(self.order), self.blocks * self.width), np.int16)
        if self.book is None:
            parts = self.data.reshape(-1, 2, _LANES, 4)
            index, value = parts[:, 0], parts[:, 1].view(np.int8)
        else:
            parts = self.data.reshape(-1, 3, _LANES, 4)
            index = parts[:, :2].reshape(-1, _LANES, 4)
            value = self.book[np.stack([parts[:, 2] & 15, parts[:, 2] >> 4], 1)]
            value = value.reshape(-1, _LANES, 4)
        panel = np.repeat(np.arange(groups * self.blocks), np.diff(self.starts))
        row = (panel % groups * _LANES)[:, None, None] + np.arange(_LANES)[None, :, None]
        column = (panel // groups * self.width)[:, None, None] + index
        np.add.at(full, (np.broadcast_to(row, column.shape), column), value)
        out = np.zeros((self.shape[0], full.shape[1]), np.int8)
        out[self.order[self.order >= 0]] = full[self.order >= 0]
        return out[:, : self.shape[1]]


def book_codes(weight: NDArray[np.float32], entries: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """(code of each weight, float32 values of the codes): code 0 is the value 0.

    Raises :class:`ArgumentError` where the weight has more than ``entries`` values, 0 among them.
    """
    values = np.unique(weight)
    values = np.concatenate([np.zeros(1, np.float32), values[values != 0]])
    if len(values) > entries:
        raise ArgumentError(
            f"weight has {len(values)} values with 0; a book of {entries} holds at most {entries}: "
            "share weights first"
        )
    order = np.argsort(values)
    return order[np.searchsorted(values, weight, sorter=order)].astype(np.uint8), values


def pack_bytes(
    weight: NDArray[np.float32], *, form: str = "bytes", width: int | None = None
) -> SparseBytes:
    """Quantize a float32 matrix (outputs, inputs) and pack what is not zero.

    Args:
        form: ``bytes``, a scale for each row; or ``book``, where at most 15 values and 0 occur,
            which become bytes of one scale (to half a 127th of the greatest).
        width: columns of a block; None for what is fastest at this density on this processor.

    Raises :class:`ArgumentError` for another dtype or shape, NaN, infinities, and for too many
    values in a book.
    """
    one_of("form", form, ("bytes", "book"))
    weight = weights("weight", weight, 2)
    countable(weight.shape[1])
    book = None
    if form == "book":
        slots, values = book_codes(weight, 16)
        top = float(np.abs(values).max()) or 127.0
        book = np.zeros(16, np.int8)
        book[: len(values)] = np.rint(values / (top / 127))
        scale = np.full(len(weight), top / 127)
        sums = book[slots].sum(axis=1, dtype=np.int32)
    else:
        codes, scale = weight_codes(weight)
        slots, sums = codes.view(np.uint8), codes.sum(axis=1, dtype=np.int32)
    return _packed(entries_of("codes", slots, np.uint8, 2), scale, sums, book, width)


def pack_codes(codes: NDArray[np.int8] | Entries, *, width: int | None = None) -> SparseBytes:
    """Pack a matrix of bytes, or its entries, as they are, every row's scale 1.

    Raises :class:`ArgumentError` for another dtype or shape, and for too many inputs.
    """
    live = entries_of("codes", codes, np.int8, 2)
    outputs, inputs = live.shape
    countable(inputs)
    sums = np.bincount(live.places // inputs, live.values, outputs)  # float64 holds them exactly
    slots = Entries(live.shape, live.places, live.values.view(np.uint8))
    return _packed(slots, np.ones(outputs), sums.astype(np.int32), None, width)


def _packed(
    live: Entries,
    scale: NDArray[Any],
    sums: NDArray[np.int32],
    book: NDArray[np.int8] | None,
    width: int | None,
) -> SparseBytes:
    """``live``: the bytes of codes that are not zero, or their places in the book."""
    outputs, inputs = live.shape
    if width is None:
        density = live.density
        width = 128 if dot_products() or density < 0.15 else 64 if density < 0.35 else 32
    elif width not in WIDTHS:
        raise ArgumentError(f"width={width} is not one of {WIDTHS}")
    groups, blocks = -(-outputs // _LANES), -(-inputs // width)
    line = live.places // inputs
    column = live.places - line * inputs
    each = np.bincount(line, minlength=outputs)
    order = np.full(groups * _LANES, -1, np.int32)
    order[:outputs] = np.argsort(-each, kind="stable")
    place = np.empty(outputs, np.int64)  # of a row
    place[order[:outputs]] = np.arange(outputs)
    row, block = place[line], column // width
    counts = np.bincount(row * blocks + block, minlength=groups * _LANES * blocks)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    begins = np.concatenate([[0], np.cumsum(each[order[:outputs]])[:-1]])[place]
    k = moved(each, begins) - first[row * blocks + block]  # of its row and block
    most = counts.reshape(groups, _LANES, blocks).max(axis=1).T  # (blocks, groups)
    steps = -(-most // 4)
    if book is not None:
        steps += steps % 2
    starts = np.concatenate([[0], np.cumsum(steps.reshape(-1))])
    at = starts[block * groups + row // _LANES] + k // 4, row % _LANES, k % 4
    index = np.zeros((int(starts[-1]), _LANES, 4), np.uint8)
    value = np.zeros_like(index)
    index[at] = column % width
    value[at] = live.values
    if book is None:
        data = np.stack([index, value], axis=1)
    else:
        twos = value.reshape(-1, 2, _LANES, 4)
        packed = twos[:, 0] | twos[:, 1] << 4
        data = np.concatenate([index.reshape(-1, 2, _LANES, 4), packed[:, None]], axis=1)
    return SparseBytes(
        shape=(outputs, inputs),
        width=width,
        starts=frozen(starts.astype(np.int32)),
        data=frozen(data.reshape(-1)),
        book=None if book is None else frozen(book),
        order=frozen(order),
        scale=frozen(scale.astype(np.float32)),
        sums=frozen(sums),
    )


def seven_bits(
    x: NDArray[np.float32], columns: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32]]:
    """Codes (batch, columns, zeros at the end), and each sample's scale and zero point.

    Raises :class:`ArgumentError` for NaN and infinities.
    """
    n, inputs = x.shape
    codes = np.empty((n, columns), np.uint8)
    scale, zero = np.empty(n, np.float32), np.empty(n, np.int32)
    module = kernel("sparse_gemv")
    try:
        if module is not None:
            module.seven_bits(x, codes, scale, zero)
            return codes, scale, zero
        if not np.isfinite(x).all():
            raise ValueError("x has entries that are NaN or infinite")
    except ValueError as e:
        raise ArgumentError(str(e)) from e
    low, high = x.min(axis=1, initial=0), x.max(axis=1, initial=0)
    step = (high - low) / np.float32(127)
    scale[:] = np.where(step > np.float32(1e-37), step, np.float32(1))
    inverse = np.float32(1) / scale
    middle = np.rint(-low * inverse)
    zero[:] = middle
    codes[:, inputs:] = 0
    codes[:, :inputs] = np.clip(np.rint(x * inverse[:, None]) + middle[:, None], 0, 127)
    return codes, scale, zero


def linear_int8(
    packed: SparseBytes,
    x: NDArray[np.float32],
    *,
    bias: NDArray[np.float32] | None = None,
    clamp: Clamp = LINEAR,
    threads: int = 1,
) -> NDArray[np.float32]:
    """``clamp(x W^T + bias)``, (batch, outputs), with activations of seven bits.

    Args:
        x: float32, (batch, inputs).
        threads: at most. Results do not depend on their number.

    Raises :class:`ArgumentError` for another dtype or shape, NaN and infinities.
    """
    outputs, inputs = packed.shape
    x, bias, low, high = called(packed.shape, x, bias, clamp)
    codes, step, zero = seven_bits(x, packed.blocks * packed.width)
    module = kernel("sparse_gemv")
    if module is None:
        exact = codes[:, :inputs].astype(np.float64) @ packed.codes.astype(np.float64).T
        less = zero[:, None] * packed.sums.astype(np.int64)
        return ended(exact.astype(np.int64) - less, packed.scale, step, bias, low, high)
    out = np.empty((len(x), outputs), np.float32)
    module.Bytes(
        packed.width, packed.starts, packed.data, packed.book, packed.order, codes, step, zero,
        packed.scale, packed.sums, bias, low, high, out, threads,
    )()  # fmt: skip
    return out


def ended(
    sums: NDArray[np.int64],
    scale: NDArray[np.float32],
    step: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    low: float,
    high: float,
) -> NDArray[np.float32]:
    """Integer sums to floats, operation by operation as ``native/gemv.h`` does it."""
    y = sums.astype(np.int32).astype(np.float32) * (scale[None, :] * step[:, None])
    if bias is not None:
        y = y + bias
    return np.clip(y, np.float32(low), np.float32(high))
