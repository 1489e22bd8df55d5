"""TernGrad: gradients of -s, 0, s.

Wen, Xu, Yan, Wu, Wang, Chen, Li, *TernGrad: Ternary Gradients to Reduce Communication in
Distributed Deep Learning*, NeurIPS 2017, arXiv 1705.07878.

Equations 1 to 3: ``s sign(g) b`` with ``P(b = 1) = |g| / s``, s the largest magnitude; equation 13
and on: first clip at ``clip`` standard deviations, 2.5 in the paper; one s a tensor. ``scaler``
tells the paper (``max``) from its published code (``sigma``), see
:func:`~gossamer.distribute.codecs.scales.clipped_scale`. Sharing one s among workers (section 3.3)
is what a caller does who passes the largest of all to ``encode``.

``E[q] = g`` and ``E|q|**2 = s |g|_1`` for what is left after clipping, which keeps ``bias`` of a
Gaussian gradient. Deviation: chances are multiples of 2**-40.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from gossamer.distribute.codecs.codec import GradCodec, flat
from gossamer.distribute.codecs.eager import Layout
from gossamer.distribute.codecs.scales import Scaler, check_clip, clip_slope, clipped_scale

__all__ = ["TernGrad"]


@final
@dataclass(frozen=True)
class TernGrad(GradCodec):
    """Ternary gradients.

    Attributes:
        clip: standard deviations, or ``None`` for no clipping.
        scaler: ``max`` or ``sigma``.

    >>> import torch
    >>> from gossamer.distribute import Key
    >>> g, codec = torch.tensor([1.0, -1.0, 0.0]), TernGrad(clip=None)
    >>> payload = codec.encode(g, codec.scale(g), Key(0, 0, 0, 0), form="base3")
    >>> payload.tolist(), codec.decode(payload, 1.0, 3, form="base3").tolist()
    ([119], [1.0, -1.0, 0.0])
    """

    clip: float | None = 2.5
    scaler: Scaler = "max"
    id: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Check."""
        check_clip(self.clip, self.scaler)

    @property
    def name(self) -> str:
        """``terngrad``."""
        return "terngrad"

    @property
    def layout(self) -> Layout:
        """Codes -1, 0, 1."""
        return Layout(levels=1, planes=1)

    @property
    def bias(self) -> float:
        """What clipping leaves of a Gaussian gradient."""
        return clip_slope(self.clip)

    def scale(self, g: Tensor) -> Tensor:
        """The largest magnitude after clipping."""
        return clipped_scale(flat(g, "g"), self.clip, self.scaler)
