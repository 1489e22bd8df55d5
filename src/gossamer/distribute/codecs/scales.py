"""Scales of clipped gradients, and what clipping does to them."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError, one_of
from gossamer.distribute.codecs.backends import statistics

__all__ = ["Scaler", "check_clip", "clip_slope", "clipped_scale"]

Scaler = Literal["max", "sigma"]


def clip_slope(clip: float | None) -> float:
    """``E[x f(x)] / E[x**2]`` of a Gaussian x under clipping f at ``clip`` standard deviations.

    What clipping does to the expected gradient: 1 is unbiased. Equals ``erf(clip / sqrt(2))``.

    >>> round(clip_slope(2.5), 4), clip_slope(None)
    (0.9876, 1.0)
    """
    return 1.0 if clip is None else math.erf(clip / math.sqrt(2))


def check_clip(clip: float | None, scaler: Scaler) -> None:
    """Raise :class:`ArgumentError` unless the pair can be used."""
    if scaler not in ("max", "sigma"):
        raise ArgumentError(f"scaler={scaler!r} is not one of 'max', 'sigma'")
    if clip is None and scaler == "sigma":
        raise ArgumentError("scaler='sigma' needs clip, in standard deviations")
    if clip is not None and not (isinstance(clip, Real) and 0 < clip < math.inf):
        raise ArgumentError(f"clip={clip!r} must lie above 0; None is no clipping")


def clipped_scale(g: Tensor, clip: float | None, scaler: Scaler) -> Tensor:
    """The largest value sent of flat float32 ``g``: float32 ``()``, NaN if g is not finite.

    With sigma the standard deviation about the mean (of n values, divided by n): ``max`` gives
    min(max|g|, clip sigma), the largest magnitude after clipping (TernGrad, equation 13 and on);
    ``sigma`` gives clip sigma even where no gradient is so large (TernGrad's published code, and
    Hou et al.). ``clip=None``: max|g|, and so where sigma is 0, as of a single element, which
    either rule would turn to 0.
    """
    one_of("scaler", scaler, ("max", "sigma"))
    total, squares, largest = statistics(g)
    if clip is None or not g.numel():
        return largest
    mean, square = total / g.numel(), squares / g.numel()
    variance = square - mean * mean
    bound = (variance.clamp(min=0).sqrt() * clip).float()
    if scaler == "max":
        bound = torch.minimum(largest, bound)
    # what rounding leaves of equal elements' variance is none
    return torch.where(variance > 1e-12 * square, bound, largest) + largest * 0
