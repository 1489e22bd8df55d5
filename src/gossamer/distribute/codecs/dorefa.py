"""DoReFa gradients: k bits, no zero among the values.

Zhou, Wu, Ni, Zhou, Wen, Zou, *DoReFa-Net*, 2016, arXiv 1606.06160, equation 12:
``f(g) = 2 m [quantize_k(g / (2 m) + 1/2 + N) - 1/2]`` with m = max|g|, quantize_k rounding to the
nearest of ``0, 1/n .. 1`` for n = 2**k - 1, and noise N uniform over one step, ``[-1/2, 1/2) / n``.

Rounding to the nearest after such noise is stochastic rounding, which is what is computed,
without noise: ``x = n (g / (2 m) + 1/2)``, ``j = floor(x) + [u < x - floor(x)]``, value
``m (2 j - n) / n``.
Codes ``2 j - n`` are odd, from -n to n, sent as k bits; a gradient of 0 becomes -m / n or m / n.

Deviations: the paper quantizes gradients of activations, one maximum a sample; here gradients of
weights, one a tensor. ``x - n / 2`` is added to 1/2 in float32, so that a gradient below
2**-25 m / n rounds to that fineness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.distribute.codecs.codec import GradCodec, flat
from gossamer.distribute.codecs.eager import Layout
from gossamer.distribute.codecs.scales import clipped_scale

__all__ = ["DoReFa"]


@final
@dataclass(frozen=True)
class DoReFa(GradCodec):
    """DoReFa gradients.

    Attributes:
        bits: k, from 1 to 8.
    """

    bits: int
    id: ClassVar[int] = 5

    def __post_init__(self) -> None:
        """Check."""
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ArgumentError(f"bits={self.bits!r} must be 1 to 8")

    @property
    def name(self) -> str:
        """``dorefa-1`` to ``dorefa-8``."""
        return f"dorefa-{self.bits}"

    @property
    def layout(self) -> Layout:
        """Odd codes up to 2**k - 1."""
        return Layout(levels=(1 << self.bits) - 1, planes=self.bits - 1, half=True)

    def scale(self, g: Tensor) -> Tensor:
        """The largest magnitude."""
        return clipped_scale(flat(g, "g"), None, "max")
