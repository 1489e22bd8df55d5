"""The door of a run: whether network and data are what they must be, and fit each other.

Everything that can be known of them from two examples is found out before any work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import datasets, nets
from gossamer.compression.layers import PatternError
from gossamer.compression.recipe import Recipe
from gossamer.compression.stage import trainings
from gossamer.core import nest
from gossamer.core.errors import ArgumentError, RecipeError
from gossamer.core.locate import failure
from gossamer.core.modes import device_of, modes_kept
from gossamer.datasets import Dataset, Split
from gossamer.training.tasks import (
    Classification,
    Fidelity,
    MultiLabel,
    Regression,
    Task,
    logits,
)

__all__ = ["check_data", "check_fit", "check_labels", "check_patterns", "check_trained"]


def check_data(data: Dataset) -> Dataset:
    """The dataset when a run can use it.

    Raises :class:`ArgumentError` for an empty split, :class:`DatasetError` as
    :func:`gossamer.datasets.check` does.
    """
    for part in ("train", "validation", "test"):
        datasets.check_split(getattr(data, part), f"dataset {data.name!r}, {part}")
        if not len(getattr(data, part)):
            raise ArgumentError(
                f"dataset {data.name!r} has no {part} examples; choices are made on validation "
                "data and figures taken on test data, so hold some back for both"
            )
    return datasets.check(data)


def check_fit(model: nn.Module, data: Dataset, task: Task) -> None:
    """Run the network on two examples, as they are and without a trace left.

    Raises :class:`ArgumentError` where it cannot take them, or gives something else than what the
    task reads and the targets fit.
    """
    if data.test.in_memory and isinstance(data.test.stored, Tensor):
        examples, targets = _examples(data), data.test.batch(slice(0, 2))[1]
    else:
        examples, targets = data.test.batch(slice(0, 2))
    found = _outputs(model, data, task, examples)
    what, name = type(model).__name__, data.name
    try:
        if targets is not None:
            task.check(found, targets)
        if isinstance(task, Fidelity):  # against itself: what cannot be compared shows
            Fidelity(model, task.outputs).loss(found, None, nest.moved(examples, device_of(model)))
    except ArgumentError as e:
        fix = ""
        if isinstance(task, Regression):
            fix = "; where targets are class indices, give them as torch.int64 (.long())"
        told = f"network {what} on dataset {name!r}, task {task.name!r}: {e}{fix}"
        raise ArgumentError(told) from e
    if isinstance(task, Classification) and not isinstance(task, MultiLabel):
        _check_classes(what, logits(found), data)


def _check_classes(what: str, found: Tensor, data: Dataset) -> None:
    """Whether there is an output for every class index."""
    splits = [s for s in (data.train, data.validation, data.test) if len(s)]
    tops = [int(s.targets.max()) for s in splits if isinstance(s.targets, Tensor)]
    top, wide = max(tops), found.shape[1 if data.test.targets.ndim >= 3 else -1]
    if wide <= top:
        fix = f"; give it {data.classes} outputs" if data.classes else ""
        raise ArgumentError(
            f"network {what} has {wide} outputs, but the targets of dataset {data.name!r} "
            f"reach {top}{fix}"
        )


def _examples(data: Dataset) -> Tensor:
    """Two test examples; of token ids, the first is the one with the largest id of all splits."""
    test: Split = data.test
    if test.stored.dtype != torch.int64 or test.stored.ndim < 2:
        found: Tensor = test.batch(slice(0, 2))[0]
        return found
    highest = [s.stored for s in (data.train, data.validation, test) if len(s)]
    most = max(highest, key=lambda ids: int(ids.max()))
    row = int(most.flatten(1).max(1).values.argmax())
    return torch.cat([most[row : row + 1], test.stored[:1]])[: len(test.stored[:2])]


def _outputs(model: nn.Module, data: Dataset, task: Task, examples: Any) -> Any:
    inputs = nest.moved(examples, device_of(model))
    with modes_kept(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            return task.feed(model, inputs)
        except Exception as e:  # the user's own code may raise anything
            kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
            fix = ""
            given = {t.dtype for t in nest.leaves(inputs) if t.is_floating_point()}
            if given and kinds and not given <= kinds:
                fix = f"; its weights are {kinds.pop()}, so give network.float()"
            shape = nest.shown(data.test.one()[0])
            if isinstance(inputs, Tensor):
                shape = f"{tuple(inputs.shape[1:])} each, {inputs.dtype}"
            raise ArgumentError(
                f"network {type(model).__name__} cannot take the inputs of dataset {data.name!r}, "
                f"{shape}{fix}: it {failure(e)}"
            ) from e


def check_labels(recipe: Recipe, data: Dataset, task: Task) -> None:
    """Raise :class:`RecipeError` for a stage that reads labels, where there are none."""
    if task.labelled or data.train.targets is not None:
        return
    for i, stage in enumerate(recipe.stages):
        why = stage.labels
        if i == 0 and stage.stage == "train":
            why = "it trains a network with nothing to learn from: no labels, no network before it"
        if why:
            raise RecipeError(
                f"{recipe.place('stages', i)}: dataset {data.name!r} has no labels, and {why}; "
                "leave the stage out, or give labels"
            )


def check_trained(recipe: Recipe, spec: str) -> None:
    """Raise :class:`RecipeError` where a recipe would compress random initial weights."""
    begins = recipe.work[0].stage if recipe.work else "pack"
    if begins == "train" or recipe.weights or recipe.pretrained or nets.is_own(spec):
        return
    if spec.endswith(".py"):
        raise RecipeError(
            f"network {spec!r} is a file; name the function in it that returns the network, as "
            f"'{spec}:FUNCTION'"
        )
    raise RecipeError(
        f"{recipe.place()}: it begins with {begins!r}, but network {spec!r} is not trained; give "
        "its weights (--weights FILE, weights: FILE), pretrained: true where there are published "
        "ones, or a train stage"
    )


def check_patterns(recipe: Recipe, model: nn.Module) -> None:
    """Raise :class:`RecipeError` for a stage that does not fit the network, before any work."""
    for i, stage in enumerate(recipe.stages):
        before = recipe.stages[:i]
        if stage.needs_masks and not any(s.compresses for s in before):
            raise RecipeError(
                f"{recipe.place('stages', i)}: no stage before {stage.stage} prunes anything, and "
                f"{stage.needs_masks}"
            )
        _check_teachers(recipe, i)
        try:
            stage.check(model)
        except ArgumentError as e:
            key = e.key if isinstance(e, PatternError) else ()
            raise RecipeError(f"{recipe.place('stages', i, *key)}: {e}") from e


def _check_teachers(recipe: Recipe, i: int) -> None:
    """Raise :class:`RecipeError` where a training of a stage has no network to learn from."""
    stage = recipe.stages[i]
    for training in trainings(stage):
        which = training.teaching.teacher
        if not training.teaching.weight or which == "start":
            continue
        if which != "before":
            if which in nets.PRETRAINED or Path(which).is_file():
                continue
            raise RecipeError(
                f"{recipe.place('stages', i)}: distill's teacher {which!r} is neither before, "
                f"start, one of {', '.join(nets.PRETRAINED)}, nor a file of weights"
            )
        if not any(s.compresses for s in recipe.stages[: i + 1]):
            raise RecipeError(
                f"{recipe.place('stages', i)}: nothing is compressed before {stage.stage}, so "
                "there is no network from before it to learn from; name another teacher in "
                "distill, or leave it out"
            )
