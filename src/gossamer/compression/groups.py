"""What stages that speak of groups share: their settings, and masks by a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor, nn

from gossamer.compression.settings import Positive, Strict
from gossamer.compression.state import State
from gossamer.core import flops, names
from gossamer.core.errors import ArgumentError
from gossamer.core.group_budgets import (
    Cost,
    GroupBudget,
    group_scores,
    n_of_m,
    select,
    weight_cost,
)
from gossamer.core.groups import Family, families
from gossamer.core.layer_groups import check_kind, layer_groups
from gossamer.core.masks import Masks
from gossamer.structure import coupled_groups, norms_behind
from gossamer.structure.latency import Latency

__all__ = [
    "COUPLED",
    "Consumers",
    "CoupledOrKind",
    "GroupSettings",
    "Kind",
    "coupled",
    "found",
    "multiplications",
]


COUPLED = "coupled"
"""The kind of groups that go through the whole network: a unit with all that makes and reads it."""


def _kind(value: str) -> str:
    check_kind(value)  # an ArgumentError is a ValueError, which pydantic reports
    return value


Kind = Annotated[str, AfterValidator(_kind)]


def _any_kind(value: str) -> str:
    return value if value == COUPLED else _kind(value)


CoupledOrKind = Annotated[str, AfterValidator(_any_kind)]
Consumers = dict[str, str | list[str]]


class GroupPruning(Strict):
    """How groups are scored and what they cost, where not single weights are removed.

    Attributes:
        kind: of the groups (:data:`gossamer.core.layer_groups.KINDS`); or ``coupled``: channels,
            hidden units, states and heads through the whole network, with the norms behind them
            and all that reads them, residual sums included
            (:func:`gossamer.structure.coupled_groups`), so that ``shrink`` can take them out.
        norm: of a group from its weights' scores.
        cost: what a density is a part of: groups, bytes, multiplications, or ``latency``: the
            milliseconds of the shrunk network, measured here on one example and one thread; of
            coupled groups and the whole network (``scope: global``).
        milliseconds: in place of a density: what the network may take, by ``cost: latency``.
        normalise: divide scores by their mean over alike groups.
        multiple: groups kept in each layer are a multiple of it.
        consumers: of ``unit``: a recurrent layer -> what reads its outputs.
    """

    kind: CoupledOrKind
    norm: Literal["l2", "mean", "sum"] = "l2"
    cost: Literal["count", "bytes", "flop", "latency"] = "count"
    milliseconds: Positive | None = None
    normalise: bool = False
    multiple: Annotated[int, Field(ge=1)] = 1
    consumers: Consumers | None = None

    @model_validator(mode="after")
    def _measurable(self) -> GroupPruning:
        if self.cost == "latency" and self.kind != COUPLED:
            raise ValueError(
                f"cost: latency is of groups that can be taken out, {COUPLED} ones, not {self.kind}"
            )
        if self.milliseconds is not None and self.cost != "latency":
            raise ValueError("milliseconds is a budget of cost: latency; add it")
        return self

    @property
    def fixed(self) -> bool:
        """Whether the kind itself says how much stays, as 2:4 does."""
        return ":" in self.kind

    def families(
        self, model: nn.Module, weights: Iterable[str], include: list[str] | None
    ) -> list[Family]:
        """The groups of a network (:func:`found`); of coupled ones none, for that takes inputs."""
        if self.kind == COUPLED:
            return []
        return found(model, self.kind, weights, include, self.consumers)

    def _made(self, state: State, weights: Mapping[str, Tensor], include: Any) -> list[Family]:
        if self.kind != COUPLED:
            return self.families(state.model, weights, include)
        return coupled(state, weights)

    def masks(
        self,
        state: State,
        weights: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
        density: float | Mapping[str, float],
        *,
        scope: Literal["layer", "global"],
        floor: int,
        include: list[str] | None,
        latency: Latency | None = None,
    ) -> Masks:
        """Masks of the best groups; what was pruned before stays pruned.

        Args:
            density: one number, or by clean name of a weight.
            latency: the cost, where it is measured (:meth:`measured`).
        """
        made = self._made(state, weights, include)
        before = Masks(dict(state.masks))
        if self.fixed:
            return _within(_n_of_m(made, scores, before), before)
        left = {n: s.where(before[n], 0.0) if n in before else s for n, s in scores.items()}
        ranks = []
        for family, rank in zip(made, group_scores(made, left, self.norm), strict=True):
            alive = family.sums({n: _ones(weights[n], before.get(n)) for n in family.parameters
                                 if n in weights}) > 0  # fmt: skip
            ranks.append(rank.where(alive, rank.min() - 1))  # emptied before: the first to go
        if isinstance(density, Mapping):
            density = {f.layer: density[next(n for n in f.parameters if n in weights)]
                       for f in made}  # fmt: skip
        budget = GroupBudget(
            density, scope=scope, normalise=self.normalise, multiple=self.multiple,
            floor=0 if self.kind == "depth" else max(1, floor),
        )  # fmt: skip
        cost = self._cost(state) if latency is None else latency
        masks = select(made, ranks, budget, cost=cost)
        if self.kind == "depth":
            masks |= _shifts(state, masks)
        return _within(masks, before)

    def measured(self, state: State) -> Latency | None:
        """Milliseconds of the present network, whatever is zero in it; None for other costs."""
        if self.cost != "latency":
            return None
        example = state.example()
        return Latency(state.model, example[0] if isinstance(example, tuple) else example)

    def _cost(self, state: State) -> Cost | None:
        if self.cost == "count":
            return None
        if self.cost == "bytes":
            everything = names.parameters(state.model)
            return weight_cost({n: float(p.element_size()) for n, p in everything.items()})
        return weight_cost(multiplications(state))


def _by_kind(value: Any) -> Any:
    if isinstance(value, int | float):  # YAML reads 2:4 to the base of 60
        raise ValueError(f"{value} is no kind of groups; write N:M in quotes, such as '2:4'")
    return {"kind": value} if isinstance(value, str) else value


GroupSettings = Annotated[GroupPruning, BeforeValidator(_by_kind)]
"""A kind alone, or all settings."""


def _n_of_m(
    made: Iterable[Family], scores: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> Masks:
    """N of M in every weight; what was pruned before goes first."""
    least = {n: s.detach().where(before[n], s.min() - 1) if n in before else s.detach()
             for n, s in scores.items()}  # fmt: skip
    masks = Masks()
    for family in made:
        masks.update(n_of_m(family, least))
    return masks


def _ones(weight: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(weight) if mask is None else mask.to(weight)


def _shifts(state: State, masks: Masks) -> Masks:
    """Nothing kept of the shifts of batch-norms behind layers of which nothing is kept.

    Such a layer gives zeros, or its bias; its norm would add its shift to the shortcut for ever,
    and take the running mean of what the layer gave before from it until training has forgotten
    that.
    """
    gone = [n for n, m in masks.items() if not m.any()]
    if not gone:
        return Masks()
    example = state.example()
    behind = norms_behind(
        state.model, example[0] if isinstance(example, tuple) else example, feed=state.task.feed
    )
    tensors, modules = names.parameters(state.model), names.modules(state.model)
    shifts = Masks()
    for name, norm in ((n, behind[n]) for n in gone if n in behind):
        bias = tensors.get(f"{name.removesuffix('weight')}bias")
        if isinstance(mean := modules[norm].running_mean, Tensor):
            mean.copy_(torch.zeros_like(mean) if bias is None else bias.detach())
        if f"{norm}.bias" in tensors:
            shifts[f"{norm}.bias"] = torch.zeros_like(tensors[f"{norm}.bias"], dtype=torch.bool)
    return shifts


def _within(masks: Masks, before: Mapping[str, Tensor]) -> Masks:
    return Masks({n: m & before[n] if n in before else m for n, m in masks.items()})


def coupled(state: State, weights: Iterable[str]) -> list[Family]:
    """The coupled groups of which some of the weights make the values.

    Raises :class:`ArgumentError` where there are none.
    """
    example, chosen = state.example(), set(weights)
    example = example[0] if isinstance(example, tuple) else example
    every = coupled_groups(state.model, example)
    mine = [g for g in every if any(
        s.role == "produces" and s.parameter in chosen for s in g.members
    )]  # fmt: skip
    if not mine:
        raise ArgumentError(
            f"stage {state.name}: no unit of {type(state.model).__name__} goes without others; "
            "take a kind of one layer, such as filter"
        )
    return families(mine, names.parameters(state.model))


def found(
    model: nn.Module,
    kind: str,
    weights: Iterable[str],
    include: list[str] | None,
    consumers: Consumers | None,
) -> list[Family]:
    """The groups of the weights that a stage takes; of those that patterns name, all must fit.

    Raises :class:`ArgumentError` as :func:`gossamer.core.layer_groups.layer_groups`.
    """
    taken = list(weights)
    if include is not None:
        return layer_groups(model, kind, include=taken, consumers=consumers)
    left = [n for n in names.weights(model) if n not in taken]
    return layer_groups(model, kind, exclude=left or None, consumers=consumers)


def multiplications(state: State) -> dict[str, float]:
    """Multiplications an example of each weight, on the first training inputs.

    Raises :class:`ArgumentError` where no layer is known that multiplies.
    """
    example = state.example()
    example = example[0] if isinstance(example, tuple) else example
    weights = names.parameters(state.model)
    rows = flops.count(state.model, example, feed=state.task.feed).rows
    counted = {r.name: r.macs / weights[r.name].numel() for r in rows if r.name in weights}
    if not counted:
        raise ArgumentError(
            "no multiplications are known of this network's layers; take cost: bytes"
        )
    return counted
