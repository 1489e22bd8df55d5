"""The door of a run: whether network and data are what they must be, and fit each other.

Everything that can be known of them from two examples is found out before any work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer import datasets, nets
from gossamer.compression.layers import PatternError
from gossamer.compression.recipe import Recipe
from gossamer.core.errors import ArgumentError, DatasetError, RecipeError
from gossamer.core.locate import failure
from gossamer.core.modes import device_of, modes_kept
from gossamer.datasets import Dataset, Split

__all__ = ["check_data", "check_fit", "check_patterns", "check_trained"]


def check_data(data: Dataset) -> Dataset:
    """The dataset when a run can use it.

    Raises :class:`ArgumentError` for an empty split, :class:`DatasetError` as
    :func:`gossamer.datasets.check` does, and for targets that are no class indices: a run measures
    accuracy.
    """
    for part in ("train", "validation", "test"):
        datasets.check_split(getattr(data, part), f"dataset {data.name!r}, {part}")
        if not len(getattr(data, part)):
            raise ArgumentError(
                f"dataset {data.name!r} has no {part} examples; choices are made on validation "
                "data and figures taken on test data, so hold some back for both"
            )
    datasets.check(data)
    for part in ("train", "validation", "test"):
        targets = getattr(data, part).targets
        if targets.is_floating_point():
            raise DatasetError(
                f"dataset {data.name!r}, {part}: targets are {targets.dtype}; a run measures "
                "accuracy, so give class indices as torch.int64 (.long())"
            )
    return data


def check_fit(model: nn.Module, data: Dataset) -> None:
    """Run the network on two examples, as they are and without a trace left.

    Raises :class:`ArgumentError` where it cannot take them, or gives something else than logits
    that the targets fit.
    """
    found = _outputs(model, data)
    what, name = type(model).__name__, data.name
    if not isinstance(found, Tensor):
        raise ArgumentError(
            f"network {what} returns {type(found).__name__}; a run needs one tensor of logits, "
            "so wrap it in a module whose forward gives that"
        )
    targets = data.test.targets[: len(_examples(data))]
    if targets.is_floating_point():
        return  # a regression: the user's own loss judges it
    if found.shape[:-1] != targets.shape:
        raise ArgumentError(
            f"network {what} gives outputs of shape {tuple(found.shape)} for targets of shape "
            f"{tuple(targets.shape)} of dataset {name!r}; give (N,) targets for (N, C) logits, "
            "(N, T) for (N, T, V)"
        )
    splits = [s for s in (data.train, data.validation, data.test) if len(s)]
    top = max(int(split.targets.max()) for split in splits)
    if found.shape[-1] <= top:
        raise ArgumentError(
            f"network {what} has {found.shape[-1]} outputs, but the targets of dataset {name!r} "
            f"reach {top}; give it {data.classes} outputs"
        )


def _examples(data: Dataset) -> Tensor:
    """Two test examples; of token ids, the first is the one with the largest id of all splits."""
    test: Split = data.test
    if test.stored.dtype != torch.int64 or test.stored.ndim < 2:
        return test.batch(slice(0, 2))[0]
    highest = [s.stored for s in (data.train, data.validation, test) if len(s)]
    most = max(highest, key=lambda ids: int(ids.max()))
    row = int(most.flatten(1).max(1).values.argmax())
    return torch.cat([most[row : row + 1], test.stored[:1]])[: len(test.stored[:2])]


def _outputs(model: nn.Module, data: Dataset) -> Any:
    device = device_of(model)
    inputs = _examples(data).to(device)
    with modes_kept(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            return model(inputs)
        except Exception as e:  # the user's own code may raise anything
            kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
            fix = ""
            if inputs.is_floating_point() and kinds and inputs.dtype not in kinds:
                fix = f"; its weights are {kinds.pop()}, so give network.float()"
            raise ArgumentError(
                f"network {type(model).__name__} cannot take the inputs of dataset {data.name!r}, "
                f"{tuple(inputs.shape[1:])} each, {inputs.dtype}{fix}: it {failure(e)}"
            ) from e


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
        try:
            stage.check(model)
        except ArgumentError as e:
            key = e.key if isinstance(e, PatternError) else ()
            raise RecipeError(f"{recipe.place('stages', i, *key)}: {e}") from e
