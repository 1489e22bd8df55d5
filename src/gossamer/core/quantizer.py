"""Few-bit weights in training: what the methods that quantize a latent weight share.

A float weight, the latent one, takes the weight's place in the module and in the optimizer; every
read of the weight gives its quantized values. They are computed once after each optimizer step
and kept beside the latent weight, so forward passes cost a look, and gradient accumulation,
evaluation and a resumed run see the same values. Backward is straight-through (Bengio, Leonard,
Courville 2013, arXiv 1308.3432): the latent weight gets the gradient of the quantized one, times
a slope where a method has one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError
from gossamer.core.latent import Computed, Latent, dense
from gossamer.core.method import Method
from gossamer.core.parametrized import Parametrized

__all__ = [
    "Quantizer",
    "Straight",
    "Trajectory",
    "checked",
    "chosen",
    "fitting",
    "on_kept",
    "rule_of",
]


def chosen(
    model: nn.Module,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    *,
    ends: bool,
) -> dict[str, nn.Parameter]:
    """The weights to quantize: those ``include`` names, else all but the two ends.

    Args:
        include, exclude: layer patterns (:func:`gossamer.core.names.weights`).
        ends: without ``include``, the first and the last layer too.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    >>> list(chosen(net, None, None, ends=False)), list(chosen(net, "0", None, ends=False))
    (['1.weight'], ['0.weight'])

    Raises :class:`ArgumentError` for a pattern that matches nothing, or when no weight is left.
    """
    weights = names.weights(model, include=include, exclude=exclude)
    if include is None and not ends:
        apart = set(names.ends(model))
        weights = {name: p for name, p in weights.items() if name not in apart}
    if not weights:
        raise ArgumentError(
            "no weight is left to quantize; ends=True takes the first and the last layer too, "
            "include= names layers"
        )
    return weights


def checked(weight: Tensor, what: str = "the weight") -> Tensor:
    """The tensor, contiguous, so that sums do not depend on its layout.

    Raises :class:`ArgumentError` when it holds NaN or infinity; ``what`` names it.
    """
    if weight.numel():
        low, high = torch.aminmax(weight)
        if not math.isfinite(low.item()) or not math.isfinite(high.item()):
            raise ArgumentError(f"{what} holds NaN or infinity; it cannot be quantized")
    return weight.contiguous()


def on_kept(projection: Callable[..., Any]) -> Callable[..., Any]:
    """The projection of the weights that are not zero; zeros stay zero.

    For pruned layers, beside a :class:`gossamer.core.method.Masked` that holds the latent weights:
    scales are then those of the kept weights, and binary codes leave the pruned ones at zero.

    Args:
        projection: of a weight and tensors of its shape beside it; it sees flat ones.

    >>> on_kept(lambda w: w.abs().mean() * w.sign())(torch.tensor([0.0, 1.0, -3.0])).tolist()
    [0.0, 2.0, -2.0]
    """

    def within(weight: Tensor, *beside: Tensor, **settings: Any) -> Any:
        kept = weight != 0
        if kept.all():
            return projection(weight, *beside, **settings)
        found = projection(weight[kept], *(b[kept] for b in beside), **settings)
        parts = found if isinstance(found, tuple) else (found,)
        whole = [
            p if p is None else torch.zeros_like(weight).masked_scatter(kept, p) for p in parts
        ]
        return tuple(whole) if isinstance(found, tuple) else whole[0]

    return within


def rule_of(
    projection: str | Callable[..., Any], table: Mapping[str, Callable[..., Any]], takes: str
) -> Callable[..., Any]:
    """The projection of that name, or the function itself.

    Raises :class:`ArgumentError` for an unknown name; ``takes`` says what a function is of.
    """
    if not isinstance(projection, str):
        return projection
    if projection not in table:
        raise ArgumentError(
            f"projection {projection!r} is not one of {'; '.join(table)}, nor a function of {takes}"
        )
    return table[projection]


def fitting(found: Tensor, weight: Tensor, name: str) -> Tensor:
    """What a projection made of a weight, as a tensor of its own without gradient.

    Raises :class:`ArgumentError` for another shape or dtype, NaN and infinity.
    """
    if found.shape != weight.shape or found.dtype != weight.dtype:
        raise ArgumentError(
            f"the projection of {name} is {found.dtype} of shape {tuple(found.shape)}; the "
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}"
        )
    if not torch.isfinite(found).all():
        raise ArgumentError(f"the projection of {name} gives NaN or infinity")
    # a function may return what it was given, or a view of it
    return found.detach().clone()


class _Through(torch.autograd.Function):
    """The kept values forward; the gradient times the slope backward."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, value: Tensor, slope: Tensor | None) -> Tensor:
        ctx.slope = slope
        return value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = dense(grad)
        return grad if ctx.slope is None else grad * ctx.slope, None, None


class Straight(Computed):
    """The parametrization: whatever the latent weight is, the values last taken.

    Args:
        start: the latent weight's first value.
        value: the quantized values.
        slope: factor on the gradient, of the weight's shape; None: 1.
    """

    value: Tensor
    slope: Tensor | None

    def __init__(self, start: Tensor, value: Tensor, slope: Tensor | None) -> None:
        super().__init__(start)
        self.register_buffer("value", value)
        self.register_buffer("slope", slope)

    def forward(self, latent: Tensor) -> Tensor:
        """The values, with the gradient passed on to ``latent``."""
        result: Tensor = _Through.apply(latent, self.value, self.slope)
        return result

    def take(self, value: Tensor, slope: Tensor | None) -> None:
        """Other values; new tensors, since a graph may still hold the old ones."""
        self.value, self.slope = value, slope


class Quantizer(Parametrized):
    """Base of the methods that train few-bit weights through a latent one.

    From :meth:`attach` to :meth:`finish` the latent weight is the module's parameter and stands in
    the optimizer's groups. The model's ``state_dict`` holds latent weights and quantized values;
    deep copies compute the same. Attach before the model is wrapped for several processes and
    before a learning-rate scheduler is made.

    Args:
        clip: latent weights are kept in [-clip, clip] after each step; None: free.
        include, exclude, ends: what is quantized (:func:`chosen`).

    Raises :class:`ArgumentError` on attach for patterns that match nothing, a model with nothing
    to quantize or parametrized already, a weight that is all zeros or not finite, or an optimizer
    that holds none of the weights; the model is left as it was. After a step that has made a
    latent weight NaN or infinite the same error names it.
    """

    def __init__(
        self,
        *,
        clip: float | None,
        include: str | Iterable[str] | None,
        exclude: str | Iterable[str] | None,
        ends: bool,
    ) -> None:
        super().__init__()
        if clip is not None and not 0 < clip < float("inf"):
            raise ArgumentError(f"clip={clip} must be positive and finite, or None")
        self.clip = clip
        self.include, self.exclude, self.ends = include, exclude, ends
        self._left: dict[str, Quantized] = {}

    @abstractmethod
    def _module(self, name: str, weight: Tensor) -> Computed:
        """The parametrization that starts from ``weight``, values computed; checks it first."""

    @abstractmethod
    def _update(self, name: str, held: Latent) -> None:
        """Compute the values again, from the latent weight as it is now."""

    def _weights(self) -> Mapping[str, nn.Parameter]:
        weights = chosen(self.model, self.include, self.exclude, ends=self.ends)
        for name, p in weights.items():
            checked(p.detach(), name)
            if not torch.count_nonzero(p):
                raise ArgumentError(f"{name} is all zeros: it has no scale; exclude it")
        return weights

    def _modules(self, weights: Mapping[str, nn.Parameter]) -> Mapping[str, Computed]:
        return {name: self._module(name, p.detach().clone()) for name, p in weights.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Quantize the weights that the step has moved."""
        if self.clip is not None:
            for held in self._held.values():
                held.parameter.clamp_(-self.clip, self.clip)
        self.refresh()

    def _hold_again(self, optimizer: torch.optim.Optimizer) -> None:
        Quantizer.after_step(self)  # a step, but none of the method's own

    @torch.no_grad()
    def refresh(self) -> None:
        """Quantize again: for latent weights changed by something else than the optimizer.

        Raises :class:`ArgumentError` for a latent weight that holds NaN or infinity: its codes
        would be finite, and hide it.
        """
        for name, held in self._held.items():
            checked(held.parameter.detach(), f"the latent weight of {name}")
            self._update(name, held)

    def quantized(self) -> dict[str, Quantized]:
        """Codes and code book of each weight now; after :meth:`finish` of what it left."""
        if self._held:
            self._left = {name: Quantized.of(value) for name, value in self.values().items()}
        return dict(self._left)

    def densities(self) -> dict[str, float]:
        """Fraction of each weight's codes that are not zero."""
        return {
            name: float(torch.count_nonzero(q.codes)) / q.codes.numel()
            for name, q in self.quantized().items()
        }

    def finish(self) -> None:
        """Plain weights, the quantized ones, in the model and in the optimizer."""
        self.quantized()
        super().finish()


class Trajectory(Method):
    """Writes down the code books of quantizers while they train; attach it after them, finish
    it before them.

    Args:
        quantizers: attached to the same model.
        every: optimizer steps between two rows.

    Attributes:
        rows: ``{"step", "high", "low", "density"}``, the last three by clean name: the largest and
            the smallest value of each weight, and the fraction that is not zero. The first is of
            step 0. They are part of the checkpoint, so that a resumed run goes on with them.
    """

    def __init__(self, quantizers: Sequence[Quantizer], *, every: int) -> None:
        super().__init__()
        if every < 1:
            raise ArgumentError(f"every={every} must be at least 1")
        self.quantizers, self.every = quantizers, every
        self.rows: list[dict[str, Any]] = []
        self._steps = 0

    def _setup(self) -> None:
        if not self.rows:
            self._log()

    def after_step(self) -> None:
        """Log every so often."""
        self._steps += 1
        if self._steps % self.every == 0:
            self._log()

    def finish(self) -> None:
        """Log the end, before the quantizers finish."""
        if self.rows[-1]["step"] != self._steps:
            self._log()
        self.detach()

    def _log(self) -> None:
        row: dict[str, Any] = {"step": self._steps, "high": {}, "low": {}, "density": {}}
        for quantizer in self.quantizers:
            for name, value in quantizer.values().items():
                low, high = torch.aminmax(value)
                row["high"][name], row["low"][name] = float(high), float(low)
                row["density"][name] = float(torch.count_nonzero(value)) / value.numel()
        self.rows.append(row)

    def _state(self) -> dict[str, Any]:
        """Steps and rows."""
        return {"steps": self._steps, "rows": list(self.rows)}

    def _load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`_state` returned."""
        self._steps, self.rows = int(state["steps"]), list(state["rows"])
