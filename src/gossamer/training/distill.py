"""Losses against a teacher, for retraining what any other method has compressed.

- :func:`soft_targets`: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*,
  2015, arXiv 1503.02531, section 2.
- :func:`hint`: Romero et al., *FitNets: Hints for Thin Deep Nets*, ICLR 2015, equation 3.
- :func:`attention_transfer`: Zagoruyko and Komodakis, *Paying More Attention to Attention*, ICLR
  2017, equation 2, with the sum of squares over channels (p = 2). Deviation: the mean squared
  distance of the normalised maps, as the authors' code has it; the paper prints its root.

:class:`Features` reads the layers that hints and attention compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError

__all__ = [
    "Features",
    "attention",
    "attention_transfer",
    "check_softness",
    "hint",
    "soft_targets",
]

_IGNORED = -100  # torch's own mark of a target that does not count


def soft_targets(
    outputs: Tensor,
    targets: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    weight: float = 0.9,
) -> Tensor:
    """Soft targets beside the true ones.

    ``weight * T^2 * KL(teacher || student, both at T) + (1 - weight) * cross-entropy``, averaged
    over the batch; outputs and teacher are logits of one shape, (N, C) or (N, T, V). T^2 keeps
    the gradient's scale where T changes. Places whose target is -100 count in neither part; where
    none counts the loss is 0.

    Raises :class:`ArgumentError` for shapes that do not fit, targets that are no indices, a
    temperature that is not positive and a weight outside [0, 1].
    """
    check_softness(weight, temperature)
    if outputs.shape != teacher.shape or outputs.shape[:-1] != targets.shape:
        # by rank: sizes that happen to agree would be read as other rows, or broadcast
        raise ArgumentError(
            f"outputs of shape {tuple(outputs.shape)}, teacher {tuple(teacher.shape)} and targets "
            f"{tuple(targets.shape)} do not fit: give (N, C) or (N, T, V) logits twice, with (N,) "
            "or (N, T) class indices"
        )
    if targets.is_floating_point():
        raise ArgumentError(
            f"targets are {targets.dtype}, and soft targets stand beside class indices; give "
            "loss=, a function of outputs, targets and the teacher's outputs"
        )
    classes = outputs.shape[-1]
    flat, wanted = outputs.reshape(-1, classes), teacher.reshape(-1, classes)
    labels = targets.reshape(-1)
    counted = labels != _IGNORED
    if not bool(counted.all()):
        flat, wanted, labels = flat[counted], wanted[counted], labels[counted]
        if not len(labels):
            return outputs.sum() * 0
    soft = F.kl_div(
        F.log_softmax(flat / temperature, dim=1),
        F.log_softmax(wanted / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    hard = F.cross_entropy(flat, labels)
    return weight * temperature**2 * soft + (1 - weight) * hard


def check_softness(weight: float, temperature: float) -> None:
    """Raise :class:`ArgumentError` for a weight outside [0, 1], a temperature that is not positive
    or not finite.
    """
    if not 0 <= weight <= 1:
        raise ArgumentError(f"weight={weight} is outside [0, 1] (the teacher's part)")
    if not 0 < temperature < float("inf"):
        raise ArgumentError(f"temperature={temperature} must be positive and finite")


def hint(
    student: Tensor, teacher: Tensor, regressor: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """``||teacher - r(student)||^2 / 2``, averaged over the batch.

    Args:
        student, teacher: (N, ...), a layer of each.
        regressor: r, to the teacher's shape: a layer that is trained beside the student; None
            where the shapes are the same.

    Raises :class:`ArgumentError` for different shapes.
    """
    guided = student if regressor is None else regressor(student)
    if guided.shape != teacher.shape:
        raise ArgumentError(
            f"student has shape {tuple(guided.shape)}, teacher {tuple(teacher.shape)}; give a "
            "regressor, such as nn.Conv2d(student channels, teacher channels, 1)"
        )
    return (guided - teacher).square().sum() / (2 * max(1, len(teacher)))


def attention(features: Tensor) -> Tensor:
    """Where a layer looks: (N, C, H, W) -> (N, H W), mean of squares over channels, of norm 1."""
    if features.ndim != 4:
        raise ArgumentError(
            f"features has shape {tuple(features.shape)}; attention maps are of (N, C, H, W)"
        )
    return F.normalize(features.square().mean(1).flatten(1))


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of two layers' :func:`attention`; channels may differ.

    Args:
        student, teacher: (N, C, H, W) with the same N, H, W.

    Raises :class:`ArgumentError` for other shapes.
    """
    if student.shape[:1] + student.shape[2:] != teacher.shape[:1] + teacher.shape[2:]:
        raise ArgumentError(
            f"student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}; only the "
            "channels may differ"
        )
    return (attention(student) - attention(teacher)).square().mean()


class Features:
    """The outputs of chosen layers, as of the last forward pass, with their gradients.

    Use it as a context: the hooks go at its end. ``features["layer1"]`` is an output::

        with Features(student, "layer1") as mine, Features(teacher, "layer1") as wanted:
            def loss(outputs, targets, soft):
                near = attention_transfer(mine["layer1"], wanted["layer1"])
                return soft_targets(outputs, targets, soft) + 1000 * near
            train(student, data, config, loss=loss, teacher=teacher)

    Args:
        model: any.
        layers: patterns of module names (:func:`gossamer.core.names.select`).

    Raises :class:`ArgumentError` for a pattern that matches nothing, and on reading a layer that
    has not run.
    """

    def __init__(self, model: nn.Module, layers: str | Iterable[str]) -> None:
        modules = names.modules(model)
        self._chosen = {n: modules[n] for n in names.select(modules, layers)}
        self._seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self._chosen.items():

            def keep(_: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                self._seen[name] = output

            self._handles.append(module.register_forward_hook(keep))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._seen:
            raise ArgumentError(
                f"layer {name!r} has no output; chosen are {', '.join(self._chosen)}, and the "
                "model must have run inside the context"
            )
        return self._seen[name]
