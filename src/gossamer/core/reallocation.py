"""Where the weights of a sparse network go: what is dropped, which layer gets it, what grows.

The axes of dynamic sparse training; a method of the family is a choice on each
(:data:`gossamer.prune.dynamic.FAMILY`). Pure functions of tensors and masks:

- :func:`removals` and :func:`drop`: the smallest weights of each layer go, or of all layers;
- :func:`importance` and :func:`regrowth`: how many weights each layer gets back;
- :func:`grow`: the inactive weights of the highest score become active, at value 0.

Dettmers and Zettlemoyer, *Sparse Networks from Scratch*, 2019, arXiv 1907.04840, section 3 and
algorithm 1. The number of active weights of the whole network never changes in a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from gossamer.core.budgets import apportion
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks, keep_counts, keep_top

__all__ = ["drop", "drop_global", "grow", "importance", "regrowth", "removals"]

# A layer that is nearly whole has few places left to grow: below this sparsity it gives up less.
_NEARLY_WHOLE = 0.2
# The most of a layer's free places that one step fills.
_FILL = 0.99


def importance(values: Mapping[str, Tensor], masks: Masks) -> dict[str, float]:
    """Mean |value| over each layer's active weights, normalised to sum 1.

    A layer without active weights has 0. Where all are 0 (no step was taken yet) layers are
    equal.

    >>> import torch
    >>> on = torch.tensor([True, True])
    >>> importance({"a": torch.tensor([3.0, -3.0]), "b": torch.tensor([1.0, 1.0])},
    ...            Masks({"a": on, "b": on}))
    {'a': 0.75, 'b': 0.25}

    Raises :class:`ArgumentError` when a layer's mean is not finite.
    """
    means = {}
    for name, mask in masks.items():
        active = values[name][mask]
        means[name] = float(active.abs().double().mean()) if active.numel() else 0.0
        if not math.isfinite(means[name]):
            raise ArgumentError(f"momentum of {name!r} is not finite; lower the learning rate")
    total = sum(means.values())
    return {n: m / total if total else 1 / len(means) for n, m in means.items()}


def removals(
    masks: Masks, rate: float, importances: Mapping[str, float] | None = None
) -> dict[str, int]:
    """How many active weights each layer gives up: ceil(p_l * active).

    p_l is ``rate``, but for a layer of sparsity under .2 and an importance above average at most
    its sparsity. Deviation: a layer's last weight stays.

    Raises :class:`ArgumentError` for a rate outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ArgumentError(f"rate={rate} is outside [0, 1] (the fraction of active weights)")
    counts = {}
    for name, mask in masks.items():
        active = int(mask.sum())
        sparsity = 1 - active / max(1, mask.numel())
        p = rate
        if importances and sparsity < _NEARLY_WHOLE and importances[name] > 1 / len(masks):
            p = min(sparsity, rate)
        # 1e-9: .1 * 30 is 3 and a bit in binary, and 3 is meant
        counts[name] = max(0, min(math.ceil(p * active - 1e-9), active - 1))
    return counts


def drop(scores: Mapping[str, Tensor], masks: Masks, counts: Mapping[str, int]) -> Masks:
    """Remove the ``counts`` lowest-scoring active weights of each layer; of equals the later."""
    kept = {n: int(m.sum()) - counts[n] for n, m in masks.items()}
    return keep_counts(scores, kept, within=masks)


def drop_global(scores: Mapping[str, Tensor], masks: Masks, rate: float) -> Masks:
    """Remove the fraction ``rate`` of all active weights, by one ranking over all layers.

    Each layer keeps its best weight.
    """
    total = sum(m.numel() for m in masks.values())
    return keep_top(
        {n: scores[n] for n in masks},
        math.floor(masks.kept * (1 - rate) + 1e-9) / total,
        scope="global",
        within=masks,
        floor=1,
    )


def regrowth(
    removed: Mapping[str, int], left: Masks, importances: Mapping[str, float]
) -> dict[str, int]:
    """How many weights each layer gets: in proportion to importance, all that was removed.

    Args:
        removed: weights taken from each layer.
        left: the masks after that.

    A layer gets at most .99 of its free places; what it cannot take goes to the others in equal
    parts (the authors' code). Where that is too little room, all free places count.
    """
    total = sum(removed.values())
    free = {n: m.numel() - int(m.sum()) for n, m in left.items()}
    capacity = {n: math.floor(_FILL * f) for n, f in free.items()}
    if sum(capacity.values()) < total:
        capacity = free
    return apportion(importances, total, capacity, overflow="equal")


def grow(scores: Mapping[str, Tensor], masks: Masks, counts: Mapping[str, int]) -> Masks:
    """Activate the ``counts`` highest-scoring inactive weights of each layer.

    An active weight is never chosen again, whatever the scores tie at.

    Raises :class:`ArgumentError` when a layer has fewer inactive weights than that.
    """
    free = Masks({n: ~m for n, m in masks.items()})
    for name, mask in free.items():
        if counts[name] > int(mask.sum()):
            raise ArgumentError(
                f"{counts[name]} weights cannot grow in {name!r}: it has {int(mask.sum())} "
                "inactive weights left; lower the density or the rate"
            )
    grown = keep_counts({n: scores[n] for n in masks}, counts, within=free)
    return Masks({n: m | grown[n] for n, m in masks.items()})
