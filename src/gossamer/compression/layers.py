"""A recipe's layer patterns against a network: resolved, and checked before anything runs."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from gossamer.compression.recipe import Recipe
from gossamer.compression.schema import Activations, FixedPoint, Layers, Quantize
from gossamer.core import names
from gossamer.core.errors import ArgumentError, RecipeError
from gossamer.quantize import capture

__all__ = ["check", "chosen", "per_layer", "quantized_weights"]

T = TypeVar("T")


def chosen(
    model: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
) -> dict[str, nn.Parameter]:
    """The weights that a stage acts on: clean name -> parameter.

    Raises :class:`ArgumentError` for a pattern that matches nothing, or when nothing is left.
    """
    everything = names.parameters(model)
    found = names.weights(
        model,
        include=None if include is None else _expand(model, everything, include),
        exclude=None if exclude is None else _expand(model, everything, exclude),
    )
    if not found:
        raise ArgumentError(
            "no weight is left to act on; parameters are: " + ", ".join([*everything][:40])
        )
    return found


def quantized_weights(model: nn.Module, stage: Quantize) -> dict[str, nn.Parameter]:
    """The weights that a ``quantize`` stage acts on: the two ends stay float unless asked for.

    Raises :class:`ArgumentError` as :func:`chosen` does.
    """
    found = chosen(model, stage.include, stage.exclude)
    if stage.include is None and not stage.ends:
        apart = set(names.ends(model))
        found = {name: p for name, p in found.items() if name not in apart}
    if not found:
        raise ArgumentError(
            "no weight is left to quantize: the first and the last layer stay float; ends: true "
            "takes them too, include: names layers"
        )
    return found


def per_layer(model: nn.Module, weights: Iterable[str], value: T | Mapping[str, T]) -> dict[str, T]:
    """A value for each weight: one for all, or by pattern, of which the last that matches wins.

    A weight that no pattern names is left out. A ``type:`` pattern may match nothing, so that one
    recipe serves networks with and without such layers.

    Raises :class:`ArgumentError` for another pattern that matches nothing, naming the layers.
    """
    pool = list(weights)
    if not isinstance(value, Mapping):
        return dict.fromkeys(pool, value)
    found: dict[str, T] = {}
    for pattern, one in value.items():
        found.update(dict.fromkeys(_expand(model, pool, [pattern]), one))
    return {name: found[name] for name in pool if name in found}


def _expand(model: nn.Module, pool: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that any pattern matches."""
    pool, found = list(pool), []
    for pattern in patterns:
        if pattern.startswith("type:"):
            known = names.cleaned(model)
            owned = {
                known[f"{prefix}.{name}".lstrip(".")]
                for prefix, module in model.named_modules()
                if fnmatch.fnmatchcase(type(module).__name__, pattern[5:])
                for name, p in module.named_parameters(recurse=False)
                if p.ndim >= 2
            }
            found += [name for name in pool if name in owned]
        else:
            found += names.select(pool, pattern)
    return found


def check(recipe: Recipe, model: nn.Module) -> None:
    """Raise :class:`RecipeError` for a pattern that matches nothing, before any work is done."""
    for i, stage in enumerate(recipe.stages):
        if isinstance(stage, Activations):
            try:
                capture.activations(model, stage.functional, stage.include, stage.exclude)
            except ArgumentError as e:
                raise RecipeError(f"{recipe.place('stages', i)}: {e}") from e
        if isinstance(stage, FixedPoint):
            _check_patterns(recipe, model, i, chosen(model), "bits")
        if not isinstance(stage, Layers):
            continue
        for key in ("include", "exclude"):
            try:
                chosen(model, **{key: getattr(stage, key)})
            except ArgumentError as e:
                raise RecipeError(f"{recipe.place('stages', i, key)}: {e}") from e
        try:
            weights = (
                quantized_weights(model, stage)
                if isinstance(stage, Quantize)
                else chosen(model, stage.include, stage.exclude)
            )
        except ArgumentError as e:
            raise RecipeError(f"{recipe.place('stages', i)}: {e}") from e
        for key in ("density", "quality", "bits", "lam", "step", "rank", "energy"):
            _check_patterns(recipe, model, i, weights, key)


def _check_patterns(
    recipe: Recipe, model: nn.Module, i: int, weights: Iterable[str], key: str
) -> None:
    value = getattr(recipe.stages[i], key, None)
    for pattern in value if isinstance(value, Mapping) else ():
        try:
            _expand(model, weights, [pattern])
        except ArgumentError as e:
            raise RecipeError(f"{recipe.place('stages', i, key, pattern)}: {e}") from e
