"""Direct sparse convolution (``native/sparse_conv.cpp``): weights in blocks of input channels.

A weight that is not zero is a *tap*: one broadcast and a row of multiply-adds over shifted copies
of the input. Taps are grouped by blocks of input channels whose copies fit the first-level cache
and, inside a block, by output channels. Any stride, padding, dilation, number of groups, size of
map and batch; a map whose size is known before only chooses the blocks.

A linear layer on a batch is a convolution of kernel 1 with the samples as the map:
:func:`linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from gossamer.core.errors import ArgumentError, one_of
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels.arrays import (
    LINEAR,
    Clamp,
    Packed,
    array,
    bounds,
    frozen,
)
from gossamer.runtime.kernels.entries import Entries, entries_of
from gossamer.runtime.kernels.taps import CHUNK, output_size, pack_taps

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ELEMENTS", "SparseConv", "convolve", "linear", "pack_conv"]

# What 32 bits of the input are: a float, four channels of seven bits, or two of 16 bits.
ELEMENTS = ("float32", "quads", "pairs")


class SparseConv(Packed):
    """A packed weight and the geometry of its convolution.

    Attributes:
        shape: (output channels, input channels of a group, kernel height, kernel width).
        stride, padding, dilation: of height and width. ``padding`` has (top, left, bottom, right).
        groups: of channels.
        element: one of :data:`ELEMENTS`.
        block: planes (channels, quads or pairs of channels) in a block.
        starts: int32, (groups * blocks * (rows + 1)): where the taps of a row begin.
        order: int32, (groups * blocks * rows): the row at each position of a block.
        taps: uint16: (plane in its block * kernel height + y) * kernel width + x.
        values: uint32: the bits of each tap's float, four bytes or two 16-bit weights.

    Raises :class:`ArgumentError` where the parts do not fit together.
    """

    shape: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    element: str
    block: int
    starts: NDArray[np.int32]
    order: NDArray[np.int32]
    taps: NDArray[np.uint16]
    values: NDArray[np.uint32]

    def check(self) -> None:
        """Check that parts fit."""
        one_of("element", self.element, ELEMENTS)
        if min(self.shape) < 1 or self.groups < 1 or self.shape[0] % self.groups:
            raise ArgumentError(f"groups={self.groups} does not divide {self.shape[0]} channels")
        if self.block < 1 or self.block * self.shape[2] * self.shape[3] > 65536:
            raise ArgumentError(f"block={self.block} must be 1 to 65536 taps of {self.shape}")
        panels = self.groups * self.blocks
        array("starts", self.starts, np.int32, [panels * (self.rows + 1)])
        array("order", self.order, np.int32, [panels * self.rows])
        array("taps", self.taps, np.uint16, [None])
        array("values", self.values, np.uint32, [len(self.taps)])
        if not np.array_equal(
            np.sort(self.order.reshape(panels, self.rows), axis=1),
            np.broadcast_to(np.arange(self.rows), (panels, self.rows)),
        ):
            raise ArgumentError("order must hold every row once in each block")

    @property
    def rows(self) -> int:
        """Output channels of a group."""
        return self.shape[0] // self.groups

    @property
    def planes(self) -> int:
        """Channels, quads or pairs of channels that a group reads."""
        return -(-self.shape[1] // _PER[self.element])

    @property
    def blocks(self) -> int:
        """Blocks of planes in a group."""
        return -(-self.planes // self.block)

    @property
    def nbytes(self) -> int:
        """Bytes that the kernel reads of the weight."""
        return sum(a.nbytes for a in (self.starts, self.order, self.taps, self.values))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output; :class:`ArgumentError` where the kernel does not fit."""
        return output_size(
            (height, width), self.shape[2:], self.stride, self.padding, self.dilation
        )

    @cached_property
    def dense(self) -> NDArray[Any]:
        """The weight, (output channels, channels of a group, height, width): float32 or int16."""
        kh, kw = self.shape[2:]
        counts = np.diff(self.starts.reshape(-1, self.rows + 1), axis=1).reshape(-1)
        at = np.repeat(np.arange(counts.size), counts)  # position of each tap
        panel, row = at // self.rows, self.order[at]
        plane = panel % self.blocks * self.block + self.taps // (kh * kw)
        y, x = self.taps // kw % kh, self.taps % kw
        channel = panel // self.blocks * self.rows + row
        per = _PER[self.element]
        kind: Any = {1: np.float32, 2: np.int16, 4: np.int8}[per]
        full = np.zeros((self.shape[0], self.planes, kh, kw, per), kind)
        full[channel, plane, y, x] = self.values.view(kind).reshape(-1, per)
        full = full.transpose(0, 1, 4, 2, 3).reshape(self.shape[0], -1, kh, kw)[:, : self.shape[1]]
        return frozen(full if per == 1 else full.astype(np.int16))


_PER = {"float32": 1, "quads": 4, "pairs": 2}  # channels of a plane


def pack_conv(
    weight: NDArray[np.float32] | Entries,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    block: int | None = None,
    image: Sequence[int] | None = None,
) -> SparseConv:
    """Pack a float32 weight, (output channels, channels of a group, height, width), or its entries.

    Zeros are left out, whatever their pattern.

    Args:
        stride, padding, dilation: a number, or height and width; ``padding`` also
            (top, left, bottom, right).
        block: input channels in a block; None for a rule.
        image: height and width of the inputs, where they are known: the rule's blocks are fastest
            there. Inputs of any size are taken.

    Raises :class:`ArgumentError` for a weight that is not float32, finite and of four dimensions,
    and for settings that no convolution has.
    """
    live = entries_of("weight", weight, np.float32, 4)
    m, c, kh, kw = live.shape
    if not isinstance(groups, int) or groups < 1 or m % groups:
        raise ArgumentError(f"groups={groups!r} must divide {m} output channels")
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    bits = live.values.view(np.uint32)
    return SparseConv.unchecked(
        **pack_taps(live.places, bits, c, (m, c, kh, kw), "float32", groups, geometry, block, image)
    )


def convolve(
    packed: SparseConv,
    x: NDArray[np.float32],
    *,
    bias: NDArray[np.float32] | None = None,
    residual: NDArray[np.float32] | None = None,
    clamp: Clamp = LINEAR,
    out: NDArray[np.float32] | None = None,
    threads: int = 1,
) -> NDArray[np.float32]:
    """``clamp(convolution + bias + residual)`` in float32.

    Args:
        x: (batch, channels, height, width).
        bias: (output channels).
        residual: of the output's shape.
        clamp: least and greatest output: ``LINEAR``, ``RELU``, ``RELU6`` or a pair of your own.
            NaN stays NaN. A NaN of the input reaches the outputs that have a tap on it.
        out: where the result is written, C-contiguous; None for a new array.
        threads: at most. Results do not depend on their number.

    Raises :class:`ArgumentError` for another dtype or shape. An empty batch gives an empty result.
    """
    if packed.element != "float32":
        raise ArgumentError(f"packed.element={packed.element!r}: this is for float32 weights")
    m, c, _, _ = packed.shape
    x = array("x", x, np.float32, (None, c * packed.groups, None, None))
    n, _, h, w = x.shape
    result = (n, m, *packed.output_size(h, w))
    if bias is not None:
        bias = array("bias", bias, np.float32, (m,))
    if residual is not None:
        residual = array("residual", residual, np.float32, result)
    out = output(out, result, np.float32)
    low, high = bounds(clamp)
    module = kernel("sparse_conv")
    if module is None:
        y = sums(packed, x)
        if bias is not None:
            y += bias[:, None, None]
        if residual is not None:
            y += residual
        np.clip(y, low, high, out=out)
        return out
    module.run(
        sizes(packed, n, c, h, w, result[2:]), packed.starts, packed.order, packed.taps,
        packed.values, x.view(np.uint32).reshape(-1), 0, None, bias,
        None if residual is None else residual.view(np.uint32).reshape(-1), 1.0, low, high, False,
        out.view(np.uint32).reshape(-1), threads,
    )  # fmt: skip
    return out


def linear(
    packed: SparseConv,
    x: NDArray[np.float32],
    *,
    bias: NDArray[np.float32] | None = None,
    clamp: Clamp = LINEAR,
    threads: int = 1,
) -> NDArray[np.float32]:
    """``clamp(x W^T + bias)`` for a packed weight of kernel 1 x 1; ``x``: (batch, inputs)."""
    x = array("x", x, np.float32, (None, packed.shape[1]))
    if packed.shape[2:] != (1, 1) or packed.groups != 1:
        raise ArgumentError(f"a linear layer has kernel 1 x 1 and one group, not {packed.shape}")
    if not len(x):
        return np.empty((0, packed.shape[0]), np.float32)
    across = np.ascontiguousarray(x.T)[None, :, None, :]
    y = convolve(packed, across, bias=bias, clamp=clamp, threads=threads)
    return np.ascontiguousarray(y[0, :, 0, :].T)


def output(out: NDArray[Any] | None, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """``out`` where it fits, or a new array."""
    if out is None:
        return np.empty(shape, dtype)
    array("out", out, dtype, shape)
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise ArgumentError("out must be C-contiguous and writeable")
    return out


def sizes(
    packed: SparseConv, n: int, channels: int, h: int, w: int, out: Sequence[int]
) -> list[int]:
    """The numbers of ``native/sparse_conv.cpp``, in its order; ``channels``: of a group."""
    _, _, kh, kw = packed.shape
    top, left = packed.padding[:2]
    return [
        ELEMENTS.index(packed.element), n, packed.groups, channels, packed.planes, h, w,
        packed.rows, kh, kw, *out, *packed.stride, top, left, *packed.dilation, packed.block, CHUNK,
    ]  # fmt: skip


def sums(packed: SparseConv, x: NDArray[Any], fill: int = 0) -> NDArray[Any]:
    """The plain convolution in numpy: of floats, or of integers exactly (as int32).

    ``x``: (batch, channels, height, width); ``fill``: of the padding.
    """
    exact = x.dtype != np.float32
    weight = packed.dense.astype(np.float64 if exact else np.float32)
    top, left, bottom, right = packed.padding
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    (dy, dx), (sy, sx), (m, c, kh, kw) = packed.dilation, packed.stride, packed.shape
    span = (dy * (kh - 1) + 1, dx * (kw - 1) + 1)
    windows = sliding_window_view(x, span, axis=(2, 3))[:, :, ::sy, ::sx, ::dy, ::dx]
    n, _, oh, ow = windows.shape[:4]
    columns = windows.reshape(n, packed.groups, c, oh, ow, kh, kw).transpose(1, 2, 5, 6, 0, 3, 4)
    columns = columns.reshape(packed.groups, c * kh * kw, n * oh * ow).astype(weight.dtype)
    y = weight.reshape(packed.groups, packed.rows, -1) @ columns
    y = y.reshape(m, n, oh, ow).transpose(1, 0, 2, 3)
    return np.ascontiguousarray(y.astype(np.int32) if exact else y)
