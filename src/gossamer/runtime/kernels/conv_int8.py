"""Sparse convolution of 8-bit activations (``native/sparse_conv.cpp``), requantized as sums leave.

Weights are signed bytes with a scale for each output channel. A tap holds four input channels of a
pixel (1 x 4 blocks along the input channels: one multiply-add of bytes), or two of them widened to
16 bits: fewer zeros are multiplied then, which is what an unstructured weight needs on a processor
without VNNI. Sums are exact integers, so that both, and every processor, give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.core.errors import ArgumentError, one_of
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels.arrays import (
    LINEAR,
    Clamp,
    array,
    bounds,
    countable,
    dot_products,
    frozen,
    weights,
)
from gossamer.runtime.kernels.conv import SparseConv, bound, output, sums
from gossamer.runtime.kernels.eight_bits import TOP, Scale, from_quads, to_quads
from gossamer.runtime.kernels.entries import Entries, entries_of
from gossamer.runtime.kernels.grid import row_step
from gossamer.runtime.kernels.taps import pack_taps

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Int8Conv", "convolve_int8", "pack_codes", "pack_conv_int8", "weight_codes"]


@dataclass(frozen=True)
class Int8Conv:
    """A packed convolution from codes to codes, or to float32.

    Attributes:
        taps: the weight's codes.
        channels: input channels in all, before any filling up.
        source: what the input's codes mean.
        target: what the output's codes mean; None for a float32 output.
        scale, bias: float32, (output channels): ``sum * scale + bias`` is the output's value, in
            steps of ``target`` and around its zero point where it has one.
    """

    taps: SparseConv
    channels: int
    source: Scale
    target: Scale | None
    scale: NDArray[np.float32] = field(repr=False)
    bias: NDArray[np.float32] = field(repr=False)


def weight_codes(
    weight: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Codes of -127 to 127, and the scale of each output channel.

    A channel whose values lie on a grid (:mod:`gossamer.runtime.kernels.grid`) keeps it, without an
    error. Else to the nearest: a value below half its channel's step becomes zero.
    """
    top = np.abs(weight.reshape(len(weight), -1)).max(axis=1).astype(np.float64)
    scale = np.where(top > 0, top / 127, 1.0)
    for i, row in enumerate(weight.reshape(len(weight), -1)):
        step = row_step(row, 127)
        if step is not None:
            scale[i] = step
    codes = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1)))
    return codes.astype(np.int8), scale


def pack_conv_int8(
    weight: NDArray[np.float32],
    *,
    source: Scale,
    target: Scale | None = None,
    bias: NDArray[np.float32] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    element: str = "auto",
    block: int | None = None,
    image: Sequence[int] | None = None,
) -> Int8Conv:
    """Quantize a float32 weight (output channels, channels of a group, height, width) and pack it.

    Args:
        source, target: what codes of input and output mean; without ``target`` the output is
            float32.
        element: ``quads`` (1 x 4 blocks of bytes), ``pairs`` (1 x 2, widened to 16 bits), or
            ``auto``: what takes this processor less time.
        block: planes in a block of input channels; None for a rule.
        image: height and width of the inputs, where they are known: for the rule.

    Groups whose channels do not come in fours are packed as one group with zeros between.

    Raises :class:`ArgumentError` as :func:`gossamer.runtime.kernels.conv.pack_conv` does.
    """
    weight = weights("weight", weight, 4)
    codes, scale = weight_codes(weight)
    taps = pack_codes(
        codes,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        element=element,
        block=block,
        image=image,
    )
    m = len(codes)
    step = scale * source.scale
    offset = np.zeros(m) if bias is None else array("bias", bias, np.float32, (m,)).astype(float)
    offset = offset - step * source.zero * codes.reshape(m, -1).sum(axis=1, dtype=np.int64)
    if target is not None:
        step, offset = step / target.scale, offset / target.scale + target.zero
    return Int8Conv(
        taps,
        codes.shape[1] * groups,
        source,
        target,
        frozen(step.astype(np.float32)),
        frozen(offset.astype(np.float32)),
    )


def pack_codes(
    codes: NDArray[np.int8] | Entries,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    element: str = "auto",
    block: int | None = None,
    image: Sequence[int] | None = None,
) -> SparseConv:
    """Pack a weight of bytes, (output channels, channels of a group, height, width), as they are.

    ``codes``: the array, or its entries.

    Settings and errors as of :func:`pack_conv_int8`.
    """
    one_of("element", element, ("auto", "quads", "pairs"))
    live = entries_of("codes", codes, np.int8, 4)
    m, c, kh, kw = live.shape
    if not isinstance(groups, int) or groups < 1 or m % groups:
        raise ArgumentError(f"groups={groups!r} must divide {m} output channels")
    countable(c * kh * kw)
    row = live.places // (kh * kw)
    at = live.places - row * (kh * kw)  # in the kernel
    out = row // c
    channel = row - out * c
    if groups > 1 and (c % 4 or (m // groups) % 4):  # one group, with zeros between
        channel += out // (m // groups) * c
        c, groups = groups * c, 1

    def planes(per: int) -> NDArray[np.integer[Any]]:
        """Of each code: its block of channels among (outputs, blocks, height, width), flat."""
        count = -(-c // per)
        wide = out.astype(np.int64) if m * count * kh * kw >= 2**31 else out
        return (wide * count + channel // per) * (kh * kw) + at

    if element == "auto":
        element = _cheaper(len(np.unique(planes(2))), len(np.unique(planes(4))))
    per, kind = (4, np.int8) if element == "quads" else (2, np.int16)
    places, which = np.unique(planes(per), return_inverse=True)
    bits = np.zeros((len(places), per), kind)
    bits[which, channel % per] = live.values
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    return SparseConv.unchecked(
        **pack_taps(
            places, bits.view(np.uint32)[:, 0], -(-c // per), (m, c, kh, kw), element, groups,
            geometry, block, image,
        )
    )  # fmt: skip


def _cheaper(pairs: int, quads: int) -> str:
    """``quads`` or ``pairs``: without VNNI a quad takes about 1.45 times as long (Zen 3)."""
    cost = 1 if dot_products() else 1.45
    return "quads" if cost * quads <= pairs else "pairs"


def convolve_int8(
    packed: Int8Conv,
    x: NDArray[np.uint8],
    *,
    residual: NDArray[Any] | None = None,
    residual_scale: Scale | None = None,
    clamp: Clamp = LINEAR,
    out: NDArray[Any] | None = None,
    threads: int = 1,
) -> NDArray[Any]:
    """``clamp(convolution + bias + residual)``, as codes in quads or as float32.

    Args:
        x: (batch, quads, height, width, 4) of 7-bit codes (:mod:`.eight_bits`).
        residual: of the output's shape and kind; codes need ``residual_scale``.
        clamp: least and greatest value of the output, in its own units (not codes).
        out: where the result is written, C-contiguous; None for a new array.
        threads: at most. Results do not depend on their number.

    Returns:
        uint8, (batch, quads, height, width, 4), or float32, (batch, channels, height, width).

    Raises :class:`ArgumentError` for another dtype or shape, and for codes above 127.
    """
    taps, target = packed.taps, packed.target
    m, quads = taps.shape[0], -(-packed.channels // 4)
    x = array("x", x, np.uint8, (None, quads, None, None, 4))
    if x.size and x.max() > TOP:
        raise ArgumentError(f"x has codes up to {x.max()}; activations have seven bits, 0 to {TOP}")
    n, _, h, w, _ = x.shape
    oh, ow = taps.output_size(h, w)
    shape: tuple[int, ...] = (n, m, oh, ow) if target is None else (n, -(-m // 4), oh, ow, 4)
    kind: Any = np.float32 if target is None else np.uint8
    out = output(out, shape, kind)
    low, high = bounds(clamp)
    bias, step = packed.bias, 1.0
    if target is not None:
        low = max(0.0, round(target.zero + low / target.scale) if low > -np.inf else 0.0)
        high = min(float(TOP), round(target.zero + high / target.scale) if high < np.inf else TOP)
    if residual is not None:
        residual = array("residual", residual, kind, shape)
        if target is not None:
            if residual_scale is None:
                raise ArgumentError("a residual of codes needs residual_scale")
            step = residual_scale.scale / target.scale
            bias = (bias.astype(np.float64) - step * residual_scale.zero).astype(np.float32)
    if kernel("sparse_conv") is None:
        out[...] = _twin(packed, x, bias, residual, np.float32(step), low, high)
        return out
    bound(
        taps, x, out, scale=packed.scale, bias=bias, added=residual, step=step,
        fill=packed.source.zero * 0x01010101, ends=(low, high), threads=threads,
    )()  # fmt: skip
    return out


def _twin(
    packed: Int8Conv,
    x: NDArray[np.uint8],
    bias: NDArray[np.float32],
    residual: NDArray[Any] | None,
    step: np.float32,
    low: float,
    high: float,
) -> NDArray[Any]:
    """The same in numpy, operation by operation: the same bits."""
    codes = from_quads(x, packed.channels)
    total = sums(packed.taps, codes.astype(np.int32), packed.source.zero).astype(np.float32)
    y = total * packed.scale[:, None, None] + bias[:, None, None]
    if packed.target is None:
        if residual is not None:
            y += residual * step
        return np.clip(y, np.float32(low), np.float32(high))
    if residual is not None:
        y += from_quads(residual, packed.taps.shape[0]).astype(np.float32) * step
    return to_quads(np.rint(np.clip(y, np.float32(low), np.float32(high))).astype(np.uint8))
