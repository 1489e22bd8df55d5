"""Retraining on a grid under a price for bits."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from gossamer.compression.layers import per_layer
from gossamer.compression.parts import mask_zeros
from gossamer.compression.settings import (
    NotNegative,
    Strength,
    Training,
)
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State
from gossamer.quantize import RateAware as Method
from gossamer.quantize.rate_aware import check_owners

__all__ = ["RateAware"]


class RateAware(LayerStage):
    """Retrain with the entropy of the codes as part of what is minimised.

    Attributes:
        step: the grid's, in units of the layer's standard deviation (over non-zero weights).
        lam: price of a bit, in units of the loss.
        ramp: fraction of the retraining over which the price rises to ``lam``.
        dead_zone: fraction of a step by which zero's cell is wider on each side.
    """

    stage: Literal["rate_aware"] = "rate_aware"
    step: Strength = 0.5
    lam: NotNegative = 1e-4
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.5
    dead_zone: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    retrain: Training

    shares: ClassVar[bool] = True
    by_layer: ClassVar[tuple[str, ...]] = ("step",)

    def check(self, model: nn.Module) -> None:
        """Try the patterns, and whether the weights can be put on a grid while they train."""
        super().check(model)
        weights = self.weights(model)
        steps = per_layer(model, weights, self.step)
        check_owners(model, {n: weights[n] for n in steps})

    def run(self, state: State) -> None:
        """Retrain; the weights end on the grid."""
        weights = self.weights(state.model)
        steps = per_layer(state.model, weights, self.step)
        state.fixed -= set(steps)
        updates = self.retrain.epochs * math.ceil(len(state.data.train) / self.retrain.batch_size)
        method = Method.relative(
            state.model,
            step=steps,
            lam=self.lam,
            ramp=int(self.ramp * updates),
            dead_zone=self.dead_zone,
            masks=state.masks,
            include=list(steps),
        )
        state.train(self.retrain, [method, *state.others(steps)])
        method.finish()
        state.fixed |= set(steps)
        mask_zeros(state, steps)
