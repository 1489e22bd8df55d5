"""Gradient codecs on CUDA by Triton: the functions of :mod:`gossamer.distribute.codecs.eager`.

Statistics, encoding and decoding are kernels; what comes less often (gapless signs, base 3, sums)
is torch's. Bits are those of the other back ends, but for those inside a NaN: products and sums are
never contracted (``enable_fp_fusion=False``), and what is divided is divided by torch.

Import this module only where triton is installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.distribute.codecs.eager import (
    CHUNK,
    LANES,
    Layout,
    decode_sums,
    fold,
    fold_lanes,
    pack_sums,
    sum_codes,
)
from gossamer.distribute.codecs.random import Key
from gossamer.distribute.wire import planes
from gossamer.distribute.wire.planes import Form, groups

__all__ = ["decode_mean", "decode_sums", "encode", "pack_sums", "statistics", "sum_codes"]

_BYTES = tl.constexpr(128)  # of one plane that a program writes: 1024 elements
_CHUNKS = tl.constexpr(32)  # that a program adds up


@triton.jit
def _hash(c, a, b):
    """The hash of :mod:`gossamer.distribute.codecs.random`, of uint32."""
    x = c + a
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x ^ b
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _encode(
    g_at,
    inv_at,
    keys_at,
    out_at,
    n,
    shift,
    top,
    P: tl.constexpr,
    HALF: tl.constexpr,
    RANDOM: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * _BYTES + tl.arange(0, _BYTES)
    lane = tl.arange(0, 8)
    e = byte[:, None] * 8 + lane[None, :]
    inside = e < n
    a = tl.load(g_at + e, mask=inside, other=0.0)
    inv = tl.load(inv_at)
    neg = (a.to(tl.int32, bitcast=True) < 0).to(tl.int32)
    used = (inv > 0).to(tl.int32)
    row = byte // 8 * (8 * (P + 1)) + byte % 8
    fits = byte < (n + 63) // 64 * 8
    if RANDOM:
        k0 = tl.load(keys_at).to(tl.uint32)
        k1 = tl.load(keys_at + 1).to(tl.uint32)
        k2 = tl.load(keys_at + 2).to(tl.uint32)
        k3 = tl.load(keys_at + 3).to(tl.uint32)
        v = tl.abs(a) * inv
        v = tl.where(v < top, v, top)
        if HALF:
            v = v + 0.5
        q = v.to(tl.int32)
        x = _hash(((e >> 5) * 16 + (e & 15)).to(tl.uint32), k0, k1)
        x = x >> (e & 16).to(tl.uint32)
        word = (x + shift.to(tl.uint32)) & 0xFFFF
        d = (v - q.to(tl.float32)) * 65536.0 - word.to(tl.int32).to(tl.float32)
        tie = (_hash(e.to(tl.uint32), k2, k3) >> 8).to(tl.int32).to(tl.float32)
        q = q + ((d >= 1.0) | ((d > 0.0) & (tie < d * 16777216.0))).to(tl.int32)
        if HALF:
            neg = neg ^ (q == 0).to(tl.int32)
            q = tl.maximum(q - 1, 0)
        else:
            neg = neg & (q > 0).to(tl.int32)
        for b in tl.static_range(P):
            bit = tl.where(inside, (q >> b) & used, 0) << lane[None, :]
            tl.store(out_at + row + 8 * b, tl.sum(bit, 1).to(tl.uint8), mask=fits)
    bit = tl.where(inside, neg & used, 0) << lane[None, :]
    tl.store(out_at + row + 8 * P, tl.sum(bit, 1).to(tl.uint8), mask=fits)


@triton.jit
def _mean(data_at, units_at, out_at, n, stride, count, factor, P: tl.constexpr, HALF: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * _BYTES + tl.arange(0, _BYTES)
    lane = tl.arange(0, 8)
    e = byte[:, None] * 8 + lane[None, :]
    row = byte // 8 * (8 * (P + 1)) + byte % 8
    fits = byte < (n + 63) // 64 * 8
    total = tl.zeros([_BYTES, 8], tl.float32)
    at = data_at + row
    for s in range(count):
        unit = tl.load(units_at + s)
        code = tl.zeros([_BYTES, 8], tl.int32)
        for b in tl.static_range(P):
            plane = tl.load(at + 8 * b, mask=fits, other=0).to(tl.int32)
            code += ((plane[:, None] >> lane[None, :]) & 1) << b
        if HALF:
            code = 2 * code + 1
        sign = tl.load(at + 8 * P, mask=fits, other=0).to(tl.int32)
        code = tl.where((sign[:, None] >> lane[None, :]) & 1 != 0, -code, code)
        total = total + code.to(tl.float32) * unit
        at += stride
    tl.store(out_at + e, total * factor, mask=e < n)


@triton.jit
def _lane_sums(g_at, sums_at, squares_at, n, ABSOLUTE: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64) * _CHUNKS + tl.arange(0, _CHUNKS)
    lane = tl.arange(0, 16)
    at = chunk[:, None] * 4096 + lane[None, :]
    total = tl.zeros([_CHUNKS, 16], tl.float64)
    squares = tl.zeros([_CHUNKS, 16], tl.float64)
    for i in range(256):
        e = at + 16 * i
        v = tl.load(g_at + e, mask=e < n, other=0.0).to(tl.float64)
        if ABSOLUTE:
            v = tl.abs(v)
        total += v
        squares += v * v
    to = chunk[:, None] * 16 + lane[None, :]
    fits = to < (n + 4095) // 4096 * 16
    tl.store(sums_at + to, total, mask=fits)
    tl.store(squares_at + to, squares, mask=fits)


def statistics(g: Tensor, absolute: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Sum (of magnitudes where ``absolute``), sum of squares, largest magnitude of flat float32."""
    bits = g.view(torch.int32) & 0x7FFFFFFF
    largest = bits.amax() if g.numel() else bits.sum().int()
    top = largest.view(torch.float32)
    top = torch.where(largest >= 0x7F800000, torch.full_like(top, math.nan), top)
    chunks = -(-g.numel() // CHUNK)
    lanes = torch.zeros(2, max(chunks, 1), LANES, dtype=torch.float64, device=g.device)
    if chunks:
        grid = (-(-chunks // _CHUNKS.value),)
        _lane_sums[grid](g, lanes[0], lanes[1], g.numel(), absolute, enable_fp_fusion=False)
    return fold(fold_lanes(lanes[0])), fold(fold_lanes(lanes[1])), top


def encode(
    g: Tensor, scale: Tensor, layout: Layout, key: Key, shift: int, form: Form, out: Tensor
) -> int:
    """Encode flat float32 ``g`` into the front of ``out``; returns the bytes written."""
    n = g.numel()
    if not n:
        return 0
    size = planes.payload_bytes(n, layout.planes, "planes")
    whole = out if form == "planes" else torch.empty(size, dtype=torch.uint8, device=g.device)
    inv = layout.top / scale
    usable = torch.isfinite(scale) & (scale > 0) & torch.isfinite(inv)
    inv = torch.where(usable, inv, torch.zeros_like(inv)).reshape(1)
    keys = torch.tensor(key.words, dtype=torch.int64, device=g.device)
    grid = (-(-8 * groups(n) // _BYTES.value),)
    _encode[grid](
        g,
        inv,
        keys,
        whole,
        n,
        shift,
        layout.top,
        layout.planes,
        layout.half,
        layout.random,
        enable_fp_fusion=False,
    )
    if form == "planes":
        return size
    payload = planes.pack(*planes.unpack(whole, n, layout.planes, "planes"), layout.planes, form)
    out[: payload.numel()] = payload
    return payload.numel()


def decode_mean(
    payloads: Sequence[Tensor],
    forms: Sequence[Form],
    scales: Tensor,
    layout: Layout,
    out: Tensor,
    divisor: int,
) -> None:
    """Write the mean of several payloads, with one scale each, over flat float32 ``out``."""
    n, p = out.numel(), layout.planes
    rows = []
    for payload, form in zip(payloads, forms, strict=True):
        codes = planes.unpack(payload, n, p, form)  # checks, too
        rows.append(payload if form == "planes" else planes.pack(*codes, p, "planes"))
    if not n:
        return
    data = torch.stack(rows)
    nan = torch.full_like(scales, math.nan)
    units = torch.where(torch.isfinite(scales), scales, nan) / float(layout.levels)
    grid = (-(-8 * groups(n) // _BYTES.value),)
    _mean[grid](
        data,
        units,
        out,
        n,
        data.shape[1],
        len(rows),
        1 / divisor,
        p,
        layout.half,
        enable_fp_fusion=False,
    )
