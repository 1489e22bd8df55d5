"""Units that pruning cut off, removed with what serves them."""

from __future__ import annotations

from typing import ClassVar, Literal

from gossamer.compression.stage import Stage
from gossamer.compression.state import State
from gossamer.structure import dead

__all__ = ["RemoveDead"]


class RemoveDead(Stage):
    """Remove what only serves units without inputs or without outputs, and report them.

    Outputs stay what they were: a unit's constant is folded into the next layer's bias.
    """

    stage: Literal["remove_dead"] = "remove_dead"

    foreseen: ClassVar[bool] = True

    def run(self, state: State) -> None:
        """Report what was dead."""
        found = dead.remove_dead(state.model, state.masks, state.example())
        if found.count:
            state.progress.say(found.table())
        state.notes["dead_units"] = {
            "without_inputs": {n: len(u) for n, u in found.without_inputs.items()},
            "without_outputs": {n: len(u) for n, u in found.without_outputs.items()},
            "not_examined": found.not_examined,
        }
