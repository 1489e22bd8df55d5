"""Masks: which weights are kept. ``True`` keeps; ``density`` is the fraction kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError

__all__ = [
    "EmptyLayerWarning",
    "Eraser",
    "Masks",
    "above_quality",
    "keep_counts",
    "keep_top",
    "shuffled",
    "warn_empty",
    "zero_outside_",
]

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class EmptyLayerWarning(UserWarning):
    """A layer lost all its weights: its output no longer depends on its input."""


def _kept_bits(mask: Tensor, like: Tensor) -> Tensor:
    # All ones where kept; laid out like the tensor, so that the AND is one pass over memory.
    integer = _WORDS[like.element_size()]
    return torch.empty_like(like, dtype=integer).copy_(mask).neg_()


def zero_outside_(mask: Tensor, tensor: Tensor) -> None:
    """Set a real tensor to +0 where the mask is False, in place.

    The bits are masked: NaN and negative values become +0 as well, which multiplication does not
    do, in a fraction of ``masked_fill_``'s time.

    >>> w = torch.tensor([-1.0, float("nan"), 2.0])
    >>> zero_outside_(torch.tensor([False, False, True]), w)
    >>> w
    tensor([0., 0., 2.])
    """
    bits = _kept_bits(mask, tensor)
    tensor.detach().view(bits.dtype).bitwise_and_(bits)


class Masks(dict[str, Tensor]):
    """Clean parameter name -> boolean tensor of the parameter's shape. Refuses anything else.

    >>> m = Masks({"fc.weight": torch.tensor([[True, False]])})
    >>> m.density
    0.5
    >>> Masks({"fc.weight": torch.ones(2)})
    Traceback (most recent call last):
        ...
    gossamer.core.errors.ArgumentError: mask 'fc.weight' must be a bool tensor, got torch.float32; \
write mask != 0
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, mask in (masks or {}).items():
            self[name] = mask

    def __setitem__(self, name: str, mask: Tensor) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ArgumentError(f"mask {name!r} must be a bool tensor, got {kind}; write mask != 0")
        super().__setitem__(name, mask)

    @property
    def density(self) -> float:
        """Fraction of the masked weights that are kept (1.0 when there are none)."""
        total = sum(m.numel() for m in self.values())
        return self.kept / total if total else 1.0

    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(int(m.sum()) for m in self.values())

    def densities(self) -> dict[str, float]:
        """Fraction kept, per tensor."""
        return {n: int(m.sum()) / max(1, m.numel()) for n, m in self.items()}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise :class:`ArgumentError` unless every mask has a tensor of its own shape."""
        for name, mask in self.items():
            if name not in tensors:
                raise ArgumentError(
                    f"mask {name!r} has no parameter; parameters are: {', '.join(tensors)}"
                )
            if tensors[name].shape != mask.shape:
                raise ArgumentError(
                    f"mask {name!r} has shape {tuple(mask.shape)}, "
                    f"its parameter {tuple(tensors[name].shape)}"
                )

    @torch.no_grad()
    def apply_(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Zero the weights that are not kept, in place. All shapes are checked before any write."""
        tensors = names.parameters(model) if isinstance(model, nn.Module) else model
        self.check(tensors)
        for name, mask in self.items():
            zero_outside_(mask, tensors[name])

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Masks:
        """The non-zero pattern of the given tensors."""
        return cls({n: t.detach() != 0 for n, t in tensors.items()})


class Eraser:
    """:func:`zero_outside_` again and again: the bits of each mask are made once and kept.

    ``values``: clean name -> what removed weights are held at, where that is not 0.

    Nine times as fast as ``masked_fill_``, which decides whether masking costs a training step
    2 % or 20 %. One integer per weight is held.

    >>> w = torch.tensor([-1.0, float("nan"), 3.0])
    >>> Eraser(Masks({"w": torch.tensor([False, False, True])})).erase_("w", w)
    >>> w
    tensor([0., 0., 3.])
    """

    def __init__(self, masks: Masks, values: Mapping[str, Tensor] | None = None) -> None:
        self._masks = masks
        self._bits: dict[tuple[str, int, torch.device], Tensor] = {}
        self._values = dict(values or {})
        self._rest: dict[str, Tensor] = {}

    def erase_(self, name: str, tensor: Tensor) -> None:
        """Zero ``tensor`` (of the mask's shape, any strides) where mask ``name`` is False."""
        key = (name, tensor.element_size(), tensor.device)
        bits = self._bits.get(key)
        if bits is None:
            bits = self._bits[key] = _kept_bits(self._masks[name], tensor.detach())
        tensor.detach().view(bits.dtype).bitwise_and_(bits)

    def hold_(self, name: str, tensor: Tensor) -> None:
        """Set ``tensor`` where mask ``name`` is False: to ``values[name]`` bit for bit, or to 0."""
        self.erase_(name, tensor)
        if name not in self._values:
            return
        word = _WORDS[tensor.element_size()]
        rest = self._rest.get(name)
        if rest is None:
            rest = torch.empty_like(tensor.detach()).copy_(self._values[name])
            zero_outside_(~self._masks[name], rest)
            self._rest[name] = rest = rest.view(word)
        tensor.detach().view(word).bitwise_or_(rest)


def _count(density: float, numel: int) -> int:
    # Round to nearest, halves up: floor loses a weight on most layers, Python's round is
    # half-to-even and would make equal layers differ.
    return int(density * numel + 0.5)


def _highest(score: Tensor, candidates: Tensor | None, count: int) -> Tensor:
    """True at the ``count`` highest scores among the candidates, ties to the earlier."""
    flat = score.detach().reshape(-1)
    order = torch.argsort(flat, descending=True, stable=True)
    if candidates is not None:
        order = order[candidates.reshape(-1)[order]]
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[order[:count]] = True
    return mask.view(score.shape)


def keep_counts(
    scores: Mapping[str, Tensor], counts: Mapping[str, int], *, within: Masks | None = None
) -> Masks:
    """Keep ``counts[name]`` of the highest scores of each tensor: exact, ties to the earlier.

    ``within``: candidates; a weight outside stays out.

    >>> keep_counts({"w": torch.tensor([1.0, 3.0, 3.0])}, {"w": 1})["w"].tolist()
    [False, True, False]

    Raises :class:`ArgumentError` for NaN scores, a missing count, or more than the candidates.
    """
    for name, score in scores.items():
        if name not in counts:
            raise ArgumentError(f"counts has none for {name!r}; there are: {', '.join(counts)}")
        most = score.numel() if within is None else int(within[name].sum())
        if not 0 <= counts[name] <= most:
            raise ArgumentError(f"count {name}={counts[name]} is outside [0, {most}]")
        if torch.isnan(score).any():
            raise ArgumentError(f"score {name!r} holds NaN; check the weights and gradients")
    return Masks(
        {
            n: _highest(s, None if within is None else within[n], counts[n])
            for n, s in scores.items()
        }
    )


def keep_top(
    scores: Mapping[str, Tensor],
    density: float | Mapping[str, float],
    *,
    scope: Literal["layer", "global"] = "layer",
    within: Masks | None = None,
    floor: int = 0,
) -> Masks:
    """Keep the highest scores: exact count, ties to the earlier weight (stable).

    Args:
        scores: clean name -> score tensor, higher = keep. NaN is refused.
        density: fraction kept in [0, 1], of all weights (not of those in ``within``); a mapping
            gives one per tensor (``scope="layer"`` only).
        scope: one budget per layer, or one global budget.
        within: candidates; a weight outside stays out. Counts never exceed the candidates.
        floor: at least this many weights stay in each layer (global scope's guard against an
            emptied layer); taken from the rest of the budget.

    >>> keep_top({"w": torch.tensor([1.0, 3.0, 3.0, 2.0])}, 0.5)["w"].tolist()
    [False, True, True, False]

    Raises :class:`ArgumentError` for a density outside [0, 1], NaN scores, a missing density,
    an unknown scope, or masks of another shape.
    """
    if scope not in ("layer", "global"):
        raise ArgumentError(f"scope {scope!r} is not one of 'layer', 'global'")
    if not scores:
        raise ArgumentError("scores is empty: no tensor to prune; check the layer selection")
    if isinstance(density, Mapping):
        if scope == "global":
            raise ArgumentError("a density per layer needs scope='layer'; scope='global' takes one")
        if set(density) != set(scores):
            odd = sorted(set(density) ^ set(scores))
            raise ArgumentError(f"densities and scores name different tensors: {', '.join(odd)}")
        per_layer = dict(density)
    else:
        per_layer = dict.fromkeys(scores, density)
    for name, value in per_layer.items():
        if not 0 <= value <= 1:
            raise ArgumentError(f"density {name}={value} is outside [0, 1] (the fraction kept)")
    for name, score in scores.items():
        if torch.isnan(score).any():
            raise ArgumentError(f"score {name!r} holds NaN; check the weights and gradients")
    if within is not None:
        within.check(dict(scores))

    if scope == "layer":
        masks = Masks()
        for name, score in scores.items():
            count = max(_count(per_layer[name], score.numel()), min(floor, score.numel()))
            inside = within.get(name) if within is not None else None
            masks[name] = _highest(score, inside, count)
        return masks

    flat = torch.cat([s.detach().reshape(-1).double().cpu() for s in scores.values()])
    candidates = torch.cat(
        [
            within[n].reshape(-1).cpu()
            if within is not None and n in within
            else torch.ones(s.numel(), dtype=torch.bool)
            for n, s in scores.items()
        ]
    )
    total = _count(next(iter(per_layer.values())), flat.numel())
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    if floor:
        start = 0
        for score in scores.values():
            part = slice(start, start + score.numel())
            chosen[part] = _highest(flat[part], candidates[part], min(floor, score.numel()))
            start += score.numel()
    rest = max(0, total - int(chosen.sum()))
    chosen |= _highest(flat, candidates & ~chosen, rest)
    masks, start = Masks(), 0
    for name, score in scores.items():
        masks[name] = chosen[start : start + score.numel()].view(score.shape).to(score.device)
        start += score.numel()
    return masks


def shuffled(masks: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    """Each layer's mask permuted at random: the same counts at other places.

    >>> mask = torch.tensor([[True, False], [False, False]])
    >>> shuffled({"w": mask}, torch.Generator().manual_seed(0)).densities()
    {'w': 0.25}
    """
    return Masks(
        {
            n: m.reshape(-1)[torch.randperm(m.numel(), generator=generator)].view(m.shape)
            for n, m in masks.items()
        }
    )


def warn_empty(masks: Masks) -> None:
    """Warn with :class:`EmptyLayerWarning` for each layer that keeps no weight."""
    for name, mask in masks.items():
        if mask.numel() and not mask.any():
            warnings.warn(
                f"layer {name!r} keeps none of its {mask.numel()} weights; raise its density, "
                "or set floor to keep some",
                EmptyLayerWarning,
                stacklevel=3,
            )


def above_quality(weight: Tensor, quality: float, *, name: str = "weight") -> Tensor:
    """|w| > quality * std(w), the standard deviation over the non-zero weights (Han et al. 2015).

    Zeros of an earlier round are no sample of the distribution; ``quality`` 0 keeps the non-zero
    weights.

    >>> above_quality(torch.tensor([0.0, 1.0, -1.0, 3.0]), 1.0).tolist()
    [False, False, False, True]

    Raises :class:`ArgumentError` for a negative or non-finite quality, or NaN weights.
    """
    if not (quality >= 0 and math.isfinite(quality)):
        raise ArgumentError(f"quality {name}={quality} must be at least 0 and finite")
    weight = weight.detach()
    if torch.isnan(weight).any():
        raise ArgumentError(f"weight {name!r} holds NaN; train or load the model first")
    alive = weight[weight != 0]
    threshold = quality * float(alive.std(correction=0)) if alive.numel() else 0.0
    return weight.abs() > threshold
