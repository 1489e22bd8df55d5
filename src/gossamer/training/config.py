"""What decides a training run, and what is told of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gossamer.core import schedules
from gossamer.core.errors import ArgumentError
from gossamer.training.metric import ACCURACY, Metric

__all__ = ["History", "Progress", "TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run besides the network, the data and the methods.

    Attributes:
        epochs: passes over the training split; 0 trains nothing.
        lr, lr_end, warmup: the learning rate rises linearly over ``warmup`` epochs to ``lr``,
            then follows ``schedule`` (a name of :data:`gossamer.core.schedules.SCHEDULES`) to
            ``lr_end``, step by step.
        lr_steps, lr_factor: the points of progress and the factor of ``schedule="step"``.
        optimizer: "sgd" or "adam". ``momentum`` and ``nesterov`` are sgd's.
        weight_decay: L2 as torch's optimizers add it, on all parameters.
        l1: strength of ``l1 * sum |w|`` over the compressible weights; it enters the gradient,
            not the reported loss.
        seed: of the data order, the augmentation and dropout.
        grad_clip: largest norm of the whole gradient, or None.
        precision: ``bfloat16``: layers multiply in it (torch.autocast), which is faster where the
            processor does; weights, their gradients and evaluation stay float32.

    Raises :class:`ArgumentError` for values outside what is allowed.
    """

    epochs: int
    batch_size: int = 64
    lr: float = 0.01
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    l1: float = 0.0
    schedule: str = "constant"
    lr_end: float = 0.0
    lr_steps: tuple[float, ...] = (0.5, 0.75)
    lr_factor: float = 0.1
    warmup: int = 0
    seed: int = 0
    label_smoothing: float = 0.0
    grad_clip: float | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lr_steps", tuple(self.lr_steps))
        least: dict[str, tuple[float, bool]] = {  # field -> (bound, bound itself allowed)
            "epochs": (0, True),
            "batch_size": (1, True),
            "lr": (0, False),
            "momentum": (0, True),
            "weight_decay": (0, True),
            "l1": (0, True),
            "lr_end": (0, True),
            "lr_factor": (0, False),
            "warmup": (0, True),
            "seed": (0, True),
            "label_smoothing": (0, True),
            "grad_clip": (0, False),
        }
        for name, (bound, closed) in least.items():
            value = getattr(self, name)
            if value is None and name == "grad_clip":
                continue
            # "not >=" refuses NaN as well
            if not (value >= bound if closed else value > bound) or not math.isfinite(value):
                raise ArgumentError(
                    f"{name}={value} must be {'at least' if closed else 'more than'} {bound}"
                )
        for name in ("epochs", "batch_size", "warmup", "seed"):
            if not isinstance(getattr(self, name), int):
                raise ArgumentError(f"{name}={getattr(self, name)!r} must be a whole number")
        if self.optimizer not in ("sgd", "adam"):
            raise ArgumentError(f"optimizer {self.optimizer!r} is not one of 'sgd', 'adam'")
        if self.precision not in ("float32", "bfloat16"):
            raise ArgumentError(f"precision {self.precision!r} is not one of 'float32', 'bfloat16'")
        if self.nesterov and not self.momentum:
            raise ArgumentError("nesterov=True needs a momentum above 0")
        if self.label_smoothing >= 1:
            raise ArgumentError(f"label_smoothing={self.label_smoothing} must be under 1")
        if not all(0 <= at <= 1 for at in self.lr_steps):
            raise ArgumentError(
                f"lr_steps={self.lr_steps} must be fractions of the run, such as (.5, .75)"
            )
        if self.warmup and self.warmup >= self.epochs:
            raise ArgumentError(f"warmup={self.warmup} must be under epochs={self.epochs}")
        self.rate(1)

    def rate(self, steps_per_epoch: int) -> Callable[[int], float]:
        """The learning rate as a function of the step, counted from 0."""
        if self.schedule == "step":
            after = schedules.step(self.lr, at=self.lr_steps, factor=self.lr_factor)
        else:
            after = schedules.make(self.schedule, self.lr, self.lr_end)
        warm = self.warmup * steps_per_epoch
        rest = max(1, self.epochs * steps_per_epoch - warm)

        def at(step: int) -> float:
            return self.lr * (step + 1) / warm if step < warm else after((step - warm) / rest)

        return at


@dataclass
class History:
    """What happened in a run.

    Attributes:
        epochs: one row an evaluated epoch: epoch (from 1), step, train_loss, validation_loss,
            validation_accuracy, lr, seconds (of training so far, over all resumes), and
            NAME_loss, NAME_accuracy of what was monitored. Without a validation split its
            columns are missing; so is the accuracy where the task does not count, and
            validation_score stands for a metric that is not the accuracy.
        steps: the rows of ``evaluate_every_steps``, without train_loss.
        metric: of the task.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    metric: Metric = ACCURACY

    def score(self, row: Mapping[str, Any]) -> float | None:
        """The metric on the validation split, of one of the rows; None where there was none."""
        found: float | None = row.get("validation_score", row.get("validation_accuracy"))
        return found

    @property
    def best(self) -> dict[str, Any]:
        """The row of the best validation score, the earliest of equals; {} without rows."""
        rows = sorted(_validated(self.steps) + _validated(self.epochs), key=lambda r: r["step"])
        sign = 1 if self.metric.higher_is_better else -1
        return max(rows, key=lambda r: sign * (self.score(r) or 0.0), default={})

    @property
    def early_stop(self) -> dict[str, Any]:
        """The row of minimum validation loss, found afterwards; training never stops for it.

        From the rows of ``evaluate_every_steps`` where there are any. {} without rows.
        """
        rows = _validated(self.steps) or _validated(self.epochs)
        return min(rows, key=lambda r: r["validation_loss"], default={})

    def as_dict(self) -> dict[str, Any]:
        """Rows, best and early_stop, ready for JSON."""
        return {
            "epochs": self.epochs,
            "steps": self.steps,
            "best": self.best,
            "early_stop": self.early_stop,
        }


def _validated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "validation_loss" in row]


@dataclass(frozen=True)
class Progress:
    """Where a run is: at most ten times a second, and with ``row`` at each evaluation.

    ``loss`` is the mean training loss of the epoch so far; ``seconds`` counts since this start.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    seconds: float
    row: dict[str, Any] | None = None
