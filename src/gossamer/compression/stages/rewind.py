"""Back to the weights that the run began with."""

from __future__ import annotations

from typing import Literal

from gossamer.compression.stage import Stage
from gossamer.compression.state import State
from gossamer.prune import deconstruct

__all__ = ["Rewind"]


class Rewind(Stage):
    """Set the network back to the weights that the run began with; what is pruned stays pruned.

    Attributes:
        kept: what the weights that a mask keeps start from: their initial values, these values
            permuted within the layer, or plus or minus the layer's standard deviation.
        signed: each keeps the sign of its initial weight.
    """

    stage: Literal["rewind"] = "rewind"
    kept: Literal["rewind", "reshuffle", "constant"] = "rewind"
    signed: bool = True

    @property
    def from_start(self) -> bool:
        """It begins from them."""
        return True

    @property
    def resets(self) -> bool:
        """Always."""
        return True

    def run(self, state: State) -> None:
        """The initial weights again, under the present masks."""
        state.to_initial()
        initial = {n: t.clone() for n, t in state.initial().items() if n in state.masks}
        start = deconstruct.apply_actions(
            initial,
            initial,
            state.masks,
            kept=self.kept,
            signed=self.signed,
            removed="zero",
            generator=state.generator(),
        )
        start.apply_(state.model)
