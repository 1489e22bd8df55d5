"""signSGD with majority vote: one bit up, one vote down.

Bernstein, Wang, Azizzadenesheli, Anandkumar, *signSGD: Compressed Optimisation for Non-Convex
Problems*, ICML 2018, arXiv 1802.04434, algorithm 3: workers send sign(g), and all step along
``sign(sum of signs)``. Biased by design: errors are not averaged away, and error feedback
(Karimireddy et al., ICML 2019) is the usual remedy.

Stated here: a zero has the sign of its bit (+0 is +), since one bit knows no third value; a tied
vote, possible only for an even number of workers, gives 0. The vote is multiplied by the workers'
mean scale: ``one`` is 1, the paper's (0 for a gradient that is 0 everywhere, such as of an unused
parameter); ``mean`` is the mean of \\|g\\|, which keeps the gradient's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.distribute.codecs.backends import statistics
from gossamer.distribute.codecs.codec import GradCodec, flat
from gossamer.distribute.codecs.eager import Layout
from gossamer.distribute.wire.planes import Form

__all__ = ["SignSGD"]


@final
@dataclass(frozen=True)
class SignSGD(GradCodec):
    """Signs, and a majority vote.

    Attributes:
        scaler: ``one`` or ``mean``.
    """

    scaler: Literal["one", "mean"] = "one"
    id: ClassVar[int] = 4
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check."""
        if self.scaler not in ("one", "mean"):
            raise ArgumentError(f"scaler={self.scaler!r} is not one of 'one', 'mean'")

    @property
    def name(self) -> str:
        """``signsgd``."""
        return "signsgd"

    @property
    def layout(self) -> Layout:
        """Codes -1 and 1, one bit."""
        return Layout(levels=1, planes=0, half=True, random=False)

    def scale(self, g: Tensor) -> Tensor:
        """1 or the mean magnitude; 0 for a gradient of zeros."""
        g = flat(g, "g")
        total, _, largest = statistics(g, absolute=True)
        if self.scaler == "mean":
            return (total / max(g.numel(), 1)).float() + largest * 0
        return torch.where(largest > 0, torch.ones_like(largest), largest)

    def decode_mean(
        self,
        payloads: Sequence[Tensor],
        scales: Tensor | Sequence[Tensor | float],
        out: Tensor,
        divisor: int,
        *,
        forms: Form | Sequence[Form] = "planes",
    ) -> None:
        """Write the vote times ``sum of scales / divisor``, for a vote the mean scale, over out."""
        out = flat(out, "out")
        names = self._scaled(payloads, scales, divisor, forms)
        vote = self.sum_codes(payloads, out.numel(), forms=names).sign()
        total = torch.zeros((), dtype=torch.float32, device=out.device)
        for one in torch.as_tensor(scales, dtype=torch.float32, device=out.device):
            total = total + one
        total = total * torch.tensor(1 / divisor, dtype=torch.float32, device=out.device)
        out.copy_(vote).mul_(torch.where(total.isfinite(), total, torch.nan))

    def sum_bits(self, workers: int) -> int:
        """Of a vote: 2."""
        return 2

    def pack_sums(self, sums: Tensor, bits: int, *, form: Form = "planes") -> Tensor:
        """The votes, -1, 0 or 1, as bytes."""
        return super().pack_sums(sums.sign(), bits, form=form)

    def _mean_of(self, divisor: int) -> float:
        return 1.0
