"""Tasks of real values: regression, embeddings, and agreement with another network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core import nest
from gossamer.core.errors import ArgumentError
from gossamer.core.modes import device_of, evaluating
from gossamer.training.metric import Metric
from gossamer.training.tasks.base import Means, Meter, Task, logits, same_shape

__all__ = ["Embedding", "Fidelity", "Regression", "cosines"]


class _ByExample(Task):
    """Outputs against targets of the same shape; a value an example, whose mean is the metric."""

    def check(self, outputs: Any, targets: Any) -> None:
        """One shape: (N, 1) against (N,) would be broadcast."""
        same_shape(logits(outputs), targets)

    def pair(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Outputs and targets, checked."""
        self.check(outputs, targets)
        return logits(outputs), targets

    @abstractmethod
    def value(self, found: Tensor, targets: Tensor) -> Tensor:
        """The metric of each example, (N,)."""

    def meter(self) -> Meter:
        """The mean over all examples."""
        return Means(
            self.metric,
            lambda outputs, targets, _: {
                self.metric.name: self.value(*self.pair(outputs, targets))
            },
        )


class Regression(_ByExample):
    """Real values: float targets of the outputs' shape; the metric is the mean squared error."""

    name = "regression"
    metric = Metric("squared error", "", higher_is_better=False, relative=True)

    def loss(self, outputs: Any, targets: Any, inputs: Any) -> Tensor:
        """Mean squared error."""
        found, wanted = self.pair(outputs, targets)
        return F.mse_loss(found, wanted.to(found.dtype))

    def value(self, found: Tensor, targets: Tensor) -> Tensor:
        """Squared error."""
        return (found.double() - targets.double()).square().reshape(len(found), -1).mean(1)


class Embedding(_ByExample):
    """Directions: (N, D) targets for (N, D) outputs; the metric is their mean cosine."""

    name = "embedding"
    metric = Metric("cosine", "")

    def loss(self, outputs: Any, targets: Any, inputs: Any) -> Tensor:
        """1 - mean cosine."""
        found, wanted = self.pair(outputs, targets)
        return 1 - F.cosine_similarity(found.flatten(1), wanted.flatten(1)).mean()

    def value(self, found: Tensor, targets: Tensor) -> Tensor:
        """Cosine."""
        return cosines(found, targets)


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of each example of two (N, ...) tensors, (N,); 1 where both are zero."""
    a, b = one.double().reshape(len(one), -1), other.double().reshape(len(other), -1)
    product, size = (a * b).sum(1), a.norm(dim=1) * b.norm(dim=1)
    both = (a.norm(dim=1) == 0) & (b.norm(dim=1) == 0)
    return torch.where(both, torch.ones_like(size), product / size.clamp(min=1e-300))


class Fidelity(Task):
    """Agreement with a reference network on the same inputs; no labels are read.

    Of logits the metric is the fraction of answers that are the reference's; of other outputs it
    is the mean cosine of each example's outputs, all tensors together. Relative error and, of
    logits, cosine stand beside it.

    Args:
        reference: the network to agree with, which is not changed; None: :meth:`of` gives it.
        outputs: what the network's outputs are.
    """

    name = "fidelity"
    labelled = False

    def __init__(
        self, reference: nn.Module | None = None, outputs: Literal["logits", "values"] = "values"
    ) -> None:
        if outputs not in ("logits", "values"):
            raise ArgumentError(f"outputs={outputs!r} is not one of 'logits', 'values'")
        self.reference, self.outputs = reference, outputs
        name, unit = ("agreement", "%") if outputs == "logits" else ("cosine", "")
        self.metric = Metric(name, unit)

    def of(self, reference: nn.Module) -> Fidelity:
        """The same task against a network."""
        return Fidelity(reference, self.outputs)

    def settings(self) -> dict[str, Any]:
        """With what the outputs are."""
        return {**super().settings(), "outputs": self.outputs}

    def wanted(self, inputs: Any) -> Any:
        """The reference's outputs, in evaluation mode and without gradients."""
        if self.reference is None:
            raise ArgumentError(
                "fidelity has no reference network; give Fidelity(reference=network)"
            )
        with evaluating(self.reference), torch.no_grad():
            return self.feed(self.reference, nest.moved(inputs, device_of(self.reference)))

    def loss(self, outputs: Any, targets: Any, inputs: Any) -> Tensor:
        """:meth:`distance` from the reference."""
        return self.distance(outputs, self.wanted(inputs))

    def distance(self, outputs: Any, wanted: Any, temperature: float = 1.0) -> Tensor:
        """Kullback-Leibler divergence of logits, at a temperature; of values the squared error as
        a part of the reference's power, a mean over the tensors.
        """
        if self.outputs == "logits":
            found, target = _classes_last(outputs), _classes_last(wanted)
            same_shape(found, target)
            flat = found.reshape(-1, found.shape[-1]) / temperature
            soft = target.reshape(-1, target.shape[-1]).to(flat.device) / temperature
            return temperature**2 * F.kl_div(
                F.log_softmax(flat, 1), F.log_softmax(soft, 1), reduction="batchmean",
                log_target=True,
            )  # fmt: skip
        parts = [
            (a - b.to(a.device)).square().sum() / b.square().sum().clamp(min=1e-30).to(a.device)
            for a, b in _pairs(outputs, wanted)
        ]
        return torch.stack(parts).mean()

    def meter(self) -> Meter:
        """Agreement, cosine and relative error of each example."""

        def each(outputs: Any, targets: Any, inputs: Any) -> Mapping[str, Tensor]:
            wanted = self.wanted(inputs)
            number = nest.count(inputs)
            found = {}
            if self.outputs == "logits":
                a, b = _classes_last(outputs), _classes_last(wanted)
                same_shape(a, b)
                same = a.argmax(-1).cpu() == b.argmax(-1).cpu()
                same &= ~a.isnan().any(-1).cpu()  # no answer, though argmax gives NaN's place
                found["agreement"] = same.reshape(len(same), -1).double().mean(1)
                pairs = [(a, b)]
            else:
                pairs = _pairs(outputs, wanted)
            # tensors that are not (N, ...), as a recurrent layer's states, count as one example
            rows = number if all(len(a) == number for a, _ in pairs if a.ndim) else 1
            one, other = (
                torch.cat([p.double().cpu().reshape(rows, -1) for p in side], 1)
                for side in zip(*pairs, strict=True)
            )
            found["cosine"] = cosines(one, other)
            found["relative_error"] = (one - other).norm(dim=1) / other.norm(dim=1).clamp(min=1e-30)
            return found

        return Means(self.metric, each)


def _classes_last(outputs: Any) -> Tensor:
    """Logits with the classes last: (N, C), (N, T, V), and of maps (N, C, H, W) the second axis."""
    found = logits(outputs)
    return found.movedim(1, -1) if found.ndim >= 4 else found


def _pairs(outputs: Any, wanted: Any) -> list[tuple[Tensor, Tensor]]:
    """Tensors of real values of both, one by one."""
    mine = [t for t in nest.leaves(outputs) if t.is_floating_point()]
    others = [t for t in nest.leaves(wanted) if t.is_floating_point()]
    if not mine or [t.shape for t in mine] != [t.shape for t in others]:
        raise ArgumentError(
            f"outputs {nest.shown(outputs)} cannot be compared with {nest.shown(wanted)}; both "
            "must hold the same tensors of real values"
        )
    return list(zip(mine, others, strict=True))
