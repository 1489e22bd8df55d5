"""A task of a user's own, made of a function or two."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import nest
from gossamer.core.errors import ArgumentError
from gossamer.training.metric import Evaluation, Metric
from gossamer.training.tasks.base import Means, Meter, Task

__all__ = ["Custom", "task"]


class Custom(Task):
    """A task of one's own: see :func:`gossamer.task`."""

    name = "custom"

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        metric: Any,
        measure: Metric,
        read: Callable[[Any], Any] | None = None,
        feed: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        self._loss, self._metric, self.metric = loss, metric, measure
        self._read, self._feed = read, feed

    def feed(self, model: nn.Module, inputs: Any) -> Any:
        """By the user's function, where there is one."""
        return nest.feed(model, inputs) if self._feed is None else self._feed(model, inputs)

    def _outputs(self, outputs: Any) -> Any:
        return outputs if self._read is None else self._read(outputs)

    def loss(self, outputs: Any, targets: Any, inputs: Any) -> Tensor:
        """The user's."""
        return self._loss(self._outputs(outputs), targets)

    def meter(self) -> Meter:
        """Of a function or of an object with update, compute and reset."""
        if hasattr(self._metric, "update"):
            return _Object(self)

        def each(outputs: Any, targets: Any, inputs: Any) -> Mapping[str, Tensor]:
            found = torch.as_tensor(self._metric(self._outputs(outputs), targets)).detach()
            number = nest.count(inputs)
            if found.ndim == 0:  # a batch's mean: each of its examples counts with it
                found = found.expand(number)
            if found.shape != (number,):
                raise ArgumentError(
                    f"metric {self.metric.name!r} gives {nest.shown(found)} for {number} "
                    "examples; return one value an example, or their mean"
                )
            if bool(torch.isnan(found).any()):
                raise ArgumentError(
                    f"metric {self.metric.name!r} gives NaN; look at the outputs it was given, "
                    f"{nest.shown(outputs)}"
                )
            return {self.metric.name: found}

        return Means(self.metric, each)

    def settings(self) -> dict[str, Any]:
        """With the functions' names."""
        parts = {"loss": self._loss, "metric": self._metric, "read": self._read, "feed": self._feed}
        told = {k: getattr(v, "__qualname__", type(v).__qualname__) for k, v in parts.items() if v}
        return {**super().settings(), **{f"{key}_function": name for key, name in told.items()}}


class _Object(Meter):
    """An object with update(outputs, targets), compute() and reset(), as torchmetrics' are."""

    def __init__(self, task: Custom) -> None:
        self.task = task
        self.summed, self.total = 0.0, 0
        task._metric.reset()

    def update(self, outputs: Any, targets: Any, inputs: Any, loss: Tensor | None) -> None:
        self.task._metric.update(self.task._outputs(outputs), targets)
        number = nest.count(inputs)
        self.total += number
        self.summed += 0.0 if loss is None else float(loss.double()) * number

    def result(self) -> Evaluation:
        value = float(self.task._metric.compute())
        if math.isnan(value):
            raise ArgumentError(
                f"metric {self.task.metric.name!r} computes NaN over {self.total} examples; look "
                "at what its update() was given"
            )
        loss = self.summed / max(1, self.total)
        return Evaluation(None, self.total, loss, self.task.metric, value)


def task(
    loss: Callable[[Any, Any], Tensor],
    metric: Any,
    *,
    name: str = "metric",
    unit: str = "",
    higher_is_better: bool = True,
    relative: bool | None = None,
    read: Callable[[Any], Any] | None = None,
    feed: Callable[[nn.Module, Any], Any] | None = None,
) -> Custom:
    """A task of one's own.

    Args:
        loss: ``loss(outputs, targets)``, the mean loss of a batch, for training.
        metric: ``metric(outputs, targets)``, one value an example (N,) or their mean; or an
            object with ``update(outputs, targets)``, ``compute()`` and ``reset()``, as
            torchmetrics' are.
        name, unit, higher_is_better: of the metric; unit ``%`` shows a fraction in percent.
        relative: ``max_drop`` is a part of the metric's value before; None: where lower is better.
        read: picks from a network's outputs what ``loss`` and ``metric`` take; None: all of them.
        feed: ``feed(model, inputs)`` runs the network on a batch; None: a mapping by name, a
            tuple in order.
    """
    own = Metric(
        name, unit, higher_is_better, not higher_is_better if relative is None else relative
    )
    return Custom(loss, metric, own, read, feed)
