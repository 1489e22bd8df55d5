"""What a lottery ticket is made of: mask criteria, and what becomes of kept and removed weights.

Zhou, Lan, Liu, Yosinski, *Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask*,
NeurIPS 2019, arXiv 1905.01067.

- Section 2, figure 3: nine criteria of the initial and final weight, and section 5: those that
  ask for the sign (:data:`CRITERIA`, :func:`criterion_masks`).
- Section 3: the mask-1 actions, what kept weights start from (:data:`KEPT`).
- Section 4: the mask-0 actions, what removed weights are held at (:data:`REMOVED`).

Deviations: ``max(0, +-wi wf / |wi|)`` is 0 for wi = 0, where the formula has no value; a weight of
0 counts as positive where a sign is kept; the constant is the standard deviation of the layer's
initial weights as they were drawn, so that any initialisation will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks, keep_top, warn_empty
from gossamer.core.method import Masked
from gossamer.core.names import Tensors

__all__ = [
    "CRITERIA",
    "KEPT",
    "REMOVED",
    "Criterion",
    "Start",
    "apply_actions",
    "criterion_masks",
    "scores",
]

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(initial, final) weights of one layer -> score of the same shape, higher = keep."""

CRITERIA: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "large_final": lambda wi, wf, a: wf.abs(),
    "small_final": lambda wi, wf, a: -wf.abs(),
    "large_init": lambda wi, wf, a: wi.abs(),
    "small_init": lambda wi, wf, a: -wi.abs(),
    "large_init_large_final": lambda wi, wf, a: torch.minimum(a * wf.abs(), wi.abs()),
    "small_init_small_final": lambda wi, wf, a: -torch.maximum(a * wf.abs(), wi.abs()),
    "magnitude_increase": lambda wi, wf, a: wf.abs() - wi.abs(),
    "movement": lambda wi, wf, a: (wf - wi).abs(),
    "large_final_same_sign": lambda wi, wf, a: (wf * wi.sign()).clamp_min(0),
    "large_final_diff_sign": lambda wi, wf, a: (-wf * wi.sign()).clamp_min(0),
}
"""Name -> score of (wi, wf, alpha); ``random`` is the eleventh, of a generator."""

KEPT = ("rewind", "reinit", "reshuffle", "constant")
"""Mask-1 actions: the initial value; another draw; the kept values permuted; +- the layer's std."""

REMOVED = ("zero", "freeze", "movement", "movement_both")
"""Mask-0 actions: held at 0; at wi; at 0 if |wf| < |wi| else at wi; and ``movement_both`` lets
kept weights that shrank start from 0, besides."""


def scores(
    criterion: str | Criterion,
    initial: Mapping[str, Tensor],
    final: Mapping[str, Tensor],
    *,
    alpha: float,
    generator: torch.Generator | None = None,
) -> Tensors:
    """A criterion's score of every weight; higher = keep.

    Args:
        criterion: a name of :data:`CRITERIA`, ``random``, or a function of (initial, final).
        initial, final: clean name -> weights before and after training.
        alpha: the factor of the two criteria that take both magnitudes.
        generator: for ``random``.

    >>> wi, wf = {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([3.0, 1.0])}
    >>> scores("magnitude_increase", wi, wf, alpha=1.0)
    {'w': tensor([ 2., -1.])}

    Raises :class:`ArgumentError` for an unknown name, weights that differ in names or shape, a
    score of another shape, alpha not above 0, ``random`` without a generator.
    """
    _same(initial, final, "final")
    if not alpha > 0:
        raise ArgumentError(f"alpha={alpha} must be above 0")
    found: Tensors = {}
    for name, start in initial.items():
        wi, wf = start.detach(), final[name].detach()
        if callable(criterion):
            found[name] = criterion(wi, wf)
        elif criterion == "random":
            if generator is None:
                raise ArgumentError("criterion 'random' needs generator=torch.Generator()")
            found[name] = torch.rand(wi.shape, generator=generator)
        elif criterion in CRITERIA:
            found[name] = CRITERIA[criterion](wi, wf, alpha)
        else:
            raise ArgumentError(
                f"criterion {criterion!r} is not one of {', '.join(CRITERIA)}, random; or pass a "
                "function of (initial, final)"
            )
        if not isinstance(found[name], Tensor) or found[name].shape != wi.shape:
            raise ArgumentError(f"criterion gives no score of shape {tuple(wi.shape)} for {name!r}")
    return found


def criterion_masks(
    criterion: str | Criterion,
    initial: Mapping[str, Tensor],
    final: Mapping[str, Tensor],
    density: float | Mapping[str, float],
    *,
    alpha: float,
    generator: torch.Generator | None = None,
) -> Masks:
    """The highest scores of each layer: exact counts, ties to the earlier weight.

    Raises :class:`ArgumentError` as :func:`scores` does, and for a density outside (0, 1]. Warns
    with :class:`gossamer.core.masks.EmptyLayerWarning` when a layer keeps nothing.
    """
    by_layer = density if isinstance(density, Mapping) else dict.fromkeys(initial, density)
    for name, value in by_layer.items():
        if not 0 < value <= 1:
            raise ArgumentError(f"density {name}={value} is outside (0, 1] (the fraction kept)")
    ranked = scores(criterion, initial, final, alpha=alpha, generator=generator)
    masks = keep_top(ranked, by_layer)
    warn_empty(masks)
    return masks


@dataclass(frozen=True)
class Start:
    """Where a masked network starts, and what is held.

    Attributes:
        masks: kept weights train, removed ones are held.
        values: clean name -> all weights of the layer, kept and removed.
    """

    masks: Masks
    values: Tensors

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Write the values to the model.

        Raises :class:`ArgumentError` when one does not fit; nothing is changed.
        """
        parameters = names.parameters(model)
        self.masks.check(parameters)
        for name, value in self.values.items():
            parameters[name].copy_(value)

    def method(self) -> Masked:
        """Holds the removed weights at their values, to the bit; attach it to the optimizer."""
        held = {n: v for n, v in self.values.items() if bool(v[~self.masks[n]].any())}
        return Masked(self.masks, values=held)


def apply_actions(
    initial: Mapping[str, Tensor],
    final: Mapping[str, Tensor],
    masks: Masks,
    *,
    kept: str,
    signed: bool,
    removed: str,
    fresh: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Start:
    """Initial tensors of a masked network after a mask-1 and a mask-0 action.

    Args:
        initial, final: clean name -> weights before and after training.
        masks: of the same names and shapes.
        kept: one of :data:`KEPT`.
        signed: the sign of the initial weight is kept (``rewind`` keeps it either way).
        removed: one of :data:`REMOVED`.
        fresh: another draw of the initial weights, for ``reinit``.
        generator: for ``reshuffle``, and the signs of an unsigned ``constant``.

    Raises :class:`ArgumentError` for an unknown action, tensors or masks that do not belong
    together, or a missing ``fresh`` or ``generator``.
    """
    for what, value, allowed in (("kept", kept, KEPT), ("removed", removed, REMOVED)):
        if value not in allowed:
            raise ArgumentError(f"{what}={value!r} is not one of {', '.join(allowed)}")
    masks.check(initial)
    initial = {name: initial[name] for name in masks}
    _same(initial, {n: final[n] for n in initial if n in final}, "final")
    drawn = kept == "reshuffle" or (kept == "constant" and not signed)
    if drawn and generator is None:
        raise ArgumentError(f"kept={kept!r} draws at random; pass generator=torch.Generator()")
    if kept == "reinit":
        if fresh is None:
            raise ArgumentError("kept='reinit' needs fresh=, another draw of the initial weights")
        _same(initial, {n: fresh[n] for n in initial if n in fresh}, "fresh")
    values: Tensors = {}
    for name, mask in masks.items():
        wi, wf = initial[name].detach(), final[name].detach()
        start = _start(wi, mask, kept, generator, fresh[name].detach() if fresh else None)
        if signed:
            start = torch.where(wi < 0, -start.abs(), start.abs()) if kept != "rewind" else start
        shrunk = wf.abs() < wi.abs()
        if removed == "movement_both":
            start = start.masked_fill(shrunk, 0)
        rest = torch.zeros_like(wi) if removed == "zero" else wi
        if removed.startswith("movement"):
            rest = rest.masked_fill(shrunk, 0)
        values[name] = torch.where(mask, start, rest)
    return Start(masks, values)


def _start(
    wi: Tensor, mask: Tensor, kept: str, generator: torch.Generator | None, fresh: Tensor | None
) -> Tensor:
    """What kept weights start from, signs as the action draws them."""
    if kept == "reinit" and fresh is not None:
        return fresh
    if kept == "reshuffle":
        order = torch.randperm(int(mask.sum()), generator=generator)
        return wi.masked_scatter(mask, wi[mask][order])
    if kept == "constant":
        level = torch.full_like(wi, float(wi.std(correction=0)))
        if generator is None:
            return level
        negative = torch.rand(wi.shape, generator=generator) < 0.5
        return torch.where(negative, -level, level)
    return wi


def _same(initial: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> None:
    if set(initial) != set(other):
        odd = sorted(set(initial) ^ set(other))
        raise ArgumentError(f"initial and {what} weights differ in: {', '.join(odd)}")
    for name, tensor in initial.items():
        if tensor.shape != other[name].shape:
            raise ArgumentError(
                f"{what} weights of {name!r} have shape {tuple(other[name].shape)}, the initial "
                f"ones {tuple(tensor.shape)}"
            )
