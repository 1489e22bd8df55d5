"""Stages that make a network sparse from the start."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gossamer.compression.settings import LayerDensity, Layers, Quality, Strict, Training

__all__ = ["Rewind", "SparseTrain", "Supermask", "Tickets"]

_Rate = Annotated[float, Field(ge=0, le=1)]


class SparseTrain(Layers):
    """Train a network that is sparse from the first step, while its weights move about.

    Attributes:
        method: a row of :data:`gossamer.prune.dynamic.FAMILY`; the axes below change it.
        density: the fraction kept of all chosen weights, or one by layer pattern (a layer that
            none names is whole); left out: the masks of an earlier stage.
        start: ``initial``: the weights that the run began with; ``present``: as they are.
        every: steps between two reallocations, or ``epoch``.
        distribution, growth, redistribution, rate, rate_end: see
            :class:`gossamer.prune.dynamic.Rule`; left out: the method's own.
        train: the training.
    """

    stage: Literal["sparse_train"] = "sparse_train"
    method: Literal["sparse-momentum", "set", "rigl", "dsr", "gradual-magnitude", "static"] = (
        "sparse-momentum"
    )
    density: LayerDensity | None = None
    start: Literal["initial", "present"] = "initial"
    every: Literal["epoch"] | Annotated[int, Field(ge=1)] = "epoch"
    distribution: Literal["uniform", "erdos-renyi", "er-kernel"] | None = None
    growth: Literal["momentum", "gradient", "random"] | None = None
    redistribution: Literal["momentum", "gradient", "nonzeros", "none"] | None = None
    rate: _Rate | None = None
    rate_end: _Rate | None = None
    train: Training

    @model_validator(mode="after")
    def _grows_or_not(self) -> SparseTrain:
        if self.growth is not None and self.method == "gradual-magnitude":
            raise ValueError("gradual-magnitude only removes; leave growth out")
        return self


class Tickets(Layers):
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


class Rewind(Strict):
    """Set the network back to the weights that the run began with; what is pruned stays pruned.

    Attributes:
        kept: what the weights that a mask keeps start from: their initial values, these values
            permuted within the layer, or plus or minus the layer's standard deviation.
        signed: each keeps the sign of its initial weight.
    """

    stage: Literal["rewind"] = "rewind"
    kept: Literal["rewind", "reshuffle", "constant"] = "rewind"
    signed: bool = True


class Supermask(Layers):
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
