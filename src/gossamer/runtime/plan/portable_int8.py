"""Operators on codes of seven bits, in numpy: the same bits as the compiled kernels.

Sums are exact: products of codes are multiplied in float32 over at most 1024 terms, whose sum stays
below 2^24, and those sums are added as int32. What follows is float32, operation by operation as
the compiled kernels do it: ``sum * factor + shift + added * step``, clamped, and for codes rounded
to the nearest, ties to even. Values and layouts: :mod:`gossamer.runtime.kernels.eight_bits`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.runtime.kernels.arrays import bounds, countable
from gossamer.runtime.kernels.eight_bits import TOP, Scale
from gossamer.runtime.plan.frames import framed, taps

__all__ = ["RULES", "affine", "clamps", "fits", "no_nan"]

Array = np.ndarray
Call = Callable[[], object]
_EXACT = 1024  # products of two seven-bit numbers whose sum is below 2^24


def affine(a: Mapping[str, Any]) -> tuple[np.float32, np.float32]:
    """Factor and shift of ``dequantize``; raises :class:`ArgumentError` for no scale."""
    scale = Scale(a["scale"], a["zero"])
    return np.float32(scale.scale), np.float32(-scale.zero * scale.scale)


def clamps(a: Mapping[str, Any], y: Array) -> tuple[float, float]:
    """The least and greatest result; raises :class:`ArgumentError` where no code stands for one."""
    low, high = bounds((a["low"], a["high"]))
    if y.dtype == np.uint8 and not 0 <= low <= high <= TOP:
        raise ArgumentError(f"codes of {low} to {high}: there are those of 0 to {TOP}")
    return low, high


def no_nan(x: Array) -> None:
    """Raise :class:`ArgumentError` for values that no code stands for."""
    if not math.isfinite(np.add.reduce(x, None)) and not np.isfinite(x).all():
        raise ArgumentError(
            "a value is NaN or infinite, which no code of an int8 plan stands for; compile with "
            "precision='float32'"
        )


def _planes(quads: Array, channels: int) -> Array:
    """(N, quads, H, W, 4) as (N, channels, H, W)."""
    n, q, h, w, _ = quads.shape
    return quads.transpose(0, 1, 4, 2, 3).reshape(n, 4 * q, h, w)[:, :channels]


def _to_quads(values: Array, y: Array) -> None:
    """Write whole numbers (N, channels, H, W) to quads; channels that fill up are zero."""
    n, q, h, w, _ = y.shape
    full = np.zeros((n, 4 * q, h, w), np.uint8)
    full[:, : values.shape[1]] = values
    np.copyto(y, full.reshape(n, q, 4, h, w).transpose(0, 1, 3, 4, 2))


def _quantize(a: Mapping[str, Any], y: Array, x: Array) -> Call:
    scale = Scale(a["scale"], a["zero"])
    inverse, zero = np.float32(1 / scale.scale), np.float32(scale.zero)
    fits(y, x)

    def call() -> None:
        no_nan(x)
        codes = np.clip(np.rint(x * inverse + zero), 0, TOP)
        if x.ndim == 4:
            _to_quads(codes, y)
        else:
            np.copyto(y, codes, casting="unsafe")

    return call


def fits(quads: Array, plain: Array) -> None:
    """Raise :class:`ArgumentError` for codes that are not of the shape of these values."""
    n, c, *rest = plain.shape
    shape = (n, -(-c // 4), *rest, 4) if rest else (n, c)
    if quads.shape != shape or plain.ndim not in (2, 4) or quads.dtype != np.uint8:
        raise ArgumentError(f"values of {plain.shape} are no codes of {quads.shape}")


def _dequantize(a: Mapping[str, Any], y: Array, x: Array) -> Call:
    factor, shift = affine(a)
    fits(x, y)

    def call() -> None:
        codes = _planes(x, y.shape[1]) if x.ndim == 5 else x
        np.add(codes.astype(np.float32) * factor, shift, out=y)

    return call


def _conv(a: Mapping[str, Any], y: Array, x: Array, w: Array, factor: Array, shift: Array,
          more: Array | None) -> Call:  # fmt: skip
    groups, codes, (low, high) = a["groups"], y.dtype == np.uint8, clamps(a, y)
    channels, places = w.shape[1] * groups, (y.shape[2:4] if codes else y.shape[2:])
    zero = Scale(1.0, a["zero"]).zero
    plain = np.empty((len(x), channels, *x.shape[2:4]), np.float32)
    frame, fill = framed(plain, a["padding"], zero)
    seen = taps(frame, {**a, "kernel": w.shape[2:]}, places)
    columns = np.empty((channels, len(seen), *places), np.float32)
    unrolled = columns.reshape(groups, -1, math.prod(places))
    matrix = w.reshape(groups, len(w) // groups, -1).astype(np.float32)
    ends = factor.reshape(-1, 1, 1), shift.reshape(-1, 1, 1), np.float32(a["step"])

    def call() -> None:
        np.copyto(plain, _planes(x, channels))
        fill()
        for n in range(len(x)):
            for i, tap in enumerate(seen):
                columns[:, i] = tap[n]
            sums = _product(matrix, unrolled).reshape(len(w), *places)
            v = sums.astype(np.float32) * ends[0] + ends[1]
            if more is not None:
                added = _planes(more[n : n + 1], len(w))[0] if codes else more[n]
                v += added.astype(np.float32) * ends[2]
            np.clip(v, np.float32(low), np.float32(high), out=v)
            if codes:
                _to_quads(np.rint(v)[None], y[n : n + 1])
            else:
                np.copyto(y[n], v)

    return call


def _product(one: Array, other: Array) -> Array:
    """The product of whole numbers held in float32, exactly: int32."""
    total = np.zeros((*one.shape[:-1], other.shape[-1]), np.int32)
    for i in range(0, one.shape[-1], _EXACT):
        part = np.matmul(one[..., i : i + _EXACT], other[..., i : i + _EXACT, :])
        total += part.astype(np.int32)
    return total


def _linear(
    a: Mapping[str, Any], y: Array, x: Array, w: Array, factor: Array, shift: Array
) -> Call:
    turned, (low, high) = w.T.astype(np.float32), clamps(a, y)
    countable(w.shape[1])

    def call() -> None:
        v = _product(x.astype(np.float32), turned).astype(np.float32) * factor + shift
        np.clip(v, np.float32(low), np.float32(high), out=v)
        np.copyto(y, np.rint(v) if y.dtype == np.uint8 else v, casting="unsafe")

    return call


def _max_pool(a: Mapping[str, Any], y: Array, x: Array) -> Call:
    """Down first, whole rows at a time, then across all rows in one sweep; then every stride-th."""
    padding = [*a["padding"], [0, 0]]
    frame, fill = framed(x, padding, 0)
    n, q, h, w, _ = frame.shape
    (kh, kw), (sy, sx), (dy, dx) = a["kernel"], a["stride"], a["dilation"]
    down = np.empty((n, q, y.shape[2], 4 * w), np.uint8)
    wide, flat = frame.reshape(n, q, h, 4 * w), down.reshape(-1)
    across = np.empty_like(flat)
    rows = [wide[:, :, i * dy : i * dy + (y.shape[2] - 1) * sy + 1 : sy] for i in range(kh)]
    size = flat.size - 4 * dx * (kw - 1)
    steps = [flat[4 * dx * i : 4 * dx * i + size] for i in range(kw)]
    pixels = across.view(np.uint32).reshape(n, q, -1, w)[..., : (y.shape[3] - 1) * sx + 1 : sx]
    out = y.view(np.uint32)[..., 0]
    if pixels.shape != out.shape:
        raise ArgumentError(f"windows over {x.shape} do not give {y.shape}")

    def call() -> None:
        fill()
        np.copyto(down, rows[0])
        for row in rows[1:]:
            np.maximum(down, row, out=down)
        np.copyto(across[:size], steps[0])
        for step in steps[1:]:
            np.maximum(across[:size], step, out=across[:size])
        np.copyto(out, pixels)

    return call


RULES: Mapping[str, Callable[..., Call]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "conv_int8": _conv,
    "linear_int8": _linear,
    "max_pool_int8": _max_pool,
}
"""Operator -> attributes, result, inputs -> the call."""
