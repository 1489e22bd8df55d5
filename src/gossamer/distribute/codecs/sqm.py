"""SQm: gradients of m bits, evenly spaced.

Hou, Zhang, Kwok, *Analysis of Quantized Models*, ICLR 2019, section 3: ``s sign(g) q``, q one of
``k + 1`` even levels from 0 to 1, k = 2**(m - 1) - 1, drawn from the two neighbours of ``|g| / s``
so that ``E[Q(g)] = g``; s = max|g|, or clip at ``clip`` standard deviations first (section 3.3,
clip 1 to 3), whose scale is always ``clip sigma`` there (``scaler="sigma"``).

``E|q - g|**2 <= s |g|_1 / k``. SQ2 has TernGrad's codes, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.distribute.codecs.codec import GradCodec, flat
from gossamer.distribute.codecs.eager import Layout
from gossamer.distribute.codecs.scales import Scaler, check_clip, clip_slope, clipped_scale

__all__ = ["SQm"]


@final
@dataclass(frozen=True)
class SQm(GradCodec):
    """Stochastic m-bit gradients.

    Attributes:
        bits: m, from 2 to 8.
        clip: standard deviations, or ``None`` for no clipping.
        scaler: ``max`` or ``sigma``.
    """

    bits: int
    clip: float | None = None
    scaler: Scaler = "max"
    id: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Check."""
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ArgumentError(f"bits={self.bits!r} must be 2 to 8")
        check_clip(self.clip, self.scaler)

    @property
    def name(self) -> str:
        """``sq2`` to ``sq8``."""
        return f"sq{self.bits}"

    @property
    def layout(self) -> Layout:
        """2**(m - 1) - 1 levels."""
        return Layout(levels=(1 << self.bits - 1) - 1, planes=self.bits - 1)

    @property
    def bias(self) -> float:
        """What clipping leaves of a Gaussian gradient."""
        return clip_slope(self.clip)

    def scale(self, g: Tensor) -> Tensor:
        """The largest magnitude after clipping."""
        return clipped_scale(flat(g, "g"), self.clip, self.scaler)
