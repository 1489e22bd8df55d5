"""Learned step size quantization: the grid's step is trained with the weights.

Esser, McKinstry, Bablani, Appuswamy, Modha, *Learned Step Size Quantization*, ICLR 2020,
arXiv 1902.08153.

- Eq. 1-2: v_hat = round(clip(v / s, -Qn, Qp)) s, with Qn = 2^(b-1), Qp = 2^(b-1) - 1 for weights.
- Eq. 3: dv_hat/ds = round(v/s) - v/s inside the range, -Qn or Qp outside; eq. 5: dv_hat/dv = 1
  inside, 0 outside.
- Section 2.2: the step's gradient is scaled by 1 / sqrt(N Qp); section 2.1: s starts at
  2 mean|v| / sqrt(Qp).

Deviations: codes change once an optimizer step. The step is kept above 0. The mean that it starts
from is over the weights that are not zero: pruned ones say nothing of the others. Weights only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.core.latent import Computed, Latent, dense
from gossamer.core.quantizer import Quantizer, checked

__all__ = ["LSQ", "codes", "stepped"]

_LEAST = 1e-8  # of a step


@torch.no_grad()
def codes(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """round(clip(w / s, -2^(b-1), 2^(b-1) - 1)), int8 of the weight's shape.

    Raises :class:`ArgumentError` for NaN and infinity.
    """
    half = 1 << (bits - 1)
    return (checked(weight) / step).clamp_(-half, half - 1).round_().to(torch.int8)


class _Stepped(torch.autograd.Function):
    """Codes times the step; equations 3 and 5 back."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, step: Tensor, codes: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(latent, step, codes)
        ctx.bits = bits
        return codes * step

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        latent, step, codes = ctx.saved_tensors
        grad = dense(grad)
        half = 1 << (ctx.bits - 1)
        exact = latent / step
        inside = (exact > -half) & (exact < half - 1)
        slope = torch.where(inside, codes - exact, codes.to(exact.dtype))
        scale = (latent.numel() * (half - 1)) ** -0.5
        return grad * inside, ((grad * slope).sum() * scale).reshape(1), None, None


def stepped(latent: Tensor, step: Tensor, codes: Tensor, bits: int) -> Tensor:
    """``codes * step``, with the paper's gradients to the latent weight and the step.

    Args:
        latent: v, any shape.
        step: (1,), positive.
        codes: of the shape of v (:func:`codes`).
        bits: b, 2 to 8.

    >>> v = torch.tensor([0.6, 9.0], requires_grad=True)
    >>> s = torch.tensor([1.0], requires_grad=True)
    >>> out = stepped(v, s, codes(v, s, 2), 2)
    >>> out.sum().backward()
    >>> out.tolist(), v.grad.tolist(), round(s.grad.item() * 2**0.5, 4)
    ([1.0, 1.0], [1.0, 0.0], 1.4)
    """
    result: Tensor = _Stepped.apply(latent, step, codes, bits)
    return result


class _Module(Computed):
    """The parametrization: latent weight to grid, with the step as a parameter."""

    codes: Tensor

    def __init__(self, start: Tensor, step: Tensor, bits: int) -> None:
        super().__init__(start)
        self.bits = bits
        self.register_buffer("codes", codes(start, step, bits))
        self.step = nn.Parameter(step)

    def forward(self, latent: Tensor) -> Tensor:
        return stepped(latent, self.step, self.codes, self.bits)


class LSQ(Quantizer):
    """Train weights and the step of each layer's grid.

    Args:
        bits: 2 to 8.
        weight_decay: of the steps; None: that of the weight's group in the optimizer.
        include, exclude, ends: what is quantized (:func:`gossamer.core.quantizer.chosen`).

    Raises :class:`ArgumentError` as :class:`gossamer.core.quantizer.Quantizer` does, and for
    arguments out of range.
    """

    def __init__(
        self,
        *,
        bits: int,
        weight_decay: float | None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        ends: bool = False,
    ) -> None:
        super().__init__(clip=None, include=include, exclude=exclude, ends=ends)
        if not 2 <= bits <= 8:
            raise ArgumentError(f"bits={bits} is outside 2 to 8")
        if weight_decay is not None and not 0 <= weight_decay < float("inf"):
            raise ArgumentError(f"weight_decay={weight_decay} must be at least 0, or None")
        self.bits, self.weight_decay = bits, weight_decay

    def _module(self, name: str, weight: Tensor) -> Computed:
        highest = (1 << (self.bits - 1)) - 1
        mean = weight.abs().sum() / torch.count_nonzero(weight)
        step = 2 * mean / highest**0.5
        return _Module(weight, step.reshape(1), self.bits)

    def _update(self, name: str, held: Latent) -> None:
        module = held.module
        module.step.clamp_(min=max(_LEAST, torch.finfo(module.step.dtype).tiny))
        module.codes = codes(held.parameter, module.step, self.bits)

    def steps(self) -> dict[str, float]:
        """Each layer's step now."""
        return {name: float(held.module.step.detach()) for name, held in self._held.items()}
