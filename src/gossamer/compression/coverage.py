"""How much of a network a stage acts on, and what lies outside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from gossamer.compression.recipe import Recipe
from gossamer.compression.stage import Stage
from gossamer.core import names

__all__ = ["of_recipe", "of_stage"]

_SMALL = "biases, norms"


def of_stage(model: nn.Module, stage: Stage) -> dict[str, Any] | None:
    """Parameters that a stage acts on and those outside; None for a stage without layers.

    Returns ``parameters`` (of the network), ``covered``, and ``outside``: kind of module ->
    ``[modules, parameters]``, the largest first; vectors count as one kind.

    >>> from gossamer.compression.stages.prune import Prune
    >>> net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    >>> of_stage(net, Prune(density=0.5))
    {'parameters': 30, 'covered': 8, 'outside': {'Embedding': [1, 20], 'biases, norms': [1, 2]}}
    """
    covered = stage.covered(model)
    return None if covered is None else _figures(model, covered)


def of_recipe(model: nn.Module, recipe: Recipe) -> dict[str, Any] | None:
    """The same of all stages together, on the network that the run began with."""
    found = [part for s in recipe.work if (part := s.covered(model)) is not None]
    return _figures(model, set().union(*found)) if found else None


def _figures(model: nn.Module, covered: Iterable[str]) -> dict[str, Any]:
    inside, everything = set(covered), names.parameters(model)
    owner: dict[int, str] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owner.setdefault(id(p), type(module).__name__)
    outside: dict[str, list[int]] = {}
    for name, p in everything.items():
        if name not in inside:
            row = outside.setdefault(owner[id(p)] if p.ndim >= 2 else _SMALL, [0, 0])
            row[0] += 1
            row[1] += p.numel()
    return {
        "parameters": sum(p.numel() for p in everything.values()),
        "covered": sum(p.numel() for n, p in everything.items() if n in inside),
        "outside": dict(sorted(outside.items(), key=lambda item: -item[1][1])),
    }
