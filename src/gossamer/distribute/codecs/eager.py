"""The arithmetic of gradient codecs in plain torch: the oracle of every other back end.

Each back end has the functions of this module and gives the same bits. All is float32 with one
rounding an operation and nothing contracted, but for the statistics:

- ``statistics``: sum, sum of squares (float64) and largest magnitude (NaN unless all are finite).
  Chunks of 4096 elements, in each 16 lanes (element e in lane e % 16) added up in order; lanes are
  folded in halves (i with i + 8, + 4, + 2, + 1); chunks are folded in neighbouring pairs.
- ``encode``: with ``inv = top / scale``, ``v = min(|g| inv, top)``, q = trunc(v) and f = v - q, the
  code is ``q + [u < f]`` with the sign of g. u is a 16-bit word w of the element's stream:
  ``d = 65536 f - w`` rounds up where ``d >= 1``, and where ``0 < d < 1`` if the element's 24-bit
  word is below ``2**24 d``. So the chance is f, rounded up to a multiple of 2**-40. A scale that is
  not finite, zero or so small that inv is infinite leaves all bits 0. A NaN or an infinity in g
  counts as ``top``: scales tell of them.
- ``half`` codes (no zero; 2 q - 1 or its negative, ``top`` half the largest code):
  ``v = min(|g| inv, top) + 1/2``, q as above, magnitude bits ``max(q - 1, 0)``, and where q is 0
  the sign is that of -g.
- ``decode_mean``: ``(sum_r unit_r code_r) * (1 / divisor)``, ranks in order, ``unit = scale /
  levels``, NaN everywhere if a scale is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.distribute.codecs.random import Key, tie_words, words
from gossamer.distribute.wire import planes
from gossamer.distribute.wire.planes import Form

__all__ = ["Layout", "decode_mean", "decode_sums", "encode", "pack_sums", "statistics", "sum_codes"]

CHUNK, LANES = 4096, 16
_AT_ONCE = 320 * 4096  # elements whose intermediate values are held


@dataclass(frozen=True)
class Layout:
    """How codes lie: ``planes`` magnitude bits and a sign, ``levels`` the largest code."""

    levels: int
    planes: int
    half: bool = False  # codes 2 q - 1: no zero
    random: bool = True  # False: the sign alone

    @property
    def top(self) -> float:
        """The largest value before rounding."""
        return self.levels / 2 if self.half else float(self.levels)

    def sum_type(self, count: int) -> torch.dtype:
        """The smallest integer type that holds ``count`` of any codes that can be sent."""
        most = count * ((2 << self.planes) - 1 if self.half else (1 << self.planes) - 1)
        return torch.int8 if most < 128 else torch.int16 if most < 32768 else torch.int32


def fold(parts: Tensor) -> Tensor:
    """Add up neighbouring pairs along the first dimension until one is left."""
    while parts.shape[0] > 1:
        if parts.shape[0] % 2:
            parts = torch.cat([parts, torch.zeros_like(parts[:1])])
        parts = parts[0::2] + parts[1::2]
    return parts[0]


def fold_lanes(lanes: Tensor) -> Tensor:
    """Rows of 16 lanes to their sums, in halves."""
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
    return lanes[:, 0]


def lane_sums(rows: Tensor) -> Tensor:
    """Sums of rows (count, length) in float64, over 16 lanes in order; length divides by 16."""
    lanes = rows.reshape(rows.shape[0], rows.shape[1] // LANES, LANES)
    total = torch.zeros(rows.shape[0], LANES, dtype=torch.float64, device=rows.device)
    for i in range(lanes.shape[1]):
        total += lanes[:, i]
    return fold_lanes(total)


def statistics(g: Tensor, absolute: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Sum (of magnitudes where ``absolute``), sum of squares, largest magnitude of flat float32."""
    bits = g.view(torch.int32) & 0x7FFFFFFF
    largest = bits.amax() if g.numel() else bits.sum().int()
    top = largest.view(torch.float32)
    top = torch.where(largest >= 0x7F800000, torch.full_like(top, math.nan), top)
    sums, squares = [], []
    for start in range(0, g.numel(), CHUNK * 256):
        part = g[start : start + CHUNK * 256].double()
        part = part.abs() if absolute else part
        rows = pad(part, (0, -part.numel() % CHUNK)).reshape(-1, CHUNK)
        sums.append(lane_sums(rows))
        squares.append(lane_sums(rows * rows))
    if not sums:
        sums = squares = [torch.zeros(1, dtype=torch.float64, device=g.device)]
    return fold(torch.cat(sums)), fold(torch.cat(squares)), top


def _codes(
    g: Tensor, scale: Tensor, layout: Layout, key: Key, shift: int, start: int
) -> tuple[Tensor, Tensor]:
    """Magnitude bits (uint8) and signs of one part of a tensor, from element ``start`` on."""
    neg = torch.signbit(g)
    inv = layout.top / scale
    usable = torch.isfinite(scale) & (scale > 0) & torch.isfinite(inv)
    if not layout.random:
        return torch.zeros_like(neg, dtype=torch.uint8), neg & usable
    v = g.abs() * inv
    top = torch.tensor(layout.top, device=g.device)
    v = torch.where(v < top, v, top)
    if layout.half:
        v = v + 0.5
    q = v.trunc()
    word = words(key, start, g.numel(), g.device) + shift & 0xFFFF
    d = (v - q) * 65536.0 - word
    up = d >= 1
    tied = ((d > 0) & ~up).nonzero().squeeze(1)
    if tied.numel():
        ties = tie_words(key, start, g.numel(), g.device)[tied]
        up[tied] = ties < d[tied] * 16777216.0
    code = q.to(torch.int32) + up
    if layout.half:
        neg = neg ^ (code == 0)
        return ((code - 1).clamp(min=0) * usable).to(torch.uint8), neg & usable
    code = code * usable
    return code.to(torch.uint8), neg & (code > 0)


def encode(
    g: Tensor, scale: Tensor, layout: Layout, key: Key, shift: int, form: Form, out: Tensor
) -> int:
    """Encode flat float32 ``g`` into the front of ``out``; returns the bytes written."""
    parts = [
        _codes(g[at : at + _AT_ONCE], scale, layout, key, shift, at)
        for at in range(0, g.numel(), _AT_ONCE)
    ]
    if not parts:
        return 0
    magnitude, neg = (torch.cat(column) for column in zip(*parts, strict=True))
    payload = planes.pack(magnitude, neg, layout.planes, form)
    out[: payload.numel()] = payload
    return payload.numel()


def _signed(payload: Tensor, form: Form, numel: int, layout: Layout) -> Tensor:
    """Codes as int32."""
    magnitude, neg = planes.unpack(payload, numel, layout.planes, form)
    code = 2 * magnitude + 1 if layout.half else magnitude
    return torch.where(neg, -code, code)


def decode_mean(
    payloads: Sequence[Tensor],
    forms: Sequence[Form],
    scales: Tensor,
    layout: Layout,
    out: Tensor,
    divisor: int,
) -> None:
    """Write the mean of several payloads, with one scale each, over flat float32 ``out``."""
    codes = [_signed(p, f, out.numel(), layout) for p, f in zip(payloads, forms, strict=True)]
    nan = torch.full_like(scales, math.nan)
    units = torch.where(torch.isfinite(scales), scales, nan) / float(layout.levels)
    total = torch.zeros_like(out)
    for code, unit in zip(codes, units, strict=True):
        total += code.float() * unit
    out.copy_(total * torch.tensor(1 / divisor, dtype=torch.float32, device=out.device))


def sum_codes(
    payloads: Sequence[Tensor], forms: Sequence[Form], numel: int, layout: Layout
) -> Tensor:
    """The exact integer sum of several payloads' codes."""
    device = payloads[0].device
    total = torch.zeros(numel, dtype=layout.sum_type(len(payloads)), device=device)
    for payload, form in zip(payloads, forms, strict=True):
        total += _signed(payload, form, numel, layout).to(total.dtype)
    return total


def pack_sums(sums: Tensor, bits: int, form: Form) -> Tensor:
    """Integer sums to bytes: :func:`gossamer.distribute.wire.planes.pack_sums`."""
    return planes.pack_sums(sums, bits, form)


def decode_sums(packed: Tensor, bits: int, form: Form, factor: Tensor, out: Tensor) -> None:
    """Write packed sums times ``factor`` (float32) over flat float32 ``out``."""
    sums = planes.unpack_sums(packed, out.numel(), bits, form)
    out.copy_(sums.float() * torch.where(torch.isfinite(factor), factor, math.nan))
