"""A learned mask of weights that are never trained."""

from __future__ import annotations

from typing import Literal

from torch import nn

from gossamer.compression.settings import Training
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State
from gossamer.core.seeds import check_seedable, init_
from gossamer.prune.supermask import Supermask as Method

__all__ = ["Supermask"]


class Supermask(LayerStage):
    """Weights from the seed, never trained; what trains is which of them are kept.

    The file then holds the seed and the mask. A later stage that changes a layer's weights makes
    the file hold their values again.

    Attributes:
        scheme: distribution of the initial weights.
        rescale: multiply each layer by its elements over its ones.
        choice: of the mask in the file: one draw, or what is likelier kept than not.
        train: of the scores; learning rates are of the order of 100, without weight decay.
    """

    stage: Literal["supermask"] = "supermask"
    scheme: Literal["normal", "uniform", "signed_constant"] = "signed_constant"
    rescale: bool = True
    choice: Literal["sample", "threshold"] = "sample"
    train: Training

    @property
    def from_start(self) -> bool:
        """It begins from them."""
        return True

    def check(self, model: nn.Module) -> None:
        """Try the patterns, and whether a seed gives such weights."""
        super().check(model)
        for name, weight in self.weights(model).items():
            check_seedable(name, weight)

    def run(self, state: State) -> None:
        """Weights from the recipe's seed, and a learned mask of them."""
        weights = list(self.weights(state.model))
        seeds = init_(state.model, state.seed, scheme=self.scheme, include=weights)
        method = Method(generator=state.generator(99), rescale=self.rescale, include=weights)
        state.fixed -= set(weights)
        state.train(self.train, [method, *state.others(weights)])
        if self.choice == "threshold":
            method.threshold()
        method.finish()
        state.seeds.update(method.seeds(seeds))
        state.masks.update(method.masks)
