"""Tasks that count right answers: classes, next tokens, several labels at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.training.metric import ACCURACY, Evaluation, Metric, bootstrap
from gossamer.training.tasks.base import Meter, Task, logits, same_shape

__all__ = ["IGNORED", "Classification", "LanguageModel", "MultiLabel", "cross_entropy"]

IGNORED = -100
"""torch's own mark of a target that does not count."""


def cross_entropy(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of (N, C) or (N, T, V) logits against (N,) or (N, T) indices; of
    (N, C, H, W) against (N, H, W). Targets of -100 do not count; where none counts it is 0.

    Raises :class:`ArgumentError` for a target beyond the outputs (on the CPU, where torch looks).
    """
    classes = outputs.shape[1 if targets.ndim >= 3 else -1]
    if targets.ndim < 3:
        outputs, targets = outputs.reshape(-1, classes), targets.reshape(-1)
    try:
        mean = F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)
    except IndexError as e:
        counted = targets[targets != IGNORED]
        raise ArgumentError(
            f"targets reach from {int(counted.min())} to {int(counted.max())}, and the network has "
            f"{classes} outputs, of which each is a class; give it more outputs"
        ) from e
    # a mean over nothing is 0 / 0, and one such batch is no divergence
    return torch.where((targets != IGNORED).any(), mean, 0)


class _Counts(Meter):
    """Right answers and the mean loss, exact whatever the batches."""

    def __init__(self, task: Classification) -> None:
        self.task = task
        self.correct = self.total = 0
        # Float64: a sum of tens of thousands of float32 losses loses digits.
        self.summed = 0.0
        self.values: list[Tensor] = []

    def update(self, outputs: Any, targets: Any, inputs: Any, loss: Tensor | None) -> None:
        right, counted = self.task.right(outputs, targets, inputs)
        self.correct += int((right & counted).sum())
        number = int(counted.sum())
        self.total += number
        if loss is not None and number:
            self.summed += float(loss.double()) * number
            if self.task.metric is not ACCURACY:
                self.values.append(self.task.each(outputs, targets, inputs).cpu())

    def result(self) -> Evaluation:
        if not self.total:
            raise ArgumentError(f"no target counts: all of them are {IGNORED}")
        loss = self.summed / self.total
        if self.task.metric is ACCURACY:
            return Evaluation(self.correct, self.total, loss)
        ends = bootstrap(torch.cat(self.values)) if self.values else None
        more = self.task.more(loss)
        return Evaluation(self.correct, self.total, loss, self.task.metric, loss, ends, more)


class Classification(Task):
    """Class indices: (N,) for (N, C) logits, (N, T) for (N, T, V), (N, H, W) for (N, C, H, W)."""

    name = "classification"

    def loss(self, outputs: Any, targets: Any, inputs: Any) -> Tensor:
        """Mean cross-entropy."""
        return cross_entropy(*self.pair(outputs, targets, inputs))

    def meter(self) -> Meter:
        """Counts right answers."""
        return _Counts(self)

    def pair(self, outputs: Any, targets: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Logits and the targets that belong to them."""
        found = logits(outputs)
        self.check(found, targets)
        return found, targets

    def check(self, outputs: Any, targets: Any) -> None:
        """By rank, never by sizes that happen to agree."""
        found = logits(outputs)
        fits = (
            found.shape[:1] + found.shape[2:] == targets.shape
            if targets.ndim >= 3
            else found.shape[:-1] == targets.shape
        )
        if not fits:
            # broadcast against each other they would be counted, and wrongly
            raise ArgumentError(
                f"outputs of shape {tuple(found.shape)} do not fit targets of shape "
                f"{tuple(targets.shape)}; give (N,) targets for (N, C) logits, (N, T) for "
                "(N, T, V), (N, H, W) for (N, C, H, W)"
            )

    def right(self, outputs: Any, targets: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Where answers are right, and where a target counts at all; both bool.

        Logits with NaN among them are no answer: torch's argmax would give the NaN's class.
        """
        found, wanted = self.pair(outputs, targets, inputs)
        axis = 1 if wanted.ndim >= 3 else -1
        # argmax takes NaN for the largest, and the largest keeps it: no answer, so no right one
        number = ~found.amax(axis).isnan()
        return (found.argmax(axis) == wanted) & number, wanted != IGNORED

    def each(self, outputs: Any, targets: Any, inputs: Any) -> Tensor:
        """The metric of each example, (N,): its mean loss."""
        found, wanted = self.pair(outputs, targets, inputs)
        flat = F.cross_entropy(
            found.reshape(-1, found.shape[-1]), wanted.reshape(-1), reduction="none"
        ).reshape(len(wanted), -1)
        counted = (wanted != IGNORED).reshape(len(wanted), -1).sum(1).clamp(min=1)
        return flat.double().sum(1) / counted

    def more(self, loss: float) -> dict[str, float]:
        """Further figures."""
        return {}


class LanguageModel(Classification):
    """Next tokens: (N, T) ids for (N, T, V) logits; the metric is the mean loss in nats a token.

    Where targets are the inputs themselves, as transformers' causal models take them, each
    position's target is the next one's token.

    Attributes:
        bytes_per_token: mean length of a token of the text, for bits per byte; None: not known.
    """

    name = "language-model"
    metric = Metric("loss", "nats", higher_is_better=False, relative=True)

    def __init__(self, bytes_per_token: float | None = None) -> None:
        self.bytes_per_token = bytes_per_token

    def pair(self, outputs: Any, targets: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Logits and targets, shifted where the targets are the inputs."""
        found, wanted = super().pair(outputs, targets, inputs)
        named = isinstance(inputs, Mapping)
        ids = inputs.get("input_ids") if named else inputs
        if isinstance(ids, Tensor) and ids.shape == wanted.shape and wanted.ndim == 2:
            # a plain tensor's targets may have their own marks: only all of it is the inputs
            counted = (wanted != IGNORED) if named else torch.ones_like(wanted, dtype=torch.bool)
            if bool((ids[counted] == wanted[counted]).all()):
                return found[:, :-1], wanted[:, 1:]
        return found, wanted

    def more(self, loss: float) -> dict[str, float]:
        """Perplexity, and bits per byte where the text's bytes are known."""
        found = {"perplexity": math.exp(loss) if loss < 700 else math.inf}
        if self.bytes_per_token:
            found["bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        return found

    def settings(self) -> dict[str, Any]:
        """With the bytes of a token."""
        return {**super().settings(), "bytes_per_token": self.bytes_per_token}


class MultiLabel(Classification):
    """Several labels at once: (N, C) targets of 0 and 1 for (N, C) logits; accuracy by label.

    Targets of -100 do not count; those between 0 and 1 are soft.
    """

    name = "multi-label"

    def loss(self, outputs: Any, targets: Any, inputs: Any) -> Tensor:
        """Mean binary cross-entropy."""
        found, wanted = self.pair(outputs, targets, inputs)
        counted = wanted != IGNORED
        if not bool(counted.all()):
            found, wanted = found[counted], wanted[counted]
            if not len(wanted):
                return found.sum()  # of nothing: 0
        return F.binary_cross_entropy_with_logits(found, wanted.to(found.dtype))

    def check(self, outputs: Any, targets: Any) -> None:
        """One shape, and labels: another number would give a loss all the same."""
        same_shape(logits(outputs), targets)
        odd = targets[((targets < 0) | (targets > 1)) & (targets != IGNORED)]
        if odd.numel():
            raise ArgumentError(
                f"targets hold {odd[0].item()}: several labels at once are 0 and 1, or {IGNORED} "
                "where one does not count; of class indices the task is 'classification'"
            )

    def right(self, outputs: Any, targets: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Right where the logit's sign is the label's; NaN has none."""
        found, wanted = self.pair(outputs, targets, inputs)
        right = ((found > 0) == (wanted > 0.5)) & ~found.isnan()
        return right, wanted != IGNORED
