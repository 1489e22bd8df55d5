"""Train, prune, retrain by weight magnitude.

Han, Pool, Tran, Dally, *Learning both Weights and Connections for Efficient Neural Networks*,
NIPS 2015, arXiv 1506.02626.

- Section 3.4: threshold of layer l = q_l * std(W_l) (:func:`threshold_masks`).
- Section 3.2, eq. 2: dropout D_r = D_o * sqrt(C_ir / C_io), C the layer's connections
  (:func:`rescale_dropout`).
- Section 3.3: iterative pruning (:func:`density_ladder` gives each round's densities).

Deviations: the standard deviation is over the weights still alive, since the zeros of an earlier
round are no sample of the distribution; a budget may be given as a density instead of a quality;
at least ``floor`` weights of a layer stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import EmptyLayerWarning, Masks, above_quality, keep_top, warn_empty
from gossamer.core.names import Tensors

__all__ = [
    "EmptyLayerWarning",
    "densities_for",
    "density_ladder",
    "prune",
    "random_scores",
    "rescale_dropout",
    "scores",
    "threshold_masks",
    "warn_empty",
]

Patterns = str | Iterable[str] | None

_RATE = "_gossamer_rate"  # of a dropout layer: its own rate, and what it was rescaled to


def scores(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> Tensors:
    """|w| of every compressible weight: clean name -> tensor of the weight's shape."""
    chosen = names.weights(model, include=include, exclude=exclude)
    return {name: w.detach().abs() for name, w in chosen.items()}


def random_scores(
    model: nn.Module,
    generator: torch.Generator,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Tensors:
    """Uniform random scores: the control that every criterion must beat."""
    chosen = names.weights(model, include=include, exclude=exclude)
    return {name: torch.rand(w.shape, generator=generator) for name, w in chosen.items()}


def densities_for(weights: Iterable[str], density: float | Mapping[str, float]) -> dict[str, float]:
    """A density for each weight: one for all, or by pattern (unnamed layers stay whole).

    The last matching pattern wins, so that ``{"*": .1, "conv1": .5}`` reads as written.

    >>> densities_for(["conv1.weight", "fc.weight"], {"*": 0.1, "conv1": 0.5})
    {'conv1.weight': 0.5, 'fc.weight': 0.1}
    """
    pool = list(weights)
    if not isinstance(density, Mapping):
        return dict.fromkeys(pool, density)
    found = dict.fromkeys(pool, 1.0)
    for pattern, value in density.items():
        for name in names.select(pool, pattern):
            found[name] = value
    return found


def density_ladder(final: Mapping[str, float], rounds: int) -> list[dict[str, float]]:
    """Densities of each round of iterative pruning: the same fraction goes in every round.

    >>> density_ladder({"w": 0.25}, 2)
    [{'w': 0.5}, {'w': 0.25}]
    """
    if rounds < 1:
        raise ArgumentError(f"rounds={rounds} must be at least 1")
    return [
        {n: d if r == rounds else d ** (r / rounds) for n, d in final.items()}
        for r in range(1, rounds + 1)
    ]


def prune(
    model: nn.Module,
    density: float | Mapping[str, float],
    *,
    scope: Literal["layer", "global"] = "layer",
    include: Patterns = None,
    exclude: Patterns = None,
    within: Masks | None = None,
    floor: int = 1,
) -> Masks:
    """Masks of the largest weights; apply them with :class:`gossamer.core.method.Masked`.

    Args:
        density: fraction kept in [0, 1]: one number, or by layer pattern (``scope="layer"``).
        scope: a budget for each layer, or one for the whole network.
        within: masks of an earlier round; what they removed stays removed.
        floor: at least so many weights stay in each layer.

    Raises :class:`ArgumentError` as :func:`gossamer.core.masks.keep_top` does. Warns with
    :class:`EmptyLayerWarning` when a layer keeps nothing.
    """
    ranked = scores(model, include=include, exclude=exclude)
    if not ranked:
        raise ArgumentError("the model has no weight to prune; name some with include=")
    budget: float | Mapping[str, float] = density
    if scope == "layer":
        budget = densities_for(ranked, density)
    masks = keep_top(ranked, budget, scope=scope, within=within, floor=floor)
    warn_empty(masks)
    return masks


def threshold_masks(
    model: nn.Module,
    quality: float | Mapping[str, float],
    *,
    within: Masks | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Masks:
    """Keep |w| > q_l * std(W_l), the standard deviation over the layer's non-zero weights.

    Args:
        quality: q, one for all layers or by pattern (unnamed layers stay whole).

    Raises :class:`ArgumentError` for a negative or non-finite quality, or NaN weights.
    """
    weights = names.weights(model, include=include, exclude=exclude)
    factors = dict.fromkeys(weights, 0.0)
    named: set[str] = set()
    for pattern, value in quality.items() if isinstance(quality, Mapping) else [("*", quality)]:
        for name in names.select(weights, pattern):
            factors[name] = value
            named.add(name)
    masks = Masks()
    for name, w in weights.items():
        q = factors[name]
        # an unnamed layer stays whole, its zeros too
        mask = above_quality(w, q, name=name) if q or name in named else torch.ones_like(w) != 0
        masks[name] = mask & within[name] if within is not None and name in within else mask
    warn_empty(masks)
    return masks


def rescale_dropout(
    model: nn.Module, masks: Masks, *, layers: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Set each dropout rate to D_o * sqrt(C_ir / C_io) for retraining; returns the old rates.

    Section 3.2: the pruned layer has fewer connections, so it needs less dropout. The rate of a
    dropout layer follows the nearest weighted layer before it in module order; ``layers`` maps
    dropout name -> weight name explicitly. Restore the old rates by assigning ``p``.

    D_o is the rate before the first call: called again, with the masks of a later round or the
    same ones, the rate is D_o rescaled once, and D_o is returned. A rate that was assigned since
    is a new D_o.

    Raises :class:`ArgumentError` for a name in ``layers`` that does not exist.
    """
    modules, known = dict(model.named_modules()), names.cleaned(model)
    follows: dict[str, str] = {}
    previous = None
    for name, module in modules.items():
        if f"{known[name]}.weight" in masks:
            previous = f"{known[name]}.weight"
        elif isinstance(module, nn.modules.dropout._DropoutNd) and previous is not None:
            follows[name] = previous
    for dropout, weight in (layers or {}).items():
        if not isinstance(modules.get(dropout), nn.modules.dropout._DropoutNd):
            raise ArgumentError(f"layers names {dropout!r}, which is no dropout layer")
        if weight not in masks:
            raise ArgumentError(f"layers names {weight!r}, masks are: {', '.join(masks)}")
        follows[dropout] = weight
    old: dict[str, float] = {}
    for dropout, weight in follows.items():
        module = modules[dropout]
        assert isinstance(module, nn.modules.dropout._DropoutNd)
        before, ours = module.__dict__.get(_RATE, (module.p, module.p))
        old[dropout] = rate = before if module.p == ours else module.p
        mask = masks[weight]
        module.p = rate * math.sqrt(int(mask.sum()) / max(1, mask.numel()))
        module.__dict__[_RATE] = (rate, module.p)  # with the module, so that copies know it too
    return old
