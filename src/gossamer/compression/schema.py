"""What a recipe may say: its stages, their settings and what is allowed for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, PrivateAttr, field_validator, model_validator

from gossamer.compression.schema_fewbits import Activations, FixedPoint, Quantize, Svd
from gossamer.compression.schema_sparse import Rewind, SparseTrain, Supermask, Tickets
from gossamer.compression.settings import (
    Bits,
    Density,
    Fraction,
    Layers,
    NotNegative,
    Quality,
    Strength,
    Strict,
    Training,
)

__all__ = [
    "STAGES",
    "AbsorbBatchnorm",
    "Activations",
    "Ecsq",
    "Evaluate",
    "FixedPoint",
    "Layers",
    "Pack",
    "Prune",
    "Quantize",
    "QuantizeBiases",
    "RateAware",
    "Recipe",
    "RemoveDead",
    "Rewind",
    "Sensitivity",
    "Share",
    "SparseTrain",
    "Stage",
    "Supermask",
    "Svd",
    "Tickets",
    "Train",
    "Training",
]


class Train(Training):
    """Train the network, or go on training a trained one; what is pruned stays pruned."""

    stage: Literal["train"] = "train"


class Sensitivity(Layers):
    """Scan accuracy against density, one layer at a time; the network is left as it was."""

    stage: Literal["sensitivity"] = "sensitivity"
    densities: tuple[Fraction, ...] = (1.0, 0.7, 0.5, 0.35, 0.25, 0.17, 0.12, 0.08, 0.05, 0.03)


class Prune(Layers):
    """Remove weights in ``rounds``, and retrain after each.

    Attributes:
        method: what is removed first: small weights, small saliency (Optimal Brain Damage),
            small |w dL/dw| (SNIP; meant for the weights before any training), any (the control),
            or by a criterion of initial and present weight
            (:data:`gossamer.prune.deconstruct.CRITERIA`).
        density: the fraction kept: one number, one by layer pattern, or ``auto`` from a
            sensitivity scan in which each layer on its own may cost ``max_drop`` of accuracy.
        quality: instead of a density: keep |w| > quality * std(layer).
        scope: one budget a layer, or one for the whole network.
        schedule: how the density falls over the rounds: ``geometric`` removes the same fraction
            of what is left in each; ``linear`` and ``cubic`` follow these curves.
        retrain, between: training after the last round, and after each before it (default: as
            the last).
        dropout: D_o, the rate that dropout layers have before it is rescaled by each round's
            sqrt(kept connections); they get their own rate back after the stage.
        floor: weights that a layer keeps at least.
    """

    stage: Literal["prune"] = "prune"
    method: Literal[
        "magnitude",
        "obd",
        "snip",
        "random",
        "small_final",
        "large_init",
        "small_init",
        "large_init_large_final",
        "small_init_small_final",
        "magnitude_increase",
        "movement",
        "large_final_same_sign",
        "large_final_diff_sign",
    ] = "magnitude"
    density: Density | None = None
    quality: Quality | None = None
    max_drop: Annotated[float, Field(gt=0, lt=1)] = 0.005
    scope: Literal["layer", "global"] = "layer"
    rounds: Annotated[int, Field(ge=1, le=1000)] = 1
    schedule: Literal["geometric", "linear", "cubic"] = "geometric"
    retrain: Training | None = None
    between: Training | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    floor: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _one_budget(self) -> Prune:
        if (self.density is None) == (self.quality is None):
            raise ValueError("give either density (the fraction kept) or quality")
        if self.quality is not None and self.method != "magnitude":
            raise ValueError("quality is a threshold on magnitudes; it needs method: magnitude")
        if self.quality is not None and self.rounds > 1:
            raise ValueError("quality removes all at once; give a density for rounds above 1")
        if self.scope == "global" and not isinstance(self.density, float):
            raise ValueError("scope: global takes one density, a number")
        return self


class RemoveDead(Strict):
    """Remove what only serves units without inputs or without outputs, and report them.

    Outputs stay what they were: a unit's constant is folded into the next layer's bias.
    """

    stage: Literal["remove_dead"] = "remove_dead"


class Share(Layers):
    """Share values within each layer by k-means, and fine-tune the shared values.

    ``bits`` counts the reserved zero: 2^bits - 1 values. A mapping gives bits by layer pattern
    (a later pattern wins; a layer that none names is not shared).
    """

    stage: Literal["share"] = "share"
    bits: Bits
    init: Literal["linear", "density", "forgy", "optimal", "uniform"] = "linear"
    finetune: Training | None = None


class Ecsq(Layers):
    """Entropy-constrained quantization: trade squared error against bits, then fine-tune.

    ``lam`` is the price of a bit in units of the layer's variance: larger, fewer bits.
    """

    stage: Literal["ecsq"] = "ecsq"
    lam: Strength
    finetune: Training | None = None


class RateAware(Layers):
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


class QuantizeBiases(Strict):
    """Put what is not a weight (biases, batch-norm scales and shifts) on a uniform grid."""

    stage: Literal["quantize_biases"] = "quantize_biases"
    bits: Annotated[int, Field(ge=2, le=16)] = 8


class AbsorbBatchnorm(Strict):
    """Absorb batch-norm statistics into scale and shift."""

    stage: Literal["absorb_batchnorm"] = "absorb_batchnorm"


class Pack(Strict):
    """Write the file; once, after every stage that changes the network."""

    stage: Literal["pack"] = "pack"
    profile: Literal["smallest", "fast", "huffman"] = "smallest"


class Evaluate(Strict):
    """What is measured of the finished file; the last stage where it is given.

    ``latency``: time the network before and after, batch 1, in the same engine.
    """

    stage: Literal["evaluate"] = "evaluate"
    latency: bool = True


Stage = Annotated[
    Train
    | Sensitivity
    | Prune
    | RemoveDead
    | Share
    | Ecsq
    | RateAware
    | Quantize
    | Activations
    | FixedPoint
    | Svd
    | Rewind
    | SparseTrain
    | Supermask
    | Tickets
    | QuantizeBiases
    | AbsorbBatchnorm
    | Pack
    | Evaluate,
    Field(discriminator="stage"),
]
STAGES: dict[str, type[BaseModel]] = {
    str(kind.model_fields["stage"].default): kind for kind in get_args(get_args(Stage)[0])
}
"""Stage name -> its settings."""


MOST_SEED = 10**14
"""A stage's own seed is 10,000 times the recipe's and a little, and torch takes 63 bits."""


class Recipe(Strict):
    """A validated recipe.

    Attributes:
        model: a network's name or ``module:function``; may be given at the run instead.
        weights: file with the network's trained tensors.
        weights_key: where in a checkpoint they are, such as ``ema`` or ``state.model``; needed
            only where there are several.
        pretrained: the network's published weights.
        dataset, subset: its name, and how many training examples to use.
        seed: of initial weights, data order and everything random.
        max_drop: what the whole run may cost: the fraction of validation accuracy below the
            network before the first stage that compresses; 1 allows anything. Rounds of pruning
            that end below go back to the last that kept it.
        stages: in order; ``pack`` and ``evaluate`` are added where they are missing.
    """

    name: Annotated[str, Field(max_length=200)]
    description: str = ""
    model: str | None = None
    weights: str | None = None
    weights_key: str | None = None
    pretrained: bool = False
    dataset: str | None = None
    subset: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0
    max_drop: Annotated[float, Field(ge=0, le=1)] = 0.005
    stages: tuple[Stage, ...] = ()

    @field_validator("name")
    @classmethod
    def _printable(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("holds control characters; give a name that a terminal can show")
        return value

    # path -> where it was written ("line 7", "--set ..."); the file's name
    _places: dict[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)
    _file: str = PrivateAttr(default="recipe")
    _source: Path | None = PrivateAttr(default=None)

    @property
    def source(self) -> Path | None:
        """The file that the recipe was read from; None for one of the library's, or a mapping."""
        return self._source

    def overridden(self, key: str) -> bool:
        """Whether ``--set`` gave a key at the top of the recipe."""
        return self._places.get((key,), "").startswith("--set ")

    def place(self, *path: str | int) -> str:
        """How a message calls a key: file, line and dotted path."""
        return described(self._file, self._places, path)

    @property
    def work(self) -> tuple[Any, ...]:
        """The stages before ``pack``."""
        return tuple(s for s in self.stages if not isinstance(s, (Pack, Evaluate)))

    @property
    def pack(self) -> Pack:
        """How the file is written."""
        return next((s for s in self.stages if isinstance(s, Pack)), Pack())

    @property
    def evaluate(self) -> Evaluate:
        """What is measured of it."""
        return next((s for s in self.stages if isinstance(s, Evaluate)), Evaluate())


def described(
    file: str, places: Mapping[tuple[str | int, ...], str], path: tuple[str | int, ...]
) -> str:
    """File, line of the deepest known key on the path, and the path."""
    key = ".".join(map(str, path))
    for end in range(len(path), 0, -1):
        if path[:end] in places:
            return f"{file}, {places[path[:end]]}: {key}"
    return f"{file}: {key}" if key else file
