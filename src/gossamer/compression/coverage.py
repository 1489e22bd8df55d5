"""How much of a network a stage acts on, and what lies outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from gossamer.compression.layers import chosen, per_layer, quantized_weights
from gossamer.compression.recipe import Recipe
from gossamer.compression.schema import Layers, Quantize, Sensitivity, Svd
from gossamer.core import names

__all__ = ["of_recipe", "of_stage"]

# Settings that may be given by layer: a layer that none names is left as it is.
_BY_LAYER = ("density", "quality", "bits", "lam", "step", "rank", "energy", "rate")
_SMALL = "biases, norms"


def of_stage(model: nn.Module, stage: Any) -> dict[str, Any] | None:
    """Parameters that a stage acts on and those outside; None for a stage without layers.

    Returns ``parameters`` (of the network), ``covered``, and ``outside``: kind of module ->
    ``[modules, parameters]``, the largest first; vectors count as one kind.

    >>> from gossamer.compression.schema import Prune
    >>> net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    >>> of_stage(net, Prune(density=0.5))
    {'parameters': 30, 'covered': 8, 'outside': {'Embedding': [1, 20], 'biases, norms': [1, 2]}}
    """
    covered = _names(model, stage)
    return None if covered is None else _figures(model, covered)


def of_recipe(model: nn.Module, recipe: Recipe) -> dict[str, Any] | None:
    """The same of all stages together, on the network that the run began with."""
    found = [part for s in recipe.work if (part := _names(model, s)) is not None]
    return _figures(model, set().union(*found)) if found else None


def _names(model: nn.Module, stage: Any) -> set[str] | None:
    if not isinstance(stage, Layers) or isinstance(stage, Sensitivity):
        return None
    weights = (
        quantized_weights(model, stage)
        if isinstance(stage, Quantize)
        else chosen(model, stage.include, stage.exclude)
    )
    covered = set(weights)
    for key in _BY_LAYER:
        value = getattr(stage, key, None)
        if isinstance(value, Mapping):
            covered &= set(per_layer(model, weights, value))
    if isinstance(stage, Svd):
        linear = {names.clean(f"{n}.weight") for n, m in model.named_modules() if _linear(m)}
        covered &= linear
    return covered


def _linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


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
