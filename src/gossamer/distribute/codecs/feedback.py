"""Error feedback: what a codec left out of a gradient is added to the next one.

Seide, Fu, Droppo, Li, Yu, *1-Bit Stochastic Gradient Descent*, Interspeech 2014, eq. 1-2;
Karimireddy, Rebjock, Stich, Jaggi, *Error Feedback Fixes SignSGD*, ICML 2019, algorithm 1:

    p = g + e;    send C(p);    e = p - C(p)

C(p) is what all ranks decode of this rank. Deviations: the learning rate is not part of p (it is
applied by the optimizer afterwards); a gradient that is not finite leaves e as it was.

Off by default: unbiased codecs do not need it and lose their unbiasedness by it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError

__all__ = ["ErrorFeedback"]


class ErrorFeedback:
    """One rank's errors by clean parameter name, flat float32, zero at the start."""

    def __init__(self) -> None:
        self.errors: dict[str, Tensor] = {}

    def correct(self, name: str, gradient: Tensor) -> Tensor:
        """p of a flat float32 gradient; a new tensor."""
        error = self.errors.get(name)
        if error is None:
            return gradient.clone()
        if error.numel() != gradient.numel():
            raise ArgumentError(
                f"error feedback of {name} has {error.numel()} elements, its gradient "
                f"{gradient.numel()}: it is of another model"
            )
        return gradient + error.to(gradient.device)

    def record(self, name: str, corrected: Tensor, decoded: Tensor) -> None:
        """Keep ``corrected - decoded``, unless that is not finite."""
        error = corrected - decoded
        if bool(torch.isfinite(error).all()):
            self.errors[name] = error

    def state_dict(self) -> dict[str, Tensor]:
        """The errors, to be saved by each rank for itself."""
        return dict(self.errors)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved errors."""
        self.errors = {name: error.clone() for name, error in state.items()}
