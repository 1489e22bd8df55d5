"""Training that is sparse from the first step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from gossamer.compression.layers import per_layer, trying
from gossamer.compression.settings import LayerDensity, OneOf, Rate, Training
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.prune.dynamic import FAMILY, DynamicSparse, Rule

__all__ = ["SparseTrain"]


class SparseTrain(LayerStage):
    """Train a network that is sparse from the first step, while its weights move about.

    Attributes:
        method: a row of :data:`gossamer.prune.dynamic.FAMILY`; the axes below change it.
        density: the fraction kept of all chosen weights, or one by layer pattern (a layer that
            none names is whole, or keeps the mask of an earlier stage); left out: these masks.
        start: ``initial``: the weights that the run began with; ``present``: as they are.
        every: steps between two reallocations, or ``epoch``.
        distribution, growth, redistribution, rate, rate_end: see
            :class:`gossamer.prune.dynamic.Rule`; left out: the method's own.
        train: the training.
    """

    stage: Literal["sparse_train"] = "sparse_train"
    method: Annotated[str, OneOf(FAMILY)] = "sparse-momentum"
    density: LayerDensity | None = None
    start: Literal["initial", "present"] = "initial"
    every: Literal["epoch"] | Annotated[int, Field(ge=1)] = "epoch"
    distribution: Literal["uniform", "erdos-renyi", "er-kernel"] | None = None
    growth: Literal["momentum", "gradient", "random"] | None = None
    redistribution: Literal["momentum", "gradient", "nonzeros", "none"] | None = None
    rate: Rate | None = None
    rate_end: Rate | None = None
    train: Training

    by_layer: ClassVar[tuple[str, ...]] = ("density",)

    @model_validator(mode="after")
    def _grows_or_not(self) -> SparseTrain:
        if self.growth is not None and self.method == "gradual-magnitude":
            raise ValueError("gradual-magnitude only removes; leave growth out")
        return self

    @property
    def from_start(self) -> bool:
        """It begins from them."""
        return True

    @property
    def needs_masks(self) -> str:
        """Where it has no density of its own."""
        return "it has no density of its own; give density" if self.density is None else ""

    @property
    def resets(self) -> bool:
        """Unless it goes on from the present weights."""
        return self.start == "initial"

    @property
    def retrains(self) -> bool:
        """Always."""
        return True

    def check(self, model: nn.Module) -> None:
        """Try the patterns, and whether growth can read the optimizer's momentum."""
        super().check(model)
        if (
            self._rule().needs_momentum
            and self.train.optimizer == "sgd"
            and not self.train.momentum
        ):
            with trying("train", "momentum"):
                raise ArgumentError(
                    f"0: {self.method} grows by momentum, and this sgd keeps none; give "
                    "momentum: 0.9 or optimizer: adam, or growth and redistribution by gradient"
                )

    def run(self, state: State) -> None:
        """Train with moving masks; they are the network's from here on."""
        weights = self.weights(state.model)
        if self.start == "initial":
            state.to_initial()
            state.masks.apply_(state.model)
        density: float | dict[str, float] = 1.0
        masks: Masks | None = None
        if self.density is None:
            masks = Masks({n: state.masks[n] for n in weights if n in state.masks})
            if not masks:
                raise ArgumentError(
                    f"stage {state.name} has no density and no earlier stage has pruned these "
                    "layers; give density"
                )
        elif isinstance(self.density, float):
            density = self.density
        else:
            by_layer: dict[str, float] = per_layer(state.model, weights, self.density)
            weights = {n: p for n, p in weights.items() if n in by_layer or n not in state.masks}
            density = {**dict.fromkeys(weights, 1.0), **by_layer}
        epoch = math.ceil(len(state.data.train) / self.train.batch_size)
        state.fixed -= set(weights)
        method = DynamicSparse(
            self._rule(),
            density,
            steps=max(1, self.train.epochs * epoch),
            every=epoch if self.every == "epoch" else self.every,
            generator=state.generator(99),
            include=list(weights),
            masks=masks,
        )
        state.train(self.train, [method, *state.others(weights)])
        method.finish()
        state.masks.update(Masks({n: m.cpu() for n, m in method.masks.items()}))
        state.notes["reallocations"] = len(method.history)

    def _rule(self) -> Rule:
        changes: dict[str, Any] = {
            key: value
            for key in ("distribution", "growth", "redistribution", "rate", "rate_end")
            if (value := getattr(self, key)) is not None
        }
        if changes.get("redistribution") == "none":
            changes["redistribution"] = None
        if "momentum" in (changes.get("growth"), changes.get("redistribution")):
            changes["mask_momentum"] = False  # which would hide what is read
        return replace(FAMILY[self.method], **changes)
