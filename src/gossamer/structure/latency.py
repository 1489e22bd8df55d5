"""Milliseconds as a cost of groups: the network that masks leave, made and timed.

A count of multiplications says little of a small layer's time, and nothing of what a width that
is no multiple of 8 costs. So the masked network is shrunk, and timed against the whole one in pairs
of runs, one right after the other: what slows the machine down for a while hits both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import access, names, nest
from gossamer.core.masks import Masks
from gossamer.core.modes import device_of, evaluating
from gossamer.core.timing import paired
from gossamer.structure.surgery.shrink import shrink

__all__ = ["Latency", "milliseconds"]

Clock = Callable[[nn.Module, nn.Module, Any], tuple[float, float]]
"""The whole network, a smaller one, one example -> milliseconds of the first, and how many times
as fast the second is."""


def milliseconds(whole: nn.Module, smaller: nn.Module, example: Any) -> tuple[float, float]:
    """In torch, one example a call, one thread, interleaved; medians."""
    with torch.inference_mode(), evaluating(whole), evaluating(smaller):
        seen = paired(
            lambda: nest.feed(whole, example),
            lambda: nest.feed(smaller, example),
            pairs=60,
            seconds=1.0,
            device=device_of(whole),
        )
    return 1e3 * seen.first, seen.ratio


class Latency:
    """Milliseconds that a network takes without the groups that masks leave out.

    A cost for :func:`gossamer.core.group_budgets.select` over all groups at once: the time of a
    layer is not a part of the network's that others do not change.

    Args:
        model: stays as it is. Weights that are zero count as any other: the time is of sizes.
        example: one batch, as :func:`gossamer.shrink` takes it; its first example is timed.
        clock: :func:`milliseconds` by default.

    Attributes:
        whole: milliseconds of the network with all its groups, once they were measured.
    """

    def __init__(self, model: nn.Module, example: Any, clock: Clock | None = None) -> None:
        self._model, self._example = _without_zeros(model), example
        self._one = nest.mapped(lambda t: t[:1], example)
        self._clock = clock or milliseconds
        self._known: dict[tuple[tuple[int, ...], ...], float] = {}
        self.whole, _ = self._clock(self._model, self._model, self._one)

    def __call__(self, masks: Masks) -> float:
        """Milliseconds of what is left.

        Raises :class:`ArgumentError` as :func:`gossamer.shrink`.
        """
        trial = access.copied(self._model)
        masks.apply_(trial)
        made = shrink(trial, self._example)
        if not made.removed:
            return self.whole
        sizes = tuple(tuple(p.shape) for p in made.model.parameters())
        if sizes not in self._known:
            _, ratio = self._clock(self._model, made.model, self._one)
            self._known[sizes] = self.whole / ratio
        return self._known[sizes]


@torch.no_grad()
def _without_zeros(model: nn.Module) -> nn.Module:
    """A copy in which no parameter has a zero, so that masks alone say what is dead."""
    made = access.copied(model)
    for p in names.parameters(made).values():
        if p.is_floating_point():
            p.masked_fill_(p == 0, _typical(p))
    return made


def _typical(p: Tensor) -> float:
    return float(p.abs().mean()) or 1e-3
