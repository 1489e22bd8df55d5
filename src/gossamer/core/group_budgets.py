"""Budgets over groups: score -> budget -> masks, where whole groups stay or go.

Any score of weights is a score of groups (:func:`group_scores`). A budget is a number of groups,
or any cost of the masks: weights, bytes or multiplications (:func:`weight_cost`), or a function
that measures milliseconds. Groups are ranked, ties to the earlier, and the longest run of the
best that the budget pays for stays.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError, one_of
from gossamer.core.groups import Family, masks_of
from gossamer.core.masks import Masks

__all__ = ["Cost", "FloorWarning", "GroupBudget", "group_scores", "n_of_m", "select", "weight_cost"]

Cost = Callable[[Masks], float]
"""What is left costs, by its masks; fewer groups must not cost more."""


class FloorWarning(UserWarning):
    """A layer keeps more groups than the budget gave it, so as not to be emptied."""


@dataclass(frozen=True)
class GroupBudget:
    """How much stays.

    Attributes:
        density: the fraction of the cost, in (0, 1]; or one by the families' layers, where a
            layer that is not named stays whole (scope ``layer`` only).
        limit: in place of a density, the cost itself: groups, bytes, milliseconds.
        scope: ``layer`` gives each family its own budget, ``global`` one to all.
        normalise: divide scores by their mean over alike groups (of one kind, with slices of the
            same axes and roles), so that kinds of different size compete fairly (after Fang et
            al., *Isomorphic Pruning for Vision Models*, ECCV 2024, which ranks each class alone).
        floor: groups that each family keeps at least; 0 lets layers go whole, which suits those
            beside a shortcut (``depth``).
        multiple: kept groups of a family are a multiple of it, rounded down, or all of them.

    Raises :class:`ArgumentError` for values outside what is allowed.
    """

    density: float | Mapping[str, float] | None = None
    limit: float | None = None
    scope: Literal["layer", "global"] = "layer"
    normalise: bool = False
    floor: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        one_of("scope", self.scope, ("layer", "global"))
        if (self.density is None) == (self.limit is None):
            raise ArgumentError("give either density (the fraction kept) or limit (the cost kept)")
        named = self.density if isinstance(self.density, Mapping) else {"": self.density}
        for layer, value in named.items():
            if value is not None and not 0 < value <= 1:
                raise ArgumentError(f"density {layer}={value} is outside (0, 1] (the part kept)")
        if self.limit is not None and not (self.limit > 0 and math.isfinite(self.limit)):
            raise ArgumentError(f"limit={self.limit} must be more than 0 and finite")
        if isinstance(self.density, Mapping) and self.scope == "global":
            raise ArgumentError("a density by layer needs scope='layer'; scope='global' takes one")
        for name, least in (("floor", 0), ("multiple", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}={getattr(self, name)} must be at least {least}")


def group_scores(
    groups: Sequence[Family],
    scores: Mapping[str, Tensor],
    how: Literal["sum", "mean", "l2"] = "sum",
) -> list[Tensor]:
    """Scores of groups from scores of weights: a tensor (count,) a family.

    ``sum`` suits scores that predict a change of the loss; ``l2`` of magnitudes is the norm.
    Members without a score (biases) add nothing.

    Raises :class:`ArgumentError` for NaN, an unknown way, or a family without any score.
    """
    one_of("how", how, ("sum", "mean", "l2"))
    for name, score in scores.items():
        if torch.isnan(score).any():
            raise ArgumentError(f"score {name!r} holds NaN; check the weights and gradients")
    detached = {n: s.detach() for n, s in scores.items()}
    found = []
    for family in groups:
        if how == "l2":
            squares = family.sums({n: s.square() for n, s in detached.items()})
            found.append(squares.clamp_min(0).sqrt())
            continue
        total = family.sums(detached)
        if how == "mean":
            total = total / family.sums({n: torch.ones_like(s) for n, s in detached.items()})
        found.append(total)
    return found


def weight_cost(per_weight: Mapping[str, float]) -> Cost:
    """A cost that each kept weight has its share of: 1, its bytes, or its multiplications.

    A parameter that is not named costs nothing; exact where groups overlap.
    """
    return lambda masks: sum(
        per_weight[n] * int(mask.sum()) for n, mask in masks.items() if n in per_weight
    )


def select(
    groups: Sequence[Family],
    scores: Sequence[Tensor],
    budget: GroupBudget,
    *,
    cost: Cost | None = None,
) -> Masks:
    """Masks that keep the groups of the highest scores within a budget.

    Args:
        groups, scores: families, and for each the scores of its groups (:func:`group_scores`).
        cost: of what is left; None: the number of groups kept, met exactly (rounded to nearest,
            less what ``multiple`` rounds down).

    Warns with :class:`FloorWarning` where the floor keeps more than the budget gave.
    Raises :class:`ArgumentError` for scores that do not fit or are NaN, or a budget below what
    the floor alone costs.
    """
    if not groups or len(groups) != len(scores):
        raise ArgumentError(f"{len(groups)} families have {len(scores)} scores; give one each")
    ranks = []
    for family, score in zip(groups, scores, strict=True):
        if tuple(score.shape) != (len(family),):
            raise ArgumentError(f"{family!r} has a score of shape {tuple(score.shape)}")
        if torch.isnan(score).any():
            raise ArgumentError(f"scores of {family!r} hold NaN; check the weights and gradients")
        ranks.append(score.detach().double().cpu())
    if budget.normalise:
        ranks = _normalised(groups, ranks)
    kept: list[tuple[Family, Tensor]] = []
    raised: list[str] = []
    if budget.scope == "global":
        kept = _fitted(list(groups), ranks, budget.density, budget, cost, raised)
    else:
        for family, rank in zip(groups, ranks, strict=True):
            density = budget.density
            if isinstance(density, Mapping):
                density = density.get(family.layer, 1.0)
            kept += _fitted([family], [rank], density, budget, cost, raised)
    if raised:
        warnings.warn(
            f"{', '.join(raised)} would keep fewer groups than the floor (floor={budget.floor}, "
            f"multiple={budget.multiple}), which stays",
            FloorWarning,
            stacklevel=2,
        )
    return masks_of(kept)


def _alike(family: Family) -> tuple[object, ...]:
    return family.kind, *sorted((len(f.view), f.axis, f.role) for f in family.faces)


def _normalised(groups: Sequence[Family], ranks: Sequence[Tensor]) -> list[Tensor]:
    classes: dict[tuple[object, ...], list[Tensor]] = {}
    for family, rank in zip(groups, ranks, strict=True):
        classes.setdefault(_alike(family), []).append(rank)
    means = {key: float(torch.cat(mine).mean()) for key, mine in classes.items()}
    return [
        rank / means[_alike(f)] if means[_alike(f)] else rank
        for f, rank in zip(groups, ranks, strict=True)
    ]


def _fitted(
    groups: list[Family],
    ranks: list[Tensor],
    density: float | Mapping[str, float] | None,
    budget: GroupBudget,
    cost: Cost | None,
    raised: list[str],
) -> list[tuple[Family, Tensor]]:
    """Families that share a budget, each with which of its groups stay; layers at their floor."""
    sizes = [len(f) for f in groups]
    least = [min(n, -(-budget.floor // budget.multiple) * budget.multiple) for n in sizes]
    order = torch.argsort(torch.cat(ranks), descending=True, stable=True)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[order]

    def kept(first: int) -> list[int]:
        """Groups of each family among the first of the ranking, with floor and multiple."""
        counts = torch.bincount(owner[:first], minlength=len(sizes)).tolist()
        return [
            max(low, n if n == size else n - n % budget.multiple)
            for n, size, low in zip(counts, sizes, least, strict=True)
        ]

    def chosen(counts: Sequence[int]) -> list[tuple[Family, Tensor]]:
        found = []
        for family, rank, n in zip(groups, ranks, counts, strict=True):
            keep = torch.zeros(len(rank), dtype=torch.bool)
            keep[torch.argsort(rank, descending=True, stable=True)[:n]] = True
            found.append((family, keep))
        return found

    def price(first: int) -> float:
        counts = kept(first)
        return float(sum(counts)) if cost is None else float(cost(masks_of(chosen(counts))))

    total = sum(sizes)
    if isinstance(density, float | int):
        limit = float(int(density * total + 0.5)) if cost is None else density * price(total)
    else:
        limit = float(budget.limit or 0)
    if cost is not None:
        limit *= 1 + 1e-12  # a density of 1 keeps all, whatever rounding says of the product
    low = price(0)
    if low > limit and (density is None or len(groups) > 1):  # one family's density has a floor
        raise ArgumentError(
            f"the budget of {limit:g} is below {low:g}, which {sum(least)} groups cost that the "
            f"floor keeps (floor={budget.floor}, multiple={budget.multiple}); raise the budget"
        )
    # price never falls with the length of the run: halve what is left
    first, last = 0, total
    while first < last:
        middle = (first + last + 1) // 2
        first, last = (middle, last) if price(middle) <= limit else (first, middle - 1)
    raw = torch.bincount(owner[:first], minlength=len(sizes)).tolist()
    final = kept(first)
    raised += [f.layer for f, n, m in zip(groups, raw, final, strict=True) if m > n]
    return chosen(final)


def n_of_m(family: Family, scores: Mapping[str, Tensor]) -> Masks:
    """Masks that keep the N best of the M weights of each group; ties to the earlier.

    Raises :class:`ArgumentError` for groups of another kind than N:M, or NaN scores.
    """
    if family.sparse is None:
        raise ArgumentError(f"{family!r} are no groups of N:M weights; name a kind such as '2:4'")
    keep, of = family.sparse
    masks = Masks()
    for face in family.faces:
        score = scores[face.parameter].detach().reshape(-1)
        if torch.isnan(score).any():
            raise ArgumentError(f"score {face.parameter!r} holds NaN; check the weights")
        places = face.entries.to(score.device).view(-1, of)
        order = torch.argsort(score[places], dim=1, descending=True, stable=True)[:, :keep]
        mask = torch.zeros(len(score), dtype=torch.bool, device=score.device)
        mask[places.gather(1, order)] = True
        masks[face.parameter] = mask.view(face.shape)
    return masks
