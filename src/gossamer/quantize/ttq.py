"""Trained ternary quantization: three values a layer, two of them trained.

Zhu, Han, Mao, Dally, *Trained Ternary Quantization*, ICLR 2017, arXiv 1612.01064.

- Eq. 6: w_t = Wp where w > Delta, -Wn where w < -Delta, else 0. Eq. 9: Delta = t * max|w|, which
  gets no gradient; or, instead of t, the share of non-zero weights is fixed (section 4, "maintain
  a constant sparsity").
- Eq. 7, with g = dL/dw_t: dL/dWp is the *sum* of g over the positive weights; dL/dWn is minus the
  sum over the negative ones (printed without the minus, which follows from eq. 6).
- Eq. 8: dL/dw = Wp g, g, Wn g for positive, zero and negative weights.

Deviations: codes change once an optimizer step. Wp and Wn are kept above 0 (1e-8), where the
paper trusts to luck. Besides the authors' start Wp = Wn = 1, ``start="fit"`` takes the mean
magnitude of the weights beyond the threshold: without batch-norm behind a layer 1 is far off. The
last layer stays float too unless it is asked for; the authors keep the first.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.core.latent import Computed, Latent, dense
from gossamer.core.masks import keep_top
from gossamer.core.quantizer import Quantizer, checked

__all__ = ["TTQ", "SparsityWarning", "codes", "ternary"]

_LEAST = 1e-8  # of Wp and Wn; their own gradient does not depend on them, so they come back
_FEW = 0.1  # density under which a threshold is warned of


class SparsityWarning(UserWarning):
    """Nearly all weights of a layer fall under the threshold: an outlier sets max|w|."""


@torch.no_grad()
def codes(weight: Tensor, *, threshold: float | None, density: float | None) -> Tensor:
    """Sign of the weights beyond Delta, 0 of the others: int8 of the weight's shape.

    Args:
        threshold: t in [0, 1): Delta = t * max|w|.
        density: instead, the fraction that stays non-zero: exact count, stable ties.

    >>> codes(torch.tensor([1.0, -0.5, 0.04]), threshold=0.05, density=None)
    tensor([ 1, -1,  0], dtype=torch.int8)

    Raises :class:`ArgumentError` for NaN and infinity.
    """
    weight = checked(weight)
    sign = torch.sign(weight).to(torch.int8)
    size = weight.abs()
    if density is not None:
        return sign * keep_top({"weight": size}, density)["weight"]
    if threshold is None:
        raise ArgumentError("give threshold or density")
    return sign * (size > threshold * size.max())


class _Ternary(torch.autograd.Function):
    """Codes and scales to values; equations 7 and 8 back."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(scales, codes)
        return torch.where(codes > 0, scales[0], torch.where(codes < 0, -scales[1], 0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        scales, codes = ctx.saved_tensors
        grad = dense(grad)
        positive, negative = codes > 0, codes < 0
        sums = torch.stack([(grad * positive).sum(), -(grad * negative).sum()])
        slope = torch.where(positive, scales[0], torch.where(negative, scales[1], 1))
        return grad * slope, sums, None


def ternary(latent: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    """The ternary weight, with the paper's gradients to ``latent`` and ``scales``.

    Args:
        latent: w, any shape; it decides nothing here, and receives eq. 8.
        scales: (2,): Wp, Wn, both positive.
        codes: int8 of the shape of w (:func:`codes`).

    >>> w = torch.tensor([1.0, -0.5, 0.04], requires_grad=True)
    >>> s = torch.tensor([2.0, 3.0], requires_grad=True)
    >>> out = ternary(w, s, codes(w, threshold=0.05, density=None))
    >>> out.backward(torch.tensor([1.0, 10.0, 100.0]))
    >>> out.tolist(), w.grad.tolist(), s.grad.tolist()
    ([2.0, -3.0, 0.0], [2.0, 30.0, 100.0], [1.0, -10.0])
    """
    result: Tensor = _Ternary.apply(latent, scales, codes)
    return result


class _Module(Computed):
    """The parametrization: latent weight to ternary weight, with the scales as a parameter."""

    codes: Tensor

    def __init__(self, start: Tensor, codes: Tensor, scales: Tensor) -> None:
        super().__init__(start)
        self.register_buffer("codes", codes)
        self.scales = nn.Parameter(scales)

    def forward(self, latent: Tensor) -> Tensor:
        return ternary(latent, self.scales, self.codes)


class TTQ(Quantizer):
    """Train ternary weights and their two scales a layer.

    Args:
        threshold: t in [0, 1), of Delta = t * max|w|.
        density: in place of ``threshold``, the fraction of non-zero weights, in (0, 1].
        start: "ones": Wp = Wn = 1 (the authors); "fit": the mean magnitudes they stand for.
        weight_decay: of Wp and Wn; None: that of the weight's group in the optimizer.
        lr_factor: the learning rate of Wp and Wn over that of the weight's group. Their gradients
            are sums over a layer, thousands of times a weight's: under SGD at the authors' rate
            of .1 a factor of 1 can throw them to their floor.
        every: optimizer steps between two rows of ``trajectory``.
        include, exclude, ends: what is quantized (:func:`gossamer.core.quantizer.chosen`).

    Attributes:
        trajectory: rows ``{"step", "positive", "negative", "density"}``, the last three by clean
            name: Wp, Wn, and the fraction of non-zero codes.

    Raises :class:`ArgumentError` as :class:`gossamer.core.quantizer.Quantizer` does, and for
    arguments out of range. Warns with :class:`SparsityWarning` on attach.
    """

    def __init__(
        self,
        *,
        threshold: float | None = None,
        density: float | None = None,
        start: Literal["ones", "fit"],
        weight_decay: float | None,
        every: int,
        lr_factor: float = 1.0,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        ends: bool = False,
    ) -> None:
        super().__init__(clip=None, include=include, exclude=exclude, ends=ends)
        if (threshold is None) == (density is None):
            raise ArgumentError(f"threshold={threshold}, density={density}: give one of the two")
        if threshold is not None and not 0 <= threshold < 1:
            raise ArgumentError(f"threshold={threshold} is outside [0, 1) (of the largest weight)")
        if density is not None and not 0 < density <= 1:
            raise ArgumentError(f"density={density} is outside (0, 1] (the fraction kept)")
        if start not in ("ones", "fit"):
            raise ArgumentError(f"start={start!r} is not one of 'ones', 'fit'")
        if weight_decay is not None and not 0 <= weight_decay < float("inf"):
            raise ArgumentError(f"weight_decay={weight_decay} must be at least 0, or None")
        if not 0 < lr_factor < float("inf"):
            raise ArgumentError(
                f"lr_factor={lr_factor} must be positive and finite; 1 changes nothing"
            )
        if every < 1:
            raise ArgumentError(f"every={every} must be at least 1")
        self.threshold, self.density, self.start = threshold, density, start
        self.weight_decay, self.lr_factor, self.every = weight_decay, lr_factor, every
        self.trajectory: list[dict[str, Any]] = []
        self._steps = 0

    def _setup(self) -> None:
        super()._setup()
        if not self.trajectory:
            self._log()

    def _module(self, name: str, weight: Tensor) -> Computed:
        found = codes(weight, threshold=self.threshold, density=self.density)
        count = int(torch.count_nonzero(found))
        if count < _FEW * found.numel() and self.threshold is not None:
            warnings.warn(
                f"{name}: its largest weight, {float(weight.abs().max()):.4g}, is an outlier: "
                f"threshold={self.threshold} makes {100 * (1 - count / found.numel()):.1f} % "
                "zeros; lower it, give density=, or clip the weight",
                SparsityWarning,
                stacklevel=5,
            )
        scales = weight.new_ones(2)
        if self.start == "fit":
            sides = (weight[found > 0], weight[found < 0])
            typical = weight[found != 0].abs().mean() if count else weight.abs().mean()
            scales = torch.stack([s.abs().mean() if s.numel() else typical for s in sides])
        return _Module(weight, found, scales)

    def _update(self, name: str, held: Latent) -> None:
        module = held.module
        module.codes = codes(held.parameter, threshold=self.threshold, density=self.density)
        module.scales.clamp_(min=max(_LEAST, torch.finfo(module.scales.dtype).tiny))

    def after_step(self) -> None:
        """Keep the scales positive, find the codes again, and log every so often."""
        super().after_step()
        self._steps += 1
        if self._steps % self.every == 0:
            self._log()

    @torch.no_grad()
    def _log(self) -> None:
        row: dict[str, Any] = {"step": self._steps, "positive": {}, "negative": {}, "density": {}}
        for name, held in self._held.items():
            module = held.module
            row["positive"][name], row["negative"][name] = module.scales.tolist()
            row["density"][name] = float(torch.count_nonzero(module.codes)) / module.codes.numel()
        self.trajectory.append(row)

    def scales(self) -> dict[str, tuple[float, float]]:
        """Wp and Wn of each layer now."""
        found = {n: held.module.scales.tolist() for n, held in self._held.items()}
        return {name: (positive, negative) for name, (positive, negative) in found.items()}

    def _state(self) -> dict[str, Any]:
        """Steps and trajectory; weights, codes and scales are in the model's ``state_dict``."""
        return {"steps": self._steps, "trajectory": list(self.trajectory)}

    def _load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`_state` returned."""
        self._steps, self.trajectory = int(state["steps"]), list(state["trajectory"])
