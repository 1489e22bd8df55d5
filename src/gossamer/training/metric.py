"""What an evaluation found, and what its figure of merit is: name, unit, direction, interval.

A metric of a task is a mean over examples, so that its interval can be had by resampling them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any, Self

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError

__all__ = ["ACCURACY", "Evaluation", "Metric", "bootstrap", "wilson"]

_EXACT = 1e-9  # of a fraction of examples: 0.005 of 1000 is 5 of them


@dataclass(frozen=True)
class Metric:
    """A figure of merit.

    Attributes:
        name: as rows and messages call it.
        unit: after its values; ``%`` shows a fraction in percent.
        higher_is_better: its direction.
        relative: a drop is a part of the value before (losses, which have no scale of their
            own), not a difference (fractions, cosines).
    """

    name: str = "accuracy"
    unit: str = "%"
    higher_is_better: bool = True
    relative: bool = False

    @classmethod
    def of(cls, found: Mapping[str, Any] | None) -> Self:
        """From :meth:`as_dict`; None: accuracy."""
        return cls() if not found else cls(**{key: found[key] for key in cls.__annotations__})

    def as_dict(self) -> dict[str, Any]:
        """The attributes, ready for JSON."""
        return asdict(self)

    def drop(self, before: float, after: float) -> float:
        """How much worse ``after`` is, in the measure of ``max_drop``; negative: better.

        >>> round(Metric().drop(0.9, 0.895), 4)
        0.005
        >>> round(Metric("nats", "nats", False, True).drop(2.0, 2.1), 4)
        0.05
        """
        worse = before - after if self.higher_is_better else after - before
        return worse / max(abs(before), 1e-12) if self.relative else worse

    def keeps(self, before: float, after: float, max_drop: float) -> bool:
        """Whether ``after`` is at most ``max_drop`` worse; NaN never is."""
        return self.drop(before, after) <= max_drop + _EXACT

    def worst(self, before: float, max_drop: float) -> float:
        """The worst value that :meth:`keeps` allows."""
        lost = (max_drop + _EXACT) * (max(abs(before), 1e-12) if self.relative else 1.0)
        return before - lost if self.higher_is_better else before + lost

    def better(self, one: float, other: float) -> bool:
        """Whether ``one`` is better than ``other``."""
        return one > other if self.higher_is_better else one < other

    def show(self, value: float, digits: int = 2) -> str:
        """A value with its unit.

        >>> Metric().show(0.9175), Metric("loss", "nats", False, True).show(1.25)
        ('91.75 %', '1.25 nats')
        """
        if self.unit == "%":
            return f"{100 * value:.{digits}f} %"
        return f"{value:.{digits + 3}g} {self.unit}".rstrip()

    def show_drop(self, drop: float) -> str:
        """A drop in words, without its sign.

        >>> Metric().show_drop(0.005), Metric("loss", "nats", False, True).show_drop(0.05)
        ('0.50 points', '5.00 %')
        """
        if self.relative:
            return f"{100 * abs(drop):.2f} %"
        return f"{100 * abs(drop):.2f} points" if self.unit == "%" else self.show(abs(drop))


ACCURACY = Metric()


def wilson(correct: float, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a fraction (Wilson 1927).

    >>> low, high = wilson(90, 100)
    >>> round(low, 4), round(high, 4)
    (0.8256, 0.9448)
    """
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence={confidence} must lie between 0 and 1, such as 0.95")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    n, p = total, correct / total
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


_RESAMPLES, _BLOCKS = 1000, 1000


def bootstrap(values: Tensor, confidence: float = 0.95) -> tuple[float, float] | None:
    """Percentile interval of the mean of (n,) values by resampling (Efron 1979); seeded.

    More than 1,000 values are resampled in 1,000 blocks of neighbours. None for fewer than two.
    """
    if len(values) < 2:
        return None
    if len(values) > _BLOCKS:
        values = torch.stack([block.mean() for block in values.tensor_split(_BLOCKS)])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (_RESAMPLES, len(values)), generator=generator)
    means = values.double()[drawn].mean(1)
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, ends).tolist()
    return low, high


@dataclass(frozen=True)
class Evaluation:
    """What :func:`gossamer.evaluate` found.

    Attributes:
        correct, total: examples (tokens of a language model); ``correct`` is None where the task
            does not count.
        loss: mean loss, in nats where it is a cross-entropy.
        metric: what ``score`` is.
        value: of the metric, where it is not the accuracy.
        bounds: its 95 % interval, where that is known; an accuracy's is Wilson's.
        more: further figures by name.
    """

    correct: int | None
    total: int
    loss: float
    metric: Metric = ACCURACY
    value: float | None = None
    bounds: tuple[float, float] | None = None
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The metric's value."""
        return self.accuracy if self.value is None else self.value

    @property
    def accuracy(self) -> float:
        """Fraction correct, in [0, 1].

        Raises :class:`ArgumentError` where the task does not count right answers.
        """
        if self.correct is None:
            raise ArgumentError(
                f"this task has no accuracy: its metric is {self.metric.name}; read score"
            )
        return self.correct / self.total

    @property
    def error(self) -> float:
        """1 - accuracy."""
        return 1 - self.accuracy

    @property
    def perplexity(self) -> float:
        """exp(loss), for language models."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """Of an accuracy Wilson's score interval (Wilson 1927), as fractions; of other metrics
        the 95 % one by resampling, None where it is not known.

        >>> low, high = Evaluation(correct=90, total=100, loss=0.0).interval()
        >>> round(low, 4), round(high, 4)
        (0.8256, 0.9448)
        """
        if self.value is not None or self.correct is None:
            return self.bounds
        return wilson(self.correct, self.total, confidence)

    def as_dict(self) -> dict[str, Any]:
        """correct, total, accuracy (where it counts), score, low, high (95 %), loss, and more."""
        found: dict[str, Any] = {"total": self.total, "score": self.score, "loss": self.loss}
        if self.correct is not None:
            found |= {"correct": self.correct, "accuracy": self.accuracy}
        if (ends := self.interval()) is not None:
            found["low"], found["high"] = ends
        return found | ({"metric": self.metric.as_dict(), **self.more})

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Evaluation:
        """From :meth:`as_dict`."""
        own = ("correct", "total", "accuracy", "score", "low", "high", "loss", "metric")
        metric = Metric.of(found.get("metric"))
        counted = metric.name == "accuracy"
        ends = (found["low"], found["high"]) if "low" in found and not counted else None
        return cls(
            found.get("correct"),
            found["total"],
            found["loss"],
            metric,
            None if counted else found["score"],
            ends,
            {key: value for key, value in found.items() if key not in own},
        )
