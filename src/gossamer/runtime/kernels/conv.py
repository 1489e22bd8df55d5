"""Direct sparse convolution (``native/sparse_conv.cpp``): weights in blocks of input channels.

A weight that is not zero is a *tap*: one broadcast and a row of multiply-adds over shifted copies
of the input. Taps are grouped by blocks of input channels whose copies fit the first-level cache
and, inside a block, by output channels. Any stride, padding, dilation, number of groups, size of
map and batch; a map whose size is known before only chooses the blocks.

A linear layer on a batch is a convolution of kernel 1 with the samples as the map:
:func:`linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels.arrays import (
    LINEAR,
    Clamp,
    array,
    bounds,
)
from gossamer.runtime.kernels.entries import Entries, entries_of
from gossamer.runtime.kernels.taps import CHUNK, ELEMENTS, SparseConv, pack_taps

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SparseConv", "bound", "convolve", "linear", "pack_conv"]


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
    if kernel("sparse_conv") is None:
        y = sums(packed, x)
        if bias is not None:
            y += bias[:, None, None]
        if residual is not None:
            y += residual
        np.clip(y, low, high, out=out)
        return out
    bound(packed, x, out, bias=bias, added=residual, ends=(low, high), threads=threads)()
    return out


def bound(
    packed: SparseConv,
    x: NDArray[Any],
    y: NDArray[Any],
    *,
    scale: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
    added: NDArray[Any] | None = None,
    step: float = 1.0,
    fill: int = 0,
    ends: tuple[float, float] = LINEAR,
    threads: int = 1,
) -> Callable[[], object]:
    """The compiled convolution of x to y, as often as it is called: looked at here, once.

    Args:
        x, y: float32 (N, C, H, W), or codes in quads, uint8 (N, quads, H, W, 4).
        scale, bias, added, step, ends: the end of a sum, ``sum * scale + bias + added * step``,
            between two values; in codes where y is.
        fill: the padding's element.

    Raises :class:`ArgumentError` where the arrays do not fit. The weight must stay as it is.
    """
    n, c, h, w = x.shape[:4]
    m, size, codes = packed.shape[0], packed.output_size(h, w), y.dtype == np.uint8
    shape = (n, -(-m // 4), *size, 4) if codes else (n, m, *size)
    if y.shape != shape or (added is not None and (added.shape, added.dtype) != (shape, y.dtype)):
        raise ArgumentError(f"a convolution of {x.shape} does not give {y.shape}")
    module: Any = kernel("sparse_conv")

    def flat(array: NDArray[Any]) -> NDArray[np.uint32]:
        return array.view(np.uint32).reshape(-1)

    made: Callable[[], object] = module.Convolution(
        sizes(packed, n, c // packed.groups, h, w, size), packed.starts, packed.order, packed.taps,
        packed.values, flat(x), fill, scale, bias, None if added is None else flat(added), step,
        *ends, codes, flat(y), threads,
    )  # fmt: skip
    return made


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
