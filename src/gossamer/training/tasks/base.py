"""What a network is for: how a batch is fed, how outputs are read, the loss and the metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import nest
from gossamer.core.errors import ArgumentError
from gossamer.training.metric import ACCURACY, Evaluation, Metric, bootstrap

__all__ = ["Means", "Meter", "Task", "logits", "same_shape"]


class Meter(ABC):
    """Adds up the batches of an evaluation."""

    @abstractmethod
    def update(self, outputs: Any, targets: Any, inputs: Any, loss: Tensor | None) -> None:
        """Take a batch: raw outputs, targets, inputs, and its mean loss (None: there is none)."""

    @abstractmethod
    def result(self) -> Evaluation:
        """The figures of all batches."""


class Task(ABC):
    """How a network is used and judged.

    Attributes:
        name: as recipes and messages call it.
        metric: what ``max_drop``, scans and the page speak of.
        labelled: whether it reads targets.
    """

    name: ClassVar[str]
    metric: Metric = ACCURACY
    labelled: ClassVar[bool] = True

    def feed(self, model: nn.Module, inputs: Any) -> Any:
        """What the network gives for a batch (:func:`gossamer.core.nest.feed`)."""
        return nest.feed(model, inputs)

    @abstractmethod
    def loss(self, outputs: Any, targets: Any, inputs: Any) -> Tensor:
        """Mean loss of a batch, a scalar tensor."""

    @abstractmethod
    def meter(self) -> Meter:
        """A new meter."""

    def check(self, outputs: Any, targets: Any) -> None:  # noqa: B027 - many have nothing to
        """Raise :class:`ArgumentError` where a batch's outputs do not fit its targets."""

    def settings(self) -> dict[str, Any]:
        """What tells it from another task, ready for JSON."""
        return {"name": self.name, "metric": self.metric.as_dict()}


def logits(outputs: Any) -> Tensor:
    """The tensor of logits among a network's outputs.

    A tensor itself; ``.logits`` of an output object or ``"logits"`` of a mapping; of a tuple or
    list the one tensor in it.

    Raises :class:`ArgumentError` where there is none, or more than one to choose from.
    """
    if isinstance(outputs, Tensor):
        return outputs
    found = getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, Mapping):
        found = outputs.get("logits")
    if isinstance(found, Tensor):
        return found
    if isinstance(outputs, (tuple, list)):
        tensors = nest.leaves(outputs)
        if len(tensors) == 1:
            return tensors[0]
    raise ArgumentError(
        f"outputs {nest.shown(outputs)} hold no one tensor of logits; return a tensor or an "
        "object with .logits, or give a task with read=, a function that picks it"
    )


def same_shape(outputs: Tensor, targets: Any) -> None:
    """Raise :class:`ArgumentError` where shapes differ and would be broadcast."""
    if not isinstance(targets, Tensor) or outputs.shape != targets.shape:
        raise ArgumentError(
            f"outputs of shape {tuple(outputs.shape)} do not fit targets {nest.shown(targets)}: "
            "the shapes must be the same"
        )


class Means(Meter):
    """The mean of a value an example, with its interval."""

    def __init__(
        self,
        metric: Metric,
        each: Callable[[Any, Any, Any], Mapping[str, Tensor]],
    ) -> None:
        self.metric, self.each = metric, each
        self.values: dict[str, list[Tensor]] = {}
        self.summed, self.total = 0.0, 0

    def update(self, outputs: Any, targets: Any, inputs: Any, loss: Tensor | None) -> None:
        """Take each example's values."""
        number = nest.count(inputs)
        for name, values in self.each(outputs, targets, inputs).items():
            self.values.setdefault(name, []).append(values.detach().double().reshape(-1).cpu())
        self.total += number
        if loss is not None:
            self.summed += float(loss.double()) * number

    def result(self) -> Evaluation:
        """Means, the metric's interval, and its worst example."""
        found = {name: torch.cat(values) for name, values in self.values.items()}
        main = found[self.metric.name]
        worst = main.min() if self.metric.higher_is_better else main.max()
        more = {f"worst_{self.metric.name}": float(worst)}
        more |= {n: float(v.mean()) for n, v in found.items() if n != self.metric.name}
        mean = float(main.mean())
        loss = self.summed / max(1, self.total)
        return Evaluation(None, self.total, loss, self.metric, mean, bootstrap(main), more)
