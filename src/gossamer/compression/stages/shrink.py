"""What is dead, taken out of the modules."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from gossamer.compression import records
from gossamer.compression.stage import Stage
from gossamer.compression.state import State
from gossamer.core import names
from gossamer.core.masks import Masks
from gossamer.structure import shrink

__all__ = ["Shrink"]


class Shrink(Stage):
    """Take dead filters, states, heads and hidden units out: the network gets physically smaller.

    Dead is what no output depends on, by the weights' values alone: what pruning of whole groups
    left. Outputs on a batch stay what they were to 1e-5 of the largest; units that cannot go stay,
    and are named with the operation that keeps them.

    Attributes:
        lowered: convolutions with dead rows or columns become smaller products of matrices.
    """

    stage: Literal["shrink"] = "shrink"
    lowered: bool = False

    rebuilds: ClassVar[bool] = True
    foreseen: ClassVar[bool] = True

    def run(self, state: State) -> None:
        """Shrink; masks and few-bit weights go on with what is left."""
        example = state.example()
        inputs = example[0] if isinstance(example, tuple) else example
        result = shrink(state.model, inputs, lowered=self.lowered)
        notes: dict[str, Any] = {
            "parameters": list(result.parameters),
            "layers": [
                {"name": n, "before": list(a), "after": list(b)}
                for n, (a, b) in result.removed.items()
            ],
            "stays": [str(p) for p in result.pinned],
            "difference": result.difference,
        }
        state.notes["shrink"] = notes
        state.progress.say(str(result))
        if not result.removed:
            return
        before = names.parameters(state.model)
        state.change(result.model, records.Smaller(**result.plan.as_dict()))
        after = names.parameters(state.model)
        state.fixed &= {n for n, p in after.items() if n in before and _within(before[n], p)}
        kept = {n: m for n, m in state.masks.items() if n in after}
        state.masks = Masks(
            {n: m if m.shape == after[n].shape else after[n].detach() != 0 for n, m in kept.items()}
        )


def _within(before: Any, after: Any) -> bool:
    """Whether a tensor has no value that it had not: no constant was folded into it."""
    return bool(torch.isin(after.detach(), before.detach()).all())
