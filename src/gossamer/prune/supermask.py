"""Learned supermasks: a network that is trained by choosing among its initial weights.

Zhou, Lan, Liu, Yosinski, *Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask*,
NeurIPS 2019, arXiv 1905.01067, section 5.2 and supplementary section S4.

- Effective weight: ``w' = w_i * Bernoulli(sigmoid(m))``. Only the scores m train, from 0; the
  draw passes gradients straight through (Bengio et al. 2013), so
  ``dL/dm = dL/dw' * w_i * p * (1 - p)`` with ``p = sigmoid(m)`` (:func:`effective`).
- Dynamic weight rescaling: w' is multiplied by the layer's elements over its ones, a constant in
  the gradient as in the authors' code (:func:`factor`).
- Signed constant: initial weights of one magnitude, ``gossamer.core.seeds.init_(...,
  scheme="signed_constant")``.
- Biases are zero and do not train.

Deviations: a mask is drawn once an optimizer step, not once a forward pass, so that gradient
accumulation and evaluation in batches see one network; at test time :meth:`Supermask.sample`
draws another, or :meth:`Supermask.threshold` takes the likelier half (p > 1/2). A layer whose draw
is all zeros is not rescaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import hooks, names
from gossamer.core.errors import ArgumentError
from gossamer.core.latent import Computed, Latent, dense
from gossamer.core.masks import Masks
from gossamer.core.parametrized import Parametrized
from gossamer.core.seeds import Seed

__all__ = ["Supermask", "draw", "effective", "factor"]


class _Straight(torch.autograd.Function):
    """The kept weights forward; backward as if the mask were its probability."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, initial: Tensor, mask: Tensor, by: Tensor) -> Tensor:
        scaled = initial * by
        ctx.save_for_backward(scores, scaled)
        # + 0: -1 * 0 is -0, a bit pattern of its own. A product by bytes turned into floats takes
        # a tenth of torch.where's time.
        return (scaled * mask.view(torch.uint8).to(scaled.dtype)).add_(0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        scores, scaled = ctx.saved_tensors
        p = torch.sigmoid(scores)
        return dense(grad) * scaled * (p * (1 - p)), None, None, None


def effective(scores: Tensor, initial: Tensor, mask: Tensor, by: Tensor) -> Tensor:
    """``initial * by`` where ``mask``, else 0; the gradient goes to the scores alone.

    Args:
        scores: m, of the weight's shape.
        initial: w_i.
        mask: bool, drawn from the scores.
        by: the layer's factor, a scalar tensor.

    >>> m = torch.zeros(2, requires_grad=True)
    >>> w, keep = torch.tensor([2.0, -3.0]), torch.tensor([True, False])
    >>> out = effective(m, w, keep, torch.tensor(1.0))
    >>> out.sum().backward()
    >>> out.tolist(), m.grad.tolist()
    ([2.0, 0.0], [0.5, -0.75])
    """
    result: Tensor = _Straight.apply(scores, initial, mask, by)
    return result


@torch.no_grad()
def draw(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Bernoulli(sigmoid(scores)) as a bool mask; drawn on the generator's device."""
    uniform = torch.rand(scores.shape, generator=generator, device=generator.device)
    return uniform.to(scores.device) < torch.sigmoid(scores)


def _numbers(scores: Tensor, name: str) -> None:
    # NaN compares as False: the mask would lose the weight, and the network look whole
    if bool(torch.isnan(scores).any()):
        raise ArgumentError(f"{name} hold NaN; lower the learning rate, and check the gradients")


def factor(mask: Tensor) -> float:
    """Elements over ones; 1 for a mask without ones.

    >>> factor(torch.tensor([True, False, False, True]))
    2.0
    """
    ones = int(mask.sum())
    return mask.numel() / ones if ones else 1.0


class _Masked(Computed):
    """The parametrization: scores to the effective weight under the present mask."""

    initial: Tensor
    mask: Tensor
    by: Tensor

    def __init__(self, initial: Tensor, *, rescale: bool) -> None:
        super().__init__(torch.zeros_like(initial))
        self.rescale = rescale
        self.register_buffer("initial", initial)
        self.register_buffer("mask", torch.zeros_like(initial, dtype=torch.bool))
        self.register_buffer("by", torch.ones((), dtype=initial.dtype, device=initial.device))

    def forward(self, scores: Tensor) -> Tensor:
        return effective(scores, self.initial, self.mask, self.by)

    def take(self, mask: Tensor) -> None:
        # new tensors, not in place: a graph may still hold the old ones
        self.mask = mask
        self.by = torch.full_like(self.by, factor(mask) if self.rescale else 1.0)


class Supermask(Parametrized):
    """Learn which of the initial weights to keep.

    From :meth:`attach` to :meth:`finish` the scores stand in the weights' place in the module and
    in the optimizer's groups, and every read of a weight gives the effective one under the present
    mask, which is drawn anew after each step. The model's ``state_dict`` holds scores, initial
    weights and masks; deep copies compute the same. The layers' biases are zero and frozen, until
    ``finish``, which leaves the effective weights as plain tensors.

    The probability moves by ``p (1 - p) w_i`` times the gradient, which is small: learning rates
    are of the order of 10 to 100, without weight decay.

    Args:
        generator: of the draws; its state is part of :meth:`state_dict`.
        rescale: multiply each layer by its elements over its ones.
        include, exclude: layer patterns (:func:`gossamer.core.names.weights`).

    Raises :class:`ArgumentError` on attach for patterns that match nothing, a model without
    weights, weights that are parametrized already or not finite, or an optimizer that holds none
    of them; the model is left as it was.
    """

    def __init__(
        self,
        *,
        generator: torch.Generator,
        rescale: bool,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
    ) -> None:
        super().__init__()
        self.generator, self.rescale = generator, rescale
        self.include, self.exclude = include, exclude
        self.factors: dict[str, float] = {}
        self._masks = Masks()
        self._frozen: list[nn.Parameter] = []

    def _weights(self) -> Mapping[str, nn.Parameter]:
        weights = names.weights(self.model, include=self.include, exclude=self.exclude)
        if not weights:
            raise ArgumentError("the model has no weight to mask; name some with include=")
        for name, p in weights.items():
            if not torch.isfinite(p).all():
                raise ArgumentError(f"{name} holds NaN or infinity; initialise the model first")
        return weights

    def _modules(self, weights: Mapping[str, nn.Parameter]) -> Mapping[str, Computed]:
        return {n: _Masked(p.detach().clone(), rescale=self.rescale) for n, p in weights.items()}

    def _begin(self, latents: Mapping[str, Latent]) -> None:
        biases = {
            id(p): p
            for held in latents.values()
            for owner, _, _ in held.places
            for attribute, p in owner.named_parameters(recurse=False)
            if "bias" in attribute
        }
        self._frozen = [p for p in biases.values() if p.requires_grad]
        for p in biases.values():
            p.requires_grad_(False).zero_()
            p.grad = None

    def _begun(self) -> None:
        self.sample()

    def after_step(self) -> None:
        """Draw the next masks."""
        self.sample()

    def _zeros(self) -> hooks.Zeros:
        return [(n, h.plain, h.module.mask, None) for n, h in self._held.items()]

    def sample(self) -> Masks:
        """Draw masks, which every read of the weights uses until the next draw.

        Raises :class:`ArgumentError`, as :meth:`threshold` does, for scores that are NaN.
        """
        self._look()
        return self._take({n: draw(h.parameter, self.generator) for n, h in self._held.items()})

    def threshold(self) -> Masks:
        """Keep what is likelier kept than not: scores above 0."""
        self._look()
        return self._take({n: h.parameter.detach() > 0 for n, h in self._held.items()})

    def _look(self) -> None:
        for name, held in self._held.items():
            _numbers(held.parameter, f"the scores of {name}")

    def _take(self, masks: Mapping[str, Tensor]) -> Masks:
        for name, mask in masks.items():
            self._held[name].module.take(mask)
        return self.masks

    @property
    def masks(self) -> Masks:
        """The present masks; after :meth:`finish` those it left in the weights."""
        if self._held:
            self._masks = Masks({n: h.module.mask.clone() for n, h in self._held.items()})
            self.factors = {n: float(h.module.by) for n, h in self._held.items()}
        return Masks(self._masks)

    def seeds(self, seeds: Mapping[str, Seed]) -> dict[str, Seed]:
        """The seeds of the initial weights with the present masks' factors, ready to pack."""
        chosen = self.masks
        return {
            name: replace(seed, factor=self.factors[name]) if name in chosen else seed
            for name, seed in seeds.items()
        }

    def finish(self) -> None:
        """Plain weights, the effective ones under the present masks; biases train again."""
        _ = self.masks
        self._look_out()
        super().finish()
        for p in self._frozen:
            p.requires_grad_(True)
        self._frozen = []

    def _state(self) -> dict[str, Any]:
        """The generator's state; scores and masks are in the model's ``state_dict``."""
        return {"generator": self.generator.get_state()}

    def _load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`_state` returned."""
        self.generator.set_state(state["generator"])
