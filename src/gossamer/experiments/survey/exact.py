"""Distillation: whether the gradient keeps its scale where the temperature changes.

Hinton, Vinyals and Dean (2015), section 2: the gradients of soft targets scale as 1 / T^2, so the
loss is multiplied by T^2. That holds where T is large against the logits; then the gradient is
that of the squared distance of centred logits, over the number of classes. Logits of two sizes at
random, and those of the published ResNet-20 taught by ResNet-56 on test images of CIFAR-10, which
are large: their gradient is not yet in that regime at T = 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer import datasets, nets
from gossamer.experiments import Claim, Context, experiment
from gossamer.training.distill import soft_targets

__all__ = ["gradient", "survey_exact"]

TEMPERATURES = (4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0)
_LIMIT = 1000.0
_SIZES = (1.0, 3.0)  # standard deviation of random logits
_EXAMPLES = 500


def gradient(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Of the soft targets' loss alone, by the student's logits (N, C)."""
    logits = student.detach().double().requires_grad_()
    targets = torch.zeros(len(logits), dtype=torch.int64)
    loss = soft_targets(logits, targets, teacher.double(), temperature=temperature, weight=1.0)
    (found,) = torch.autograd.grad(loss, [logits])
    return found


def _row(student: Tensor, teacher: Tensor) -> dict[str, Any]:
    """Norms of the gradient by temperature, and how near it comes to its limit."""
    norms = [float(gradient(student, teacher, t).norm()) for t in TEMPERATURES]
    apart = (student - teacher).double()
    limit = (apart - apart.mean(1, keepdim=True)) / apart.numel()
    off = gradient(student, teacher, _LIMIT) - limit
    return {
        "norms": norms,
        "spread": max(norms) / min(norms) - 1,
        "without_square": (norms[0] / 4**2) / (norms[-1] / 20**2),
        "off_limit": float(off.norm() / limit.norm()),
        "deviation": float(teacher.std(1).mean()),
    }


def _random(size: float, seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return _row(*(size * torch.randn(_EXAMPLES, 10, generator=g) for _ in range(2)))


@torch.no_grad()
def _logits(quick: bool) -> list[Tensor]:
    images, _ = datasets.load("cifar10").test.batch(slice(0, 20 if quick else _EXAMPLES))
    return [nets.build(n, pretrained=True).eval()(images) for n in ("resnet-20", "resnet-56")]


def _published(quick: bool) -> dict[str, Any]:
    return _row(*_logits(quick))


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    what = "gradient of soft targets, T from 4 to 20: largest norm over the smallest, less 1"
    rows = {f"logits of deviation {size}": raw["random"][size] for size in raw["random"]}
    rows["logits of ResNet-20 and ResNet-56"] = raw["published"]
    return [
        *(Claim("survey.3", f"{what}; {n}", r["spread"], "<=", 0.1) for n, r in rows.items()),
        Claim(
            "survey.3",
            "gradient at T = 1000 from its limit, a part of it, the most",
            max(row["off_limit"] for row in rows.values()),
            "<=",
            0.05,
        ),
    ]


@experiment("survey-exact", seeds=(0,), judge=_judge)
def survey_exact(context: Context) -> dict[str, Any]:
    """Survey 3: the scale of distillation's gradient, by temperature."""
    rows = context.map(_random, [(size, context.seeds[0]) for size in _SIZES])
    (published,) = context.map(_published, [(context.quick,)])
    return {
        "temperatures": TEMPERATURES,
        "random": {f"{size:g}": row for size, row in zip(_SIZES, rows, strict=True)},
        "published": published,
    }
