"""The floor of a run: what all its stages together may cost of the validation score."""

from __future__ import annotations

from typing import Any

import torch

from gossamer.compression import measure
from gossamer.compression.state import State
from gossamer.core.masks import Masks
from gossamer.training.metric import ACCURACY, Metric

__all__ = ["Rounds", "verdict"]


def verdict(
    reference: float, score: float, max_drop: float, metric: Metric = ACCURACY
) -> dict[str, Any]:
    """What run.json says of the floor.

    >>> verdict(0.9, 0.895, 0.005)["kept"], verdict(0.9, 0.894, 0.005)["kept"]
    (True, False)
    """
    return {
        "max_drop": max_drop,
        "reference": reference,
        "score": score,
        "drop": metric.drop(reference, score),
        "kept": metric.keeps(reference, score, max_drop),
    }


class Rounds:
    """The rounds of a pruning stage: the last that kept the floor is what the stage ends with.

    Rounds in the middle may fall below and be trained back by later ones: only where the last one
    stays below does the network go back. Where none kept the floor the network stays as the last
    round left it, for there is nothing to go back to, and the run says that its floor is not kept.
    """

    def __init__(self, state: State, rounds: int) -> None:
        self.state, self.count = state, rounds
        self.good: tuple[int, dict[str, torch.Tensor], Masks] | None = None
        self.reached = True

    def ended(self, number: int) -> None:
        """Look at the network after round ``number``."""
        state = self.state
        if self.count < 2 or state.floor is None:
            return
        self.reached = state.keeps_floor()
        if self.reached and number < self.count:
            copies = {n: t.detach().clone() for n, t in state.model.state_dict().items()}
            masks = Masks({n: m.clone() for n, m in state.masks.items()})
            self.good = number, copies, masks

    def back(self) -> None:
        """Go back where the last round is below the floor and an earlier one is not."""
        if self.reached or self.good is None:
            return
        number, copies, masks = self.good
        state = self.state
        asked = measure.density(state.model)
        state.model.load_state_dict(copies)
        state.masks = masks
        state.notes["rolled_back"] = {
            "round": number,
            "rounds": self.count,
            "density": measure.density(state.model),
            "asked": asked,
        }
        state.progress.say(
            f"  back to round {number} of {self.count}, density {measure.density(state.model):.4f} "
            f"in place of {asked:.4f}: later rounds cost more than the run may (max_drop)"
        )
