"""Which task a run is of: the one that is named, the dataset's own, or what its targets say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.core import nest
from gossamer.core.errors import ArgumentError
from gossamer.core.tables import Table
from gossamer.datasets import Dataset
from gossamer.training.tasks.base import Task
from gossamer.training.tasks.counts import Classification, LanguageModel, MultiLabel
from gossamer.training.tasks.values import Embedding, Fidelity, Regression

__all__ = ["TASKS", "chosen"]


def _language_model(data: Dataset) -> Task:
    """Bits per byte are known where every token is a character."""
    words, targets = data.vocabulary, data.test.targets
    if words is None or not isinstance(targets, Tensor) or sum(len(w) > 1 for w in words) > 1:
        return LanguageModel()
    sizes = torch.tensor([len(word.encode()) for word in words], dtype=torch.float64)
    return LanguageModel(float(sizes[targets.reshape(-1)].mean()))


def _fidelity(data: Dataset) -> Task:
    return Fidelity(outputs="values" if data.classes is None else "logits")


TASKS: Table[Callable[[Dataset], Task]] = Table(
    "task",
    {
        "classification": lambda data: Classification(),
        "language-model": _language_model,
        "regression": lambda data: Regression(),
        "multi-label": lambda data: MultiLabel(),
        "embedding": lambda data: Embedding(),
        "fidelity": _fidelity,
        "fidelity-logits": lambda data: Fidelity(outputs="logits"),
    },
)
"""Task name -> what makes it for a dataset."""


def chosen(spec: Task | str | None, data: Dataset) -> tuple[Task, list[str]]:
    """The task, and what is to be said of the choice.

    ``spec``: a task or a name of :data:`TASKS`; None: the dataset's own, else by its targets.
    Float targets are a regression; without targets it is fidelity.

    Raises :class:`ArgumentError` for an unknown name, a task that needs labels where there are
    none, and targets that more than one task could mean.
    """
    given = data.task if spec is None else spec
    if isinstance(given, Task):
        found = given
    elif given is not None:
        found = TASKS[given](data)
    else:
        found = TASKS[_by_targets(data)](data)
    unlabelled = data.test.targets is None
    if found.labelled and unlabelled:
        raise ArgumentError(
            f"task {found.name!r} reads targets, and dataset {data.name!r} has none; give them, "
            "or take task 'fidelity'"
        )
    told = []
    if unlabelled:
        what = found.metric.name
        told.append(
            f"dataset {data.name!r} has no labels: the run is judged by fidelity, the {what} "
            "with the network before compression"
        )
        if isinstance(found, Fidelity) and found.outputs == "values":
            told.append(
                "outputs are compared as values; where they are logits, give classes= with the "
                "data or task 'fidelity-logits'"
            )
    return found, told


def _by_targets(data: Dataset) -> str:
    targets: Any = data.test.targets
    if targets is None:
        return "fidelity"
    if not isinstance(targets, Tensor):
        raise ArgumentError(
            f"dataset {data.name!r} has targets {nest.shown(targets)}, which no built-in task "
            "reads; give task=gossamer.task(loss, metric)"
        )
    if not targets.is_floating_point():
        inputs = data.test.stored
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        if isinstance(ids, Tensor) and ids.shape == targets.shape:
            counted = targets >= 0
            if bool((ids[counted] == targets[counted]).all()):
                return "language-model"
        return "classification"
    if targets.ndim == 2 and targets.shape[1] > 1 and bool(((targets == 0) | (targets == 1)).all()):
        raise ArgumentError(
            f"dataset {data.name!r} has targets of 0 and 1, {nest.shown(targets)}: several labels "
            "at once, or values? Give task 'multi-label' or 'regression'"
        )
    return "regression"
