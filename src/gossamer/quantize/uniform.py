"""Uniform quantization with a dead zone: values on the grid ``k * step``.

At high rate a uniform grid followed by entropy coding is within 0.25 bits a sample of the rate
distortion function and beats the least-squares code book at equal entropy (Gish and Pierce 1968);
widening the zero bin (Sullivan 1996) is its simplest rate control. The values are exactly
``float32(k) * float32(step)``, so that a file needs the step alone in place of a code book.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError
from gossamer.quantize.scalar import MOST_CODES, from_levels, grid_step, grid_values, values_of

__all__ = ["uniform"]


def uniform(
    tensor: Tensor,
    *,
    step: float | None = None,
    bits: int | None = None,
    dead_zone: float = 0.5,
    threads: int | None = None,
    name: str = "tensor",
) -> Quantized:
    """Round to multiples of a step; halves away from zero.

    Args:
        tensor: any shape; float32, float64, float16 or bfloat16.
        step: grid spacing, in the unit of the values; taken to single precision.
        bits: in place of ``step``: the finest grid of at most 2^bits values, zero included.
        dead_zone: values below ``dead_zone * step`` become zero; 0.5 rounds to nearest.
        threads, name: as for :func:`gossamer.quantize.share`.

    Returns codes and the code book of the multiples in use: zero, then ascending.

    >>> uniform(torch.tensor([0.6, -0.25, 0.2, 1.0]), step=0.5).dequantize()
    tensor([ 0.5000, -0.5000,  0.0000,  1.0000])

    Raises :class:`ArgumentError` for NaN or infinite values, a step that is not positive or needs
    more than 65535 multiples, ``bits`` outside 1 to 16, and a negative dead zone.
    """
    if (step is None) == (bits is None):
        raise ArgumentError(f"step={step}, bits={bits}: give one of the two")
    if bits is not None and not 1 <= bits <= 16:
        raise ArgumentError(f"bits={bits} is outside 1 to 16")
    if not (dead_zone >= 0 and math.isfinite(dead_zone)):
        raise ArgumentError(f"dead_zone={dead_zone} must be at least 0 (a fraction of the step)")
    values = values_of(tensor, name, threads)
    if values.nonzero == 0:
        return from_levels(values, np.zeros(0))
    if bits is not None:
        step = grid_step(values.low, values.high, (1 << bits) - 1)
    step = float(np.float32(step))
    if not (step > 0 and math.isfinite(step)):
        raise ArgumentError(f"step={step} must be positive and finite in single precision")
    # The outermost level is where halves away from zero take the extremes.
    low = -math.floor(max(0.0, -values.low) / step + 0.5)
    high = math.floor(max(0.0, values.high) / step + 0.5)
    if high - low >= MOST_CODES:
        raise ArgumentError(
            f"step={step} needs {high - low + 1} values for {name}; at most {MOST_CODES} are "
            f"possible: use a step of {(values.high - values.low) / (MOST_CODES - 2):.3g} or more"
        )
    levels = torch.arange(low, high + 1)
    kind = values.flat.dtype
    up = np.maximum(np.arange(high) + 0.5, dead_zone) * step
    down = np.maximum(np.arange(-low) + 0.5, dead_zone) * step
    # A value equal to the threshold goes outward: below zero, that needs the next float.
    below = np.nextafter((-down[::-1]).astype(kind), kind.type(0))
    return from_levels(
        values,
        grid_values(levels, step, values.dtype).to(torch.float64).numpy(),
        np.concatenate([below, up.astype(kind)]),
    )
