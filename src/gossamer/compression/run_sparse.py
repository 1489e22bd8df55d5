"""What the stages do that make a network sparse from the start."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.compression import schema_sparse as stages
from gossamer.compression.layers import chosen, per_layer
from gossamer.compression.schema_sparse import Rewind, SparseTrain, Tickets
from gossamer.compression.state import State
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.core.seeds import init_
from gossamer.prune import deconstruct, lottery
from gossamer.prune.dynamic import FAMILY, DynamicSparse, Rule
from gossamer.prune.supermask import Supermask

__all__ = ["batches", "rewind", "sparse_train", "supermask", "tickets"]

# Batches whose gradients SNIP averages; the paper takes one of 100 to 128 patterns.
_BATCHES, _PATTERNS = 4, 128


def batches(state: State, part: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A few random training batches."""
    split, generator = state.data.train, state.generator(part)
    order = torch.randperm(len(split), generator=generator)[: _BATCHES * _PATTERNS]
    for rows in order.split(_PATTERNS):
        yield split.batch(rows, None, generator)


def sparse_train(state: State, stage: SparseTrain) -> None:
    """Train with moving masks; they are the network's from here on."""
    weights = chosen(state.model, stage.include, stage.exclude)
    if stage.start == "initial":
        state.to_initial()
        state.masks.apply_(state.model)
    density: float | dict[str, float] = 1.0
    masks: Masks | None = None
    if stage.density is None:
        masks = Masks({n: state.masks[n] for n in weights if n in state.masks})
        if not masks:
            raise ArgumentError(
                f"stage {state.name} has no density and no earlier stage has pruned these layers; "
                "give density"
            )
    elif isinstance(stage.density, float):
        density = stage.density
    else:
        by_layer: dict[str, float] = per_layer(state.model, weights, stage.density)
        density = {**dict.fromkeys(weights, 1.0), **by_layer}
    epoch = math.ceil(len(state.data.train) / stage.train.batch_size)
    method = DynamicSparse(
        _rule(stage),
        density,
        steps=max(1, stage.train.epochs * epoch),
        every=epoch if stage.every == "epoch" else stage.every,
        generator=state.generator(99),
        include=list(weights),
        masks=masks,
    )
    state.train(stage.train, [method, *state.others(weights)])
    method.finish()
    state.masks.update(Masks({n: m.cpu() for n, m in method.masks.items()}))
    state.notes["reallocations"] = len(method.history)


def _rule(stage: SparseTrain) -> Rule:
    changes: dict[str, Any] = {
        key: value
        for key in ("distribution", "growth", "redistribution", "rate", "rate_end")
        if (value := getattr(stage, key)) is not None
    }
    if changes.get("redistribution") == "none":
        changes["redistribution"] = None
    return replace(FAMILY[stage.method], **changes)


def tickets(state: State, stage: Tickets) -> None:
    """Search a ticket from the initial weights; the network ends as the last one, trained."""
    weights = chosen(state.model, stage.include, stage.exclude)
    state.to_initial()
    folder = state.out / f"{state.name}.search"

    def run(model: nn.Module, part: lottery.Round) -> Mapping[str, Any]:
        before = len(state.curves)
        state.train(stage.train, [*part.methods, *state.others(weights)], part.number)
        curve = state.curves[before:]
        del state.curves[before:]
        return {"curve": curve}

    found = lottery.search(
        state.model,
        run,
        rounds=stage.rounds,
        rates=per_layer(state.model, weights, stage.rate),
        output=stage.output,
        folder=folder,
        scope=stage.scope,
        one_shot=stage.one_shot,
        rewind_step=stage.rewind_step,
        include=list(weights),
        progress=lambda done, total, _: state.progress.count(f"{state.name} rounds", done, total),
    )
    # From the search's own file, so that a resumed run tells of the rounds before the kill too.
    state.curves += [row for part in found.rows for row in part["curve"]]
    state.masks.update(found.masks[-1])
    state.notes["tickets"] = [
        {"density": row["density"], "validation_accuracy": row["curve"][-1]["validation_accuracy"]}
        for row in found.rows
        if row["curve"]
    ]
    (folder / "tickets.gsm").replace(state.out / f"{state.name}.gsm")
    shutil.rmtree(folder)


def rewind(state: State, stage: Rewind) -> None:
    """The initial weights again, under the present masks."""
    state.to_initial()
    initial = {n: t.clone() for n, t in state.initial().items() if n in state.masks}
    start = deconstruct.apply_actions(
        initial,
        initial,
        state.masks,
        kept=stage.kept,
        signed=stage.signed,
        removed="zero",
        generator=state.generator(),
    )
    start.apply_(state.model)


def supermask(state: State, stage: stages.Supermask) -> None:
    """Weights from the recipe's seed, and a learned mask of them."""
    weights = list(chosen(state.model, stage.include, stage.exclude))
    seeds = init_(state.model, state.seed, scheme=stage.scheme, include=weights)
    method = Supermask(generator=state.generator(99), rescale=stage.rescale, include=weights)
    state.train(stage.train, [method, *state.others(weights)])
    if stage.choice == "threshold":
        method.threshold()
    method.finish()
    state.seeds.update(method.seeds(seeds))
    state.masks.update(method.masks)
