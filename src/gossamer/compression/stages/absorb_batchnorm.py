"""Batch-norm statistics absorbed."""

from __future__ import annotations

from typing import ClassVar, Literal

from gossamer.compression.stage import Stage
from gossamer.compression.state import State
from gossamer.structure import absorb_batchnorm

__all__ = ["AbsorbBatchnorm"]


class AbsorbBatchnorm(Stage):
    """Absorb batch-norm statistics into scale and shift."""

    stage: Literal["absorb_batchnorm"] = "absorb_batchnorm"

    shares: ClassVar[bool] = True
    foreseen: ClassVar[bool] = True
    absorbs: ClassVar[bool] = True

    def run(self, state: State) -> None:
        """Compared on examples before it is kept."""
        absorb_batchnorm(state.model, state.example())
