r"""Group lasso: training that drives whole groups of weights to zero.

Wen, Wu, Wang, Chen, Li, *Learning Structured Sparsity in Deep Neural Networks*, NIPS 2016,
equations 1-3: :math:`E(W) = E_D(W) + \lambda R(W) + \sum_l \lambda_l \sum_g \|w_g\|_2`, without a
factor for a group's size. Three forms, told by name:

- ``sub-gradient``, the paper's: :math:`\lambda w / \|w_g\|` (0 where the norm is 0) is added to
  the gradient before momentum, and after the step what is smaller than a threshold becomes 0, as
  in the authors' Caffe fork. A group that the data do not need swings about 0 by the length of a
  step, learning rate times strength over (1 - momentum), shared by its weights: the learning rate
  must fall until that is below the threshold.
- ``smooth``: the same of :math:`\sqrt{\sum w^2 + 10^{-8}}` (Wen et al., *Learning Intrinsic Sparse
  Structures within LSTM*, ICLR 2018, equation 4).
- ``proximal``, not the paper's: after the step of learning rate :math:`\eta` each group is scaled
  by :math:`\max(0, 1 - \eta \lambda / \|w_g\|)`, which makes exact zeros without a threshold.
  Momentum does not see it, so that an equal pull takes a strength 1 / (1 - momentum) as large.

Biases and norms, parameters of one dimension, are in no penalty. Deviations: where groups overlap
(rows and columns of a matrix, the corners of an LSTM's units) the proximal form shrinks one family
after the other, and every group of a family by its norm before, which is a step towards all of
them but not the exact proximal map of their sum. Adam's scaling is not applied to it.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.core import hooks, names
from gossamer.core.access import check_weights
from gossamer.core.errors import ArgumentError, one_of
from gossamer.core.groups import Family
from gossamer.core.method import Method
from gossamer.core.names import Tensors

__all__ = ["FORMS", "GroupLasso", "gradients", "penalty", "proximal_"]

FORMS = ("sub-gradient", "smooth", "proximal")
_EPSILON = 1e-8  # in the root of the smooth form


def _factors(family: Family, sized: bool) -> Tensor:
    """What a group's norm is multiplied by besides its strength; (count,)."""
    return family.sizes().sqrt() if sized else torch.ones(len(family))


def penalty(
    family: Family,
    weights: Mapping[str, Tensor],
    *,
    form: str = "sub-gradient",
    sized: bool = False,
) -> Tensor:
    """Sum of the groups' norms, differentiable where no norm is 0; a scalar.

    ``sized``: each times the root of its number of weights (Yuan and Lin 2006).
    """  # fmt: skip
    one_of("form", form, FORMS)
    squares = family.sums({n: weights[n].square() for n in family.parameters})
    inside = squares.clamp_min(0) + (_EPSILON if form == "smooth" else 0.0)
    return (inside.sqrt() * _factors(family, sized).to(inside)).sum()


def gradients(
    family: Family,
    weights: Mapping[str, Tensor],
    *,
    form: str = "sub-gradient",
    sized: bool = False,
) -> Tensors:
    """The sub-gradient of :func:`penalty`, 0 in groups of norm 0; name -> tensor.

    >>> from torch import nn
    >>> from gossamer.core.layer_groups import layer_groups
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> w = {"0.weight": torch.tensor([[3.0, 4.0], [0.0, 0.0]])}
    >>> gradients(layer_groups(net, "row")[0], w)["0.weight"].tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """  # fmt: skip
    one_of("form", form, FORMS)
    found: Tensors = {}
    per = _pull(family, {n: weights[n].detach() for n in family.parameters}, form, sized)
    for name in family.parameters:
        found[name] = family.spread(per, name) * weights[name].detach()
    return found


def _pull(family: Family, weights: Mapping[str, Tensor], form: str, sized: bool) -> Tensor:
    """What each group's weights are multiplied by in the gradient; (count,)."""
    squares = family.norms(weights).square()
    if form == "smooth":
        inverse = (squares + _EPSILON).rsqrt()
    else:
        inverse = torch.where(squares > 0, squares.rsqrt(), 0.0)
    return inverse * _factors(family, sized).to(inverse)


@torch.no_grad()
def proximal_(
    family: Family,
    weights: Mapping[str, Tensor],
    step: float,
    *,
    sized: bool = False,
    fixed: Container[str] = (),
) -> None:
    """Scale each group by max(0, 1 - step / its norm), in place: the proximal map of its norm.

    A weight in several groups is scaled by each of them. Parameters in ``fixed`` count in the
    norms and stay as they are.
    """
    norms = family.norms(weights)
    least = step * _factors(family, sized).to(norms)
    kept = torch.where(norms > least, 1 - least / norms.clamp_min(1e-38), 0.0)
    # log turns the product over a weight's groups into a sum; a group at 0 is told apart
    shrink, gone = kept.clamp_min(1e-38).log(), (kept == 0).to(norms)
    for name in family.parameters:
        if name in fixed:
            continue
        weight = weights[name]
        scale = family.spread(shrink, name).exp()
        weight.mul_(scale.masked_fill_(family.spread(gone, name) > 0.5, 0.0).to(weight.dtype))


def _check(what: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ArgumentError(f"{what}={value} must be at least 0 and finite")


class GroupLasso(Method):
    """Add a group lasso to any training.

    Args:
        groups: families (:func:`gossamer.core.layer_groups.layer_groups`, or
            :func:`gossamer.core.groups.families` of any groups).
        strength: lambda, one number, or one by the family's layer; a layer that is not named has
            no penalty.
        form: one of :data:`FORMS`.
        threshold: weights of the groups that are smaller in magnitude after a step become 0; 0
            for none.
        sized: each norm times the root of the group's number of weights.

    Raises :class:`ArgumentError` for an unknown form, no groups, a strength or threshold that is
    negative or not finite, or a layer that has no groups.
    """

    def __init__(
        self,
        groups: Sequence[Family],
        strength: float | Mapping[str, float],
        *,
        form: str = "sub-gradient",
        threshold: float = 1e-4,
        sized: bool = False,
    ) -> None:
        super().__init__()
        one_of("form", form, FORMS)
        if not groups:
            raise ArgumentError("groups is empty; give families of groups")
        layers = {f.layer for f in groups}
        by = dict(strength) if isinstance(strength, Mapping) else dict.fromkeys(layers, strength)
        _check("threshold", threshold)
        for layer, value in by.items():
            _check(f"strength of {layer!r}", value)
        unknown = sorted(set(by) - layers)
        if unknown:
            raise ArgumentError(
                f"strength names {unknown[0]!r}, which has no groups; there are: "
                + ", ".join(sorted(layers))
            )
        self.form, self.threshold, self.sized = form, threshold, sized
        self._given = [(f.weights_only(), by[f.layer]) for f in groups if by.get(f.layer)]

    def settings(self) -> dict[str, Any]:
        """The groups by kind, layer and number, with their strengths."""
        rows = [[f.kind, f.layer, len(f), value] for f, value in self._given]
        rest = {"form": self.form, "threshold": self.threshold, "sized": self.sized}
        return {"groups": rows, **rest}

    def _setup(self) -> None:
        everything = names.parameters(self.model)
        for family, _ in self._given:
            family.check(everything)
        inside = dict.fromkeys(n for family, _ in self._given for n in family.parameters)
        self._weights = {n: everything[n] for n in inside}
        check_weights(self.model, self._weights)
        self._families = [
            (f.to(self._weights[f.parameters[0]].device), value) for f, value in self._given
        ]

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the penalty's gradient, except in the proximal form; sparse gradients become dense.

        A parameter without a gradient is left alone: it is not being trained.
        """
        if self.form == "proximal":
            return
        hooks.dense_gradients(self._weights.values())
        for family, strength in self._families:
            found = gradients(family, self._weights, form=self.form, sized=self.sized)
            for name, gradient in found.items():
                held = self._weights[name].grad
                if held is not None:
                    held.add_(gradient, alpha=strength)

    @torch.no_grad()
    def after_step(self) -> None:
        """The proximal step, then the threshold."""
        if self.form == "proximal":
            fixed = {n for n, w in self._weights.items() if not w.requires_grad}
            for family, strength in self._families:
                step = self._rate(family.parameters) * strength
                proximal_(family, self._weights, step, sized=self.sized, fixed=fixed)
        if self.threshold:
            for weight in self._weights.values():
                if weight.requires_grad:
                    weight.masked_fill_(weight.abs() < self.threshold, 0.0)

    def _rate(self, parameters: Iterable[str]) -> float:
        """The learning rate that moves a family's weights.

        Raises :class:`ArgumentError` where no optimizer is attached, or rates differ.
        """
        mine = {id(self._weights[n]) for n in parameters}
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        rates = {float(g["lr"]) for g in groups if any(id(p) in mine for p in g["params"])}
        if len(rates) > 1:
            raise ArgumentError(
                f"the proximal step needs one learning rate for {', '.join(parameters)}, there are "
                f"{sorted(rates)}; put them in one parameter group, or take form='sub-gradient'"
            )
        if self.optimizer is None:
            raise ArgumentError(
                "the proximal step needs the optimizer's learning rate; attach to an optimizer"
            )
        return rates.pop() if rates else 0.0

    @torch.no_grad()
    def penalty(self) -> float:
        """The present value of the whole penalty, strengths included."""
        return sum(
            value * float(penalty(f, self._weights, form=self.form, sized=self.sized))
            for f, value in self._families
        )
