"""A task learnt from a teacher as well: the loss of a training stage that distils."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import nest
from gossamer.core.modes import device_of, evaluating
from gossamer.training.distill import check_softness, soft_targets
from gossamer.training.tasks.base import Meter, Task
from gossamer.training.tasks.counts import Classification, MultiLabel
from gossamer.training.tasks.values import Fidelity

__all__ = ["Distilled", "classes_of"]


def classes_of(
    task: Task, outputs: Any, wanted: Any, targets: Any, inputs: Any
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Logits, class indices and a teacher's logits as :func:`gossamer.training.soft_targets` takes
    them, classes last, each beside what it is judged by; None for a task without class indices.
    """
    if not isinstance(task, Classification) or isinstance(task, MultiLabel):
        return None
    mine, labels = task.pair(outputs, targets, inputs)
    theirs, _ = task.pair(wanted, targets, inputs)
    if labels.ndim >= 3:  # (N, C, H, W)
        mine, theirs = mine.movedim(1, -1), theirs.movedim(1, -1)
    return mine, labels, theirs


class Distilled(Task):
    """``weight`` parts of the distance to a teacher's outputs, the rest of the task's own loss.

    Of class logits the distance is that of :func:`gossamer.training.soft_targets`; of other
    outputs, and where there are no labels, :meth:`Fidelity.distance`, without labels alone.

    Args:
        task: what the network is for.
        teacher: a network of the same outputs, left as it is.
        weight: of the teacher's part, in [0, 1].
        temperature: of both softmaxes.
    """

    name = "distilled"

    def __init__(self, task: Task, teacher: nn.Module, weight: float, temperature: float) -> None:
        check_softness(weight, temperature)
        self.task, self.teacher = task, teacher
        self.weight, self.temperature = weight, temperature
        self.metric = task.metric

    def meter(self) -> Meter:
        """The task's."""
        return self.task.meter()

    def loss(self, outputs: Any, targets: Any, inputs: Any) -> Tensor:
        """Both parts."""
        task = self.task
        with evaluating(self.teacher), torch.no_grad():
            wanted = task.feed(self.teacher, nest.moved(inputs, device_of(self.teacher)))
        if isinstance(task, Fidelity):
            return task.distance(outputs, wanted, self.temperature)
        if (found := classes_of(task, outputs, wanted, targets, inputs)) is not None:
            return soft_targets(*found, temperature=self.temperature, weight=self.weight)
        near = Fidelity().distance(outputs, wanted)
        return self.weight * near + (1 - self.weight) * task.loss(outputs, targets, inputs)
