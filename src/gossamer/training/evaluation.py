"""The figures of a network on a split, by its task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import nest
from gossamer.core.errors import ArgumentError
from gossamer.core.modes import device_of, evaluating
from gossamer.datasets import Dataset, Split, batches, check_split
from gossamer.training.metric import Evaluation
from gossamer.training.tasks import Task, chosen, cross_entropy

__all__ = ["Evaluation", "cross_entropy", "evaluate"]

_AT_ONCE = 1 << 25  # entries of inputs in a batch, whatever batch_size says


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int = 1000,
    loss: Callable[[Any, Any], Tensor] | None = None,
    task: Task | str | None = None,
) -> Evaluation:
    """Evaluate in evaluation mode, without gradients; modes are restored, the data order is fixed.

    Args:
        split: (N,) targets with (N, C) logits, or (N, T) targets with (N, T, V) logits, counted
            by token; or what the task reads.
        batch_size: targets in a batch: examples, or tokens. Large inputs come in smaller ones.
        loss: mean loss of a batch; None: the task's.
        task: a task or a name of :data:`gossamer.training.tasks.TASKS`; None: by the targets.

    Raises :class:`ArgumentError` for an empty split, a batch size under 1, or outputs whose shape
    does not fit the targets'.
    :class:`~gossamer.core.errors.DatasetError` for what is no split of tensors.
    """
    check_split(split)
    if batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size} must be at least 1")
    if not len(split):
        raise ArgumentError("split is empty: there is nothing to evaluate")
    if not isinstance(task, Task):
        task, _ = chosen(task, Dataset("split", split, split, split))
    device = device_of(model)
    meter = task.meter()
    with evaluating(model), torch.no_grad():
        for inputs, targets in batches(split, _examples(split, batch_size), generator=None):
            inputs, targets = nest.moved(inputs, device), nest.moved(targets, device)
            outputs = task.feed(model, inputs)
            if targets is not None and loss is None:
                task.check(outputs, targets)
            value = None
            if loss is not None:
                value = loss(outputs, targets)
            elif targets is not None or not task.labelled:
                value = task.loss(outputs, targets, inputs)
            meter.update(outputs, targets, inputs, value)
    return meter.result()


def _examples(split: Split, batch_size: int) -> int:
    """Examples in a batch."""
    inputs, targets = split.batch(slice(0, 1))
    each = sum(t.numel() for t in nest.leaves(inputs))
    # A language model's logits are large: count its tokens, not its windows.
    tokens = targets.numel() if isinstance(targets, Tensor) and not each > 1 << 16 else 1
    return max(1, min(batch_size // max(1, tokens), _AT_ONCE // max(1, each)))
