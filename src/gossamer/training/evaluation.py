"""Accuracy and loss of a network on a split, with an honest interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.errors import ArgumentError
from gossamer.core.modes import device_of, modes_kept
from gossamer.datasets import Split, batches, check_split

__all__ = ["Evaluation", "cross_entropy", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        correct, total: examples (tokens for a language model).
        loss: mean cross-entropy, or the given loss, in nats.
    """

    correct: int
    total: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Fraction correct, in [0, 1]."""
        return self.correct / self.total

    @property
    def error(self) -> float:
        """1 - accuracy."""
        return 1 - self.accuracy

    @property
    def perplexity(self) -> float:
        """exp(loss), for language models."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval of the accuracy (Wilson 1927), as fractions.

        >>> low, high = Evaluation(correct=90, total=100, loss=0.0).interval()
        >>> round(low, 4), round(high, 4)
        (0.8256, 0.9448)
        """
        if not 0 < confidence < 1:
            raise ArgumentError(f"confidence={confidence} must lie between 0 and 1, such as 0.95")
        z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
        n, p = self.total, self.accuracy
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
        return max(0.0, centre - half), min(1.0, centre + half)

    def as_dict(self) -> dict[str, Any]:
        """correct, total, accuracy, low, high (95 %), loss."""
        low, high = self.interval()
        return {
            "correct": self.correct,
            "total": self.total,
            "accuracy": self.accuracy,
            "low": low,
            "high": high,
            "loss": self.loss,
        }


def cross_entropy(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of (N, C) or (N, T, V) logits against (N,) or (N, T) indices."""
    return F.cross_entropy(
        outputs.reshape(-1, outputs.shape[-1]),
        targets.reshape(-1),
        label_smoothing=label_smoothing,
    )


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int = 1000,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Evaluation:
    """Evaluate in evaluation mode, without gradients; modes are restored, the data order is fixed.

    Args:
        split: (N,) targets with (N, C) logits, or (N, T) targets with (N, T, V) logits, counted
            by token.
        batch_size: targets in a batch: examples, or tokens.
        loss: mean loss of a batch; None: cross-entropy.

    Raises :class:`ArgumentError` for an empty split, a batch size under 1, or outputs whose shape
    does not fit the targets'.
    :class:`~gossamer.core.errors.DatasetError` for what is no split of two tensors.
    """
    check_split(split)
    if batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size} must be at least 1")
    if not len(split):
        raise ArgumentError("split is empty: there is nothing to evaluate")
    device = device_of(model)
    # A language model's logits are large: count its tokens, not its windows.
    examples = (
        batch_size if split.targets.ndim < 2 else max(1, batch_size // split.targets.shape[1])
    )
    correct = torch.zeros((), dtype=torch.int64, device=device)
    # Float64: a sum of tens of thousands of float32 losses loses digits.
    summed = torch.zeros((), dtype=torch.float64, device=device)
    total = 0
    with modes_kept(model), torch.no_grad():
        model.eval()
        for inputs, targets in batches(split, examples, generator=None):
            inputs, targets = inputs.to(device), targets.to(device)
            outputs = model(inputs)
            if not targets.is_floating_point() and outputs.shape[:-1] != targets.shape:
                # broadcast against each other they would be counted, and wrongly
                raise ArgumentError(
                    f"outputs of shape {tuple(outputs.shape)} do not fit targets of shape "
                    f"{tuple(targets.shape)}; give (N,) targets for (N, C) logits, (N, T) for "
                    "(N, T, V)"
                )
            value = cross_entropy(outputs, targets) if loss is None else loss(outputs, targets)
            summed += value.double() * targets.numel()
            if not targets.is_floating_point():
                correct += (outputs.argmax(-1) == targets).sum()
            total += targets.numel()
    return Evaluation(int(correct), total, float(summed) / total)
