"""How much of an error at a layer reaches the network's outputs.

Errors of two layers that are as large a part of their own outputs' power may differ by orders of
magnitude in what the network gives: those of a recurrent layer's state add up over its steps, those
before a normalisation or a saturated unit fade. Where the network is locally linear, the power of
what arrives is proportional to that of what a layer is off, so one small perturbation of each
weight measures the factor between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import names, nest
from gossamer.core.modes import evaluating
from gossamer.training.layer_inputs import Use, feed, inputs_of, plain_kernels

__all__ = ["reach"]

_NOISE = 0.01  # of a weight's root mean square: far above rounding, far below what bends the curve
_ROWS = 1024  # of a weight's inputs that one use is measured on
_MOST = 1e4  # how far factors may lie from their mean


@torch.no_grad()
def reach(
    model: nn.Module,
    batches: Sequence[Any],
    include: Sequence[str],
    *,
    generator: torch.Generator,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, float]:
    """Of each weight: relative power of the outputs' change over that of its layer's own change.

    Args:
        batches: as :func:`~gossamer.training.layer_inputs.inputs_of` takes them; few suffice.
        include: clean names of weights of two or more dimensions.
        generator: draws the perturbations, uniform, one for each weight.

    Returns factors whose geometric mean over all parameters is 1, at most 10,000 from it; 1 for a
    weight that the batches do not use.
    """
    every = names.parameters(model)
    weights = {n: every[n] for n in include}
    noise = {n: _noise(w, generator) for n, w in weights.items()}
    own: dict[str, tuple[float, float]] = {}

    def see(use: Use) -> None:
        w, e = (
            use.layout.matrix(t.float())[slice(*use.rows)]
            for t in (weights[use.name], noise[use.name])
        )
        changed, power = own.get(use.name, (0.0, 0.0))
        if use.ids is not None:
            changed += float(e[use.ids].square().sum())
            power += float(w[use.ids].square().sum())
        else:
            split = len(w) // len(use.inputs)
            for x, part, moved in zip(use.inputs, w.split(split), e.split(split), strict=True):
                changed += float((x.float() @ moved.mT).square().sum())
                power += float((x.float() @ part.mT).square().sum())
        own[use.name] = changed, power

    def pick(_: str, count: int) -> Tensor:
        return torch.linspace(0, count - 1, min(count, _ROWS)).long()

    for batch in batches:
        inputs_of(model, batch, weights, see, pick=pick)
    with evaluating(model), plain_kernels(model):
        before = [_outputs(model, b) for b in batches]
        found: dict[str, float] = {}
        for number, (name, w) in enumerate(weights.items()):
            changed, power = own.get(name, (0.0, 0.0))
            if changed > 0 and power > 0:
                kept = w.detach().clone()
                w.copy_(w.float() + noise[name])
                try:
                    now = [_outputs(model, b) for b in batches]
                finally:
                    w.copy_(kept)
                found[name] = _relative(before, now) / (changed / power)
            if progress is not None:
                progress(number + 1, len(weights), name)
    return _even({n: found.get(n) for n in weights}, {n: w.numel() for n, w in weights.items()})


def _noise(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Of a weight's shape, float32: such that the weight's own type holds the sum."""
    w = weight.detach().float()
    drawn = (torch.rand(w.shape, generator=generator) - 0.5).to(w.device)
    moved = w + _NOISE * math.sqrt(12) * w.square().mean().sqrt() * drawn
    return moved.to(weight.dtype).float() - w


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    return [t.double() for t in nest.leaves(feed(model, batch)) if t.is_floating_point()]


def _relative(before: list[list[Tensor]], now: list[list[Tensor]]) -> float:
    """Sum over the outputs of their change's power as a part of theirs."""
    total = 0.0
    for was, has in zip(zip(*before, strict=True), zip(*now, strict=True), strict=True):
        power = sum(float(t.square().sum()) for t in was)
        off = sum(float((a - b).square().sum()) for a, b in zip(was, has, strict=True))
        total += off / power if power > 0 else 0.0
    return total


def _even(found: Mapping[str, float | None], sizes: Mapping[str, int]) -> dict[str, float]:
    logs = {n: math.log(f) for n, f in found.items() if f is not None and 0 < f < math.inf}
    if not logs:
        return dict.fromkeys(found, 1.0)
    mean = sum(sizes[n] * v for n, v in logs.items()) / sum(sizes[n] for n in logs)
    limit = math.log(_MOST)
    even = {n: math.exp(min(limit, max(-limit, v - mean))) for n, v in logs.items()}
    # nothing arrived, or more than there are numbers for
    ends = {n: math.exp(-limit if f == 0 else limit) for n, f in found.items() if f is not None}
    return {n: 1.0 if f is None else even.get(n, ends[n]) for n, f in found.items()}
