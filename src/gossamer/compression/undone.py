"""What a stage undoes of the stages before it, so that no run loses it without a word."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from gossamer.compression.state import State
from gossamer.core import names
from gossamer.core.masks import Masks

__all__ = ["Promises"]

_NAMED = 4


class Promises:
    """What is pruned and what holds few values before a stage; :meth:`lost` looks again after it.

    A layer that is no more (factors stand for it), or of another shape, is the stage's own affair:
    its notes tell of it.
    """

    def __init__(self, state: State) -> None:
        self.masks = Masks(state.masks)
        self.values = _values(state.model, state.fixed)

    @torch.no_grad()
    def lost(self, state: State) -> list[str]:
        """A sentence for each kind of promise that the stage has not kept."""
        weights, told = names.parameters(state.model), []
        alive = {
            name: int(torch.count_nonzero(weights[name][~mask.to(weights[name].device)]))
            for name, mask in self.masks.items()
            if name in weights and weights[name].shape == mask.shape
        }
        alive = {name: count for name, count in alive.items() if count}
        if alive:
            total = sum(alive.values())
            told.append(
                f"{total:,} weights that were pruned before are not zero any more: {_list(alive)}"
            )
        now = _values(state.model, set(self.values) & set(weights))
        # pruning adds a zero to the values of a layer, and takes none of its few bits
        more = [name for name, count in now.items() if count > self.values[name] + 1]
        if more:
            grown = (f"{name} from {self.values[name]:,} to {now[name]:,}" for name in more)
            told.append(f"layers of few values have more of them now: {_list(grown)}")
        return told


def _values(model: nn.Module, chosen: Iterable[str]) -> dict[str, int]:
    weights = names.parameters(model)
    return {
        name: len(weights[name].detach().unique()) for name in sorted(chosen) if name in weights
    }


def _list(found: Iterable[str]) -> str:
    rows = list(found)
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return ", ".join(rows[:_NAMED]) + more
