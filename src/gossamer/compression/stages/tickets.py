"""The search of a lottery ticket."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from gossamer.compression.layers import per_layer, trying
from gossamer.compression.settings import Quality, Training
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.prune import lottery

__all__ = ["Tickets"]


class Tickets(LayerStage):
    """Search a lottery ticket: train, prune, rewind to the initial weights, in ``rounds``.

    Attributes:
        rounds: of pruning; the network is trained once more than that.
        rate: fraction of the survivors that a round removes, one number or by layer pattern.
        output: the output layer, pruned at half the rate; left out: none.
        scope: the rate holds in each layer, or over the whole network.
        one_shot: remove all at once.
        rewind_step: rewind to the dense training's weights after so many steps (late rewinding).
        train: the training, the same in each round.
    """

    stage: Literal["tickets"] = "tickets"
    rounds: Annotated[int, Field(ge=1, le=1000)] = 5
    rate: Quality = 0.2
    output: str | None = None
    scope: Literal["layer", "global"] = "layer"
    one_shot: bool = False
    rewind_step: Annotated[int, Field(ge=0)] = 0
    train: Training

    by_layer: ClassVar[tuple[str, ...]] = ("rate",)

    @property
    def from_start(self) -> bool:
        """It begins from them."""
        return True

    @property
    def resets(self) -> bool:
        """Always."""
        return True

    def check(self, model: nn.Module) -> None:
        """Try the patterns, and the rates."""
        super().check(model)
        weights = self.weights(model)
        if self.output is not None:
            with trying("output"):
                names.select(list(weights), self.output, model)
        with trying("rate"):
            found = lottery.layer_rates(
                list(weights), per_layer(model, weights, self.rate), output=self.output
            )
            if self.scope == "global" and len(set(found.values())) != 1:
                raise ArgumentError(
                    "scope: global takes one rate for all layers; give one number, and leave "
                    "output out"
                )

    def run(self, state: State) -> None:
        """Search a ticket from the initial weights; the network ends as the last one, trained."""
        weights = self.weights(state.model)
        state.to_initial()
        state.fixed -= set(weights)
        folder = state.out / f"{state.name}.search"

        def run(model: nn.Module, part: lottery.Round) -> Mapping[str, Any]:
            before = len(state.curves)
            state.train(self.train, [*part.methods, *state.others(weights)], part.number)
            curve = state.curves[before:]
            del state.curves[before:]
            return {"curve": curve}

        found = lottery.search(
            state.model,
            run,
            rounds=self.rounds,
            rates=per_layer(state.model, weights, self.rate),
            output=self.output,
            folder=folder,
            scope=self.scope,
            one_shot=self.one_shot,
            rewind_step=self.rewind_step,
            include=list(weights),
            progress=lambda done, total, _: state.progress.count(
                f"{state.name} rounds", done, total
            ),
        )
        # From the search's own file, so that a resumed run tells of the rounds before the kill too.
        state.curves += [row for part in found.rows for row in part["curve"]]
        state.masks.update(found.masks[-1])
        state.notes["tickets"] = [
            {
                "density": row["density"],
                "score": row["curve"][-1]["score"],
            }
            for row in found.rows
            if row["curve"]
        ]
        (folder / "tickets.gsm").replace(state.out / f"{state.name}.gsm")
        shutil.rmtree(folder)
