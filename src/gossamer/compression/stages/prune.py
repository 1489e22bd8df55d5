"""Weights removed in rounds, by any score, with retraining."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.compression.floor import Rounds
from gossamer.compression.groups import COUPLED, GroupSettings
from gossamer.compression.layers import per_layer, trying
from gossamer.compression.parts import curvature, random_batches, scan
from gossamer.compression.settings import Density, OneOf, Quality, Training
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State
from gossamer.core import schedules
from gossamer.core.masks import Masks, keep_top
from gossamer.core.method import Masked
from gossamer.prune import magnitude, sensitivity
from gossamer.prune.scores import SCORES, Reads
from gossamer.structure.latency import Latency
from gossamer.training.checkpoints import load_checkpoint, save_atomic

__all__ = ["Prune"]


class Prune(LayerStage):
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
        floor: weights (or groups) that a layer keeps at least.
        groups: in place of single weights, whole groups: a kind, or a mapping of ``kind`` and how
            groups are scored and counted (:class:`gossamer.compression.groups.GroupPruning`).
            ``2:4`` and its like say themselves how much stays, and take no density.
    """

    stage: Literal["prune"] = "prune"
    method: Annotated[str, OneOf(SCORES)] = "magnitude"
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
    groups: GroupSettings | None = None

    by_layer: ClassVar[tuple[str, ...]] = ("density", "quality")

    @model_validator(mode="after")
    def _one_budget(self) -> Prune:
        if self.groups is not None and self.groups.fixed:
            if self.density is not None or self.quality is not None or self.rounds > 1:
                raise ValueError(
                    f"groups {self.groups.kind} say themselves how much stays, at once; leave "
                    "density, quality and rounds out"
                )
            return self
        if self.groups is not None and (self.quality is not None or self.density == "auto"):
            raise ValueError("quality and density: auto are of single weights; give a density")
        if self.groups is not None and self.groups.milliseconds is not None:
            if self.density is not None:
                raise ValueError("groups give milliseconds; leave density out")
        elif (self.density is None) == (self.quality is None):
            raise ValueError("give either density (the fraction kept) or quality")
        if self.groups is not None and self.groups.cost == "latency" and self.scope != "global":
            raise ValueError("cost: latency is the whole network's; give scope: global")
        if self.quality is not None and self.method != "magnitude":
            raise ValueError("quality is a threshold on magnitudes; it needs method: magnitude")
        if self.quality is not None and self.rounds > 1:
            raise ValueError("quality removes all at once; give a density for rounds above 1")
        if self.scope == "global" and isinstance(self.density, Mapping | str):
            raise ValueError("scope: global takes one density, a number")
        return self

    @property
    def from_start(self) -> bool:
        """Where the score compares with the initial weights."""
        return "initial" in SCORES[self.method].reads

    @property
    def labels(self) -> str:
        """Where the score reads gradients or curvature of a loss against them."""
        reads = {"batches", "hessian"} & set(SCORES[self.method].reads)
        return f"method {self.method!r} scores weights by a loss against them" if reads else ""

    @property
    def retrains(self) -> bool:
        """After its rounds."""
        return self.retrain is not None

    def run(self, state: State) -> None:
        """Round by round; the last that kept the run's floor is what it ends with."""
        weights = self.weights(state.model)
        within = Masks({n: m for n, m in state.masks.items() if n in weights})
        quality = self.quality
        latency = None if self.groups is None else self.groups.measured(state)
        rounds = Rounds(state, self.rounds)
        with _dropout(state.model, self.dropout) as rescale:
            for number, budget in enumerate(_budgets(self, state, weights, latency), 1):
                if quality is not None:
                    masks = magnitude.threshold_masks(
                        state.model,
                        per_layer(state.model, weights, quality),
                        within=within,
                        include=list(weights),
                    )
                else:
                    masks = self._masks(state, weights, budget, within, number, latency)
                masks.apply_(state.model)
                state.masks.update(masks)
                within = masks
                last = number == self.rounds
                settings = self.retrain if last else self.between or self.retrain
                if settings is not None and settings.epochs:
                    rescale(state.masks)
                    state.train(settings, [Masked(state.masks)], number)
                rounds.ended(number)
        rounds.back()
        if latency is not None and "rolled_back" in state.notes:
            kept = load_checkpoint(_measured(state, state.notes["rolled_back"]["round"]))
            state.notes["milliseconds"] = kept["milliseconds"]

    def _masks(
        self,
        state: State,
        weights: Mapping[str, nn.Parameter],
        budget: float | dict[str, float],
        within: Masks,
        number: int,
        latency: Latency | None,
    ) -> Masks:
        # measured once: a restart must choose the same
        path = _measured(state, number)
        if latency is not None and path.exists():
            found = load_checkpoint(path)
            state.notes["milliseconds"] = found["milliseconds"]
            return Masks(found["masks"])
        scores = _scores(self, state, weights, number)
        if self.groups is not None:
            masks = self.groups.masks(
                state,
                weights,
                scores,
                budget,
                scope=self.scope,
                floor=self.floor,
                include=self.include,
                latency=latency,
            )
            if latency is not None:
                now = latency(masks)
                state.notes["milliseconds"] = [latency.whole, now]
                save_atomic({"masks": dict(masks), "milliseconds": [latency.whole, now]}, path)
                state.progress.say(f"  {now:.3f} ms of {latency.whole:.3f} ms, batch 1, measured")
            return masks
        masks = keep_top(scores, budget, scope=self.scope, within=within or None, floor=self.floor)
        magnitude.warn_empty(masks)
        return masks

    def check(self, model: nn.Module) -> None:
        """Try the patterns, and whether the layers have such groups."""
        super().check(model)
        if self.groups is not None:
            with trying("groups"):
                self.groups.families(model, self.weights(model), self.include)

    def covered(self, model: nn.Module) -> set[str] | None:
        """The weights; of groups those that have any."""
        covered = super().covered(model)
        if self.groups is None or covered is None or self.groups.kind == COUPLED:
            return covered
        made = self.groups.families(model, self.weights(model), self.include)
        return covered & {name for family in made for name in family.parameters}


def _measured(state: State, number: int) -> Path:
    """Where the masks of a round are kept that were chosen by measuring."""
    return state.out / f"{state.name}-{number}-measured.train.pt"


def _scores(
    stage: Prune, state: State, weights: Mapping[str, nn.Parameter], part: int
) -> dict[str, Tensor]:
    """What the method's score reads, and the score."""
    given: dict[Reads, Callable[[], Any]] = {
        "initial": state.initial,
        "model": lambda: state.model,
        "batches": lambda: random_batches(state, part),
        "generator": lambda: state.generator(part),
        "hessian": lambda: curvature(state, list(weights)),
    }
    score = SCORES[stage.method]
    return score.function(weights, **{what: given[what]() for what in score.reads})


def _budgets(
    stage: Prune, state: State, weights: Mapping[str, Any], latency: Latency | None
) -> Iterator[float | dict[str, float]]:
    """The density, or the densities by layer, of each round."""
    final: float | dict[str, float]
    if latency is not None and stage.density is None:
        assert stage.groups is not None
        final = min(1.0, (stage.groups.milliseconds or latency.whole) / latency.whole)
    elif stage.density == "auto":
        final = scan(state, weights, sensitivity.DENSITIES).suggest(stage.max_drop)
    elif isinstance(stage.density, float) and stage.scope == "global":
        final = stage.density
    else:
        # a layer that no pattern names stays as it is
        final = dict.fromkeys(weights, 1.0) | per_layer(state.model, weights, stage.density or 1.0)

    def at(end: float, part: float) -> float:
        if part == 1:
            return end
        if stage.schedule == "geometric":
            return float(end**part)
        return schedules.make(stage.schedule, 1.0, end)(part)

    for number in range(1, stage.rounds + 1):
        part = number / stage.rounds
        if isinstance(final, dict):
            yield {name: at(end, part) for name, end in final.items()}
        else:
            yield at(final, part)


@contextmanager
def _dropout(model: nn.Module, rate: float | None) -> Iterator[Callable[[Masks], None]]:
    """Rescale dropout for each round's masks; every layer gets its own rate back at the end."""
    own = {m: m.p for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)}

    def rescale(masks: Masks) -> None:
        for module, p in own.items():
            module.p = p if rate is None else rate
        magnitude.rescale_dropout(model, masks)

    try:
        yield rescale
    finally:
        for module, p in own.items():
            module.p = p
