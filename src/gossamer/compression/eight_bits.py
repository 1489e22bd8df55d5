"""A finished network in its fastest plan, eight bits allowed, beside the dense one in eight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from gossamer.compression.parts import examples
from gossamer.core import nest
from gossamer.core.timing import Paired
from gossamer.datasets import Dataset
from gossamer.runtime.engines import ENGINES, Subject, installed
from gossamer.runtime.export import batches_of
from gossamer.runtime.plan.door import compile_network
from gossamer.runtime.plan.plan import Plan
from gossamer.training import evaluate
from gossamer.training.tasks import Task

__all__ = ["Planned", "timed"]

_CALIBRATION = 256  # examples of the training split, whose labels are not read


class Planned(nn.Module):
    """A plan where a network is asked for, to be evaluated."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As the network the plan was made of."""
        return self.plan(*inputs, **named)


def timed(
    dense: nn.Module,
    decoded: nn.Module,
    data: Dataset,
    task: Task | None,
    pairs: Callable[[Callable[[], Any], Callable[[], Any]], Paired],
) -> tuple[str, Paired, dict[str, Any]]:
    """What ran, the dense network in eight bits paired with the plan, and what the plan loses.

    The dense network runs in onnxruntime, or where that is not installed as an int8 plan. The
    file's runs as whatever is fastest for it here; a small one in float32, it may be.

    Args:
        dense: before.
        decoded: from the file.
        data: gives the example, calibration inputs, and the test split.
        task: what a score is; None: by the targets.
        pairs: times two calls.

    Returns the engines' names, the times, and ``eight_bits``: ``check`` and the plan's ``score`` on
    the test split with ``of`` examples. Raises :class:`ArgumentError` where a network has no
    eight-bit form.
    """
    example = data.test.batch(slice(0, 1))[0]
    seen = examples(data.train, _CALIBRATION, torch.Generator().manual_seed(0))
    subject = Subject("dense", dense, example, calibration=seen)
    other = "onnxruntime-int8" if installed("onnxruntime-int8") else "gossamer-int8"
    before = ENGINES[other].prepare(subject, subject.rows(1), 1).run
    calibration = list(batches_of(seen, example, subject.tensors))
    plan = compile_network(decoded, example, precision="int8", calibration=calibration)
    arrays = [t.numpy() for t in nest.leaves(example)]
    found = pairs(before, partial(plan.arrays, arrays, plan.batch(arrays)))
    scored = evaluate(Planned(plan), data.test, task=task)
    figures = {"check": plan.facts.check, "score": scored.score, "of": scored.total}
    runs = "a plan" if plan.facts.engine.startswith("plan") else plan.facts.engine
    name = f"{other} before, after {runs} in {plan.facts.precision}"
    return name, found, {"eight_bits": figures}
