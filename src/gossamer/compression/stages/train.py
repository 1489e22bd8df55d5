"""Train a network, or go on training it."""

from __future__ import annotations

from typing import ClassVar, Literal

from gossamer.compression.settings import (
    Training,
)
from gossamer.compression.stage import Stage
from gossamer.compression.state import State

__all__ = ["Train"]


class Train(Training, Stage):
    """Train the network, or go on training a trained one; what is pruned stays pruned."""

    stage: Literal["train"] = "train"

    compresses: ClassVar[bool] = False

    @property
    def retrains(self) -> bool:
        """It holds no values that are shared."""
        return True

    def run(self, state: State) -> None:
        """Train under the masks there are."""
        state.train(self, state.others(()))
