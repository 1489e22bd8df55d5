"""A scan of accuracy against density, one layer at a time."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from gossamer.compression.parts import scan
from gossamer.compression.settings import (
    Fraction,
)
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State

__all__ = ["Sensitivity"]


class Sensitivity(LayerStage):
    """Scan accuracy against density, one layer at a time; the network is left as it was."""

    stage: Literal["sensitivity"] = "sensitivity"
    densities: tuple[Fraction, ...] = (1.0, 0.7, 0.5, 0.35, 0.25, 0.17, 0.12, 0.08, 0.05, 0.03)

    compresses: ClassVar[bool] = False

    def covered(self, model: nn.Module) -> None:
        """It changes nothing."""
        return

    def run(self, state: State) -> None:
        """Scan the layers."""
        scan(state, self.weights(state.model), self.densities)
