"""Retraining on a grid under a price for bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from gossamer.compression.layers import per_layer
from gossamer.compression.parts import mask_zeros
from gossamer.compression.settings import (
    NotNegative,
    Strength,
    Training,
)
from gossamer.compression.size import Size
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State
from gossamer.core import names
from gossamer.core.plain import copied
from gossamer.quantize import RateAware as Method
from gossamer.quantize.rate_aware import check_owners
from gossamer.quantize.set_point import SetPoint

__all__ = ["RateAware"]


class RateAware(LayerStage):
    """Retrain with the entropy of the codes as part of what is minimised.

    Attributes:
        step: the grid's, in units of the layer's standard deviation (over non-zero weights).
        lam: price of a bit, in units of the loss; with the run's ``max_bytes`` the price that is
            begun with, and ``ramp`` is not used.
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

    @property
    def aims(self) -> bool:
        """Where it trains at all: the price works on gradients."""
        return self.retrain.epochs > 0

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
        settings: dict[str, Any] = {"step": steps, "lam": self.lam, "dead_zone": self.dead_zone}
        settings |= {"masks": state.masks, "include": list(steps)}
        others = state.others(steps)
        if state.size is None:
            ramp = int(self.ramp * updates)
            method = Method.relative(state.model, ramp=ramp, **settings)
            state.train(self.retrain, [method, *others])
        else:
            measured = _measured(state, state.size)
            control = SetPoint(state.size.most, measured, steps=updates)
            method = Method.relative(state.model, control=control, **settings)
            state.train(self.retrain, [method, *others])
            state.notes["size"] = {
                "most": state.size.most,
                "price": method.lam,
                "trained": measured(),
                "bytes": control.fit(method),
                "border": method.border,
            }
        method.finish()
        state.fixed |= set(steps)
        mask_zeros(state, steps)


def _measured(state: State, size: Size) -> Callable[[], int]:
    """What tells the bytes of the file of the weights as they are snapped at present."""
    plain = copied(state.model)

    @torch.no_grad()
    def measured() -> int:
        now = names.clean_state_dict(state.model)
        for name, tensor in names.clean_state_dict(plain).items():
            tensor.copy_(now[name])
        return size.of(state, plain)

    return measured
