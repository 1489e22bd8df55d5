"""Loss-aware weights with quantized gradients on MNIST: bits of the gradients, number of workers.

Hou, Zhang, Kwok, *Analysis of Quantized Models*, ICLR 2019, sections 4.2 and 4.3. Reduced: a
perceptron on MNIST for a few epochs, where the paper has CifarNet for hundreds and ResNet on
ImageNet. All layers are quantized, biases are not; RMSProp with rate / sqrt t, the rate chosen by
the average training loss with full-precision gradients and kept for the rest; N workers play in one
process, with the bits of N processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from gossamer import nets
from gossamer.analysis.regret import spacing
from gossamer.core import names
from gossamer.datasets import Dataset, Split
from gossamer.distribute import SQm
from gossamer.distribute.codecs.codec import GradCodec
from gossamer.distribute.exchange.server import LossAwareLoop, Rule
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.lenets import mnist
from gossamer.experiments.shared.panels import draw
from gossamer.quantize.loss_aware import binary, linear
from gossamer.training import evaluate

__all__ = ["Cell", "gradient_bits", "train_cell", "worker_table"]

PAGE = "loss-aware"
NET = "mlp-784-100-10"
RULE = Rule(beta=0.9, momentum=None, eps=1e-8, clip=1.0)
WEIGHTS = {"FP": None, "LAB": binary, **{f"LAQ{m}": partial(linear, bits=m) for m in (2, 3, 4)}}
RATE = 0.003  # of .1, .03, .01, .003, .001: the least average loss, which the bounds are about

GRADIENTS: dict[str, GradCodec | None] = {
    "FP": None,
    **{f"SQ{m}": SQm(m) for m in (2, 3, 4, 8)},
    **{f"SQ{m}, c=3": SQm(m, clip=3.0, scaler="sigma") for m in (2, 3, 4, 8)},
}

Cell = tuple[str, str, int, int]  # weights, gradients, workers, steps


def _losses(model: nn.Module, split: Split, index: torch.Tensor) -> tuple[torch.Tensor, Any]:
    inputs, targets = split.batch(index)
    loss = nn.functional.cross_entropy(model(inputs), targets)
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def train_cell(cell: Cell, rate: float, seed: int, data: Dataset, batch: int) -> dict[str, Any]:
    """Train one network by N workers of ``batch`` examples each: losses and accuracies."""
    weights, gradients, workers, steps = cell
    model = nets.build(NET, seed=seed)
    parameters = names.parameters(model)
    quantized = list(names.weights(model))
    project = WEIGHTS[weights]
    loop = LossAwareLoop(
        parameters,
        codec=GRADIENTS[gradients],
        coded=quantized,
        projections=dict.fromkeys(quantized, project) if project is not None else {},
        rule=RULE,
        workers=workers,
        seed=seed,
    )
    draw_ = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    losses = torch.empty(steps, dtype=torch.float64)
    for t in range(steps):
        while len(order) < workers * batch:
            order = torch.cat([order, torch.randperm(len(data.train), generator=draw_)])
        mine, order = order[: workers * batch], order[workers * batch :]
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(loop.weights[name])
        found = [_losses(model, data.train, part) for part in mine.split(batch)]
        losses[t] = torch.stack([loss for loss, _ in found]).mean()
        grads = [dict(zip(parameters, g, strict=True)) for _, g in found]
        loop.step(grads, rate / math.sqrt(t + 1))
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(loop.weights[name])
    coded = sum(parameters[n].numel() for n in quantized)
    codec = GRADIENTS[gradients]
    return {
        "weights": weights,
        "gradients": gradients,
        "workers": workers,
        "steps": steps,
        "seed": seed,
        "final_loss": float(losses[-max(1, steps // 10) :].mean()),
        "average_loss": float(losses.mean()),
        "validation": 100 * evaluate(model, data.validation).accuracy,
        "accuracy": 100 * evaluate(model, data.test).accuracy,
        "bits_a_gradient": 32.0
        if codec is None
        else 8 * sum(codec.payload_bytes(parameters[n].numel()) for n in quantized) / coded,
    }


def _job(cell: Cell, seed: int, batch: int, quick: bool) -> dict[str, Any]:
    return train_cell(cell, RATE, seed, mnist(quick), batch)


def _values(rows: list[dict[str, Any]], key: str, **where: Any) -> list[float]:
    return [r[key] for r in rows if all(r[k] == v for k, v in where.items())]


def _mean(rows: list[dict[str, Any]], key: str, **where: Any) -> float:
    return float(spread(_values(rows, key, **where))["mean"])


BITS = (2, 3, 4, 8)


def _judge_bits(raw: Mapping[str, Any]) -> list[Claim]:
    rows, page = raw["runs"], f"{PAGE}.5"
    bits = [m for m in BITS if _values(rows, "seed", gradients=f"SQ{m}")]
    # 8 bits are not told from 4
    plain = [_mean(rows, "average_loss", gradients=f"SQ{m}") for m in bits if m <= 4]
    clipped = _mean(rows, "average_loss", gradients="SQ2, c=3") / plain[0]
    least = min(a / b for a, b in pairwise(plain))
    exact = _mean(rows, "accuracy", gradients="FP")
    return [
        Claim(page, "unclipped, 2 to 4 bits: average loss, least ratio of fewer bits to more",
              least, ">", 1.0),
        Claim(page, "2 bits: average loss, clipped over unclipped", clipped, "<", 1.0),
        *(
            Claim(page, f"points lost to float gradients, {g}",
                  exact - _mean(rows, "accuracy", gradients=g), "<=", 0.5)
            for g in ("SQ4", "SQ2, c=3")
            if _values(rows, "seed", gradients=g)
        ),
    ]  # fmt: skip


@experiment("laq-gradient-bits", judge=_judge_bits)
def gradient_bits(context: Context) -> dict[str, Any]:
    """Loss-aware gradients 5: loss against Delta_g, clipped or not; LAQ3, a perceptron on MNIST."""
    workers, steps, batch = 4, 20 if context.quick else 6000, 16
    bits = BITS[:2] if context.quick else BITS
    chosen = ["FP", *(f"SQ{m}{c}" for m in bits for c in ("", ", c=3"))]
    jobs = [
        (("LAQ3", g, workers, steps), seed, batch, context.quick)
        for g in chosen
        for seed in context.seeds
    ]
    rows = context.map(_job, jobs)
    lines = {
        title: {
            label: {spacing(m): _values(rows, key, gradients=f"SQ{m}{c}") for m in bits}
            | {1 / 512: _values(rows, key, gradients="FP")}
            for label, c in (("unclipped", ""), ("c = 3", ", c=3"))
        }
        for title, key in (("average loss", "average_loss"), ("final loss", "final_loss"))
    }
    drawn = draw(
        lines, context.work / "gradient-bits.svg", xlabel="Delta_g (leftmost: float)", ylabel="loss"
    )
    return {
        "net": NET, "workers": workers, "steps": steps,
        "float_average_loss": _mean(rows, "average_loss", gradients="FP"),
        "picture": drawn.name, "runs": rows,
    }  # fmt: skip


TABLE = [("FP", "FP"), ("LAQ3", "FP"), ("LAQ3", "SQ2"), ("LAQ3", "SQ2, c=3"), ("LAQ3", "SQ3"),
         ("LAB", "SQ2, c=3")]  # fmt: skip
WORKERS = (4, 8, 16)
EPOCHS = 18


def _judge_workers(raw: Mapping[str, Any]) -> list[Claim]:
    table = raw["table"]

    def mean(gradients: str, workers: str) -> float:
        return float(table[f"LAQ3 weights, {gradients} gradients"][workers]["mean"])

    return [
        Claim(
            f"{PAGE}.5",
            f"{n} workers, LAQ3: points lost to float gradients, {g}",
            mean("FP", n) - mean(g, n),
            "<=",
            0.5,
        )
        for n in table["LAQ3 weights, FP gradients"]
        for g in ("SQ2, c=3", "SQ3")
    ]


@experiment("laq-workers", judge=_judge_workers)
def worker_table(context: Context) -> dict[str, Any]:
    """Loss-aware gradients 5: worker table, 64 examples each; reduced, MNIST perceptron."""
    counts = WORKERS[:1] if context.quick else WORKERS
    batch = 64
    steps = {n: 5 if context.quick else EPOCHS * 55_000 // (batch * n) for n in counts}
    jobs = [
        ((w, g, n, steps[n]), seed, batch, context.quick)
        for n in counts
        for w, g in TABLE
        for seed in context.seeds
    ]
    rows = context.map(_job, jobs)
    lines = {
        "test accuracy": {
            f"{w} / {g}": {n: _values(rows, "accuracy", weights=w, gradients=g, workers=n)
                           for n in counts}
            for w, g in TABLE
        }
    }  # fmt: skip
    drawn = draw(lines, context.work / "workers.svg", xlabel="workers", ylabel="%", ylog=False)
    cells = {
        f"{w} weights, {g} gradients": {
            str(n): spread(_values(rows, "accuracy", weights=w, gradients=g, workers=n))
            for n in counts
        }
        for w, g in TABLE
    }
    return {"net": NET, "table": cells, "steps": steps, "picture": drawn.name, "runs": rows}
