"""Loss-aware weights with quantized gradients: a linear model whose dimension grows.

Hou, Zhang, Kwok, *Analysis of Quantized Models*, ICLR 2019, section 4.1: w* ~ U[-.5, .5]^d,
x ~ U[-.5, .5]^d, y ~ N(x w*, .2^2), batch 64, squared error, LAB weights, RMSProp .03 / sqrt t.
Here the latent weights stay in [-.5, .5], the set that w* is from (the bounds need a bounded one);
beta = .9; and the expected loss is computed, not sampled: ||w - w*||^2 / 12 + .04.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from gossamer.distribute import SQm
from gossamer.distribute.codecs.codec import GradCodec
from gossamer.distribute.exchange.server import LossAwareLoop, Rule
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.panels import draw
from gossamer.quantize.loss_aware import binary

__all__ = ["linear_dimension", "run"]

PAGE = "loss-aware"
DIMENSIONS = (64, 128, 256, 512, 1024, 2048, 4096)
GRADIENTS: dict[str, GradCodec | None] = {"FP": None, "SQ2": SQm(2), "SQ3": SQm(3)}
STEPS = 3000
PART = 0.25  # of the way from the start's loss to the best one's that may be left
NOISE = 0.2


def best_loss(target: torch.Tensor) -> float:
    """The least expected loss of weights with one magnitude: alpha = mean |w*|."""
    size = target.abs().double()
    return float((size - size.mean()).square().sum()) / 12 + NOISE**2


def run(d: int, gradients: str, seed: int, steps: int) -> dict[str, Any]:
    """One descent: the expected loss of the quantized weights at every step, put together.

    ``iterations``: until the loss is within :data:`PART` of the way from the loss of zero weights
    to :func:`best_loss`. ``final``: mean of the last tenth. ``average``: mean of all.
    """
    g = torch.Generator().manual_seed(1_000_003 * seed + d)
    target = torch.rand(d, generator=g) - 0.5
    loop = LossAwareLoop(
        {"w": 1e-3 * torch.randn(d, generator=g)},
        codec=GRADIENTS[gradients],
        coded=["w"],
        projections={"w": binary},
        rule=Rule(beta=0.9, momentum=None, eps=1e-8, clip=0.5),
        workers=1,
        seed=seed,
    )
    losses = torch.empty(steps, dtype=torch.float64)
    for t in range(steps):
        x = torch.rand(64, d, generator=g) - 0.5
        y = x @ target + NOISE * torch.randn(64, generator=g)
        w = loop.weights["w"]
        loop.step([{"w": x.T @ (x @ w - y) * (2 / 64)}], 0.03 / math.sqrt(t + 1))
        off = (loop.weights["w"] - target).double()
        losses[t] = off.square().sum() / 12 + NOISE**2
    start, best = float(target.double().square().sum()) / 12 + NOISE**2, best_loss(target)
    within = (losses <= best + PART * (start - best)).nonzero()
    return {
        "d": d,
        "gradients": gradients,
        "seed": seed,
        "iterations": int(within[0]) + 1 if len(within) else math.inf,
        "final": float(losses[-max(1, steps // 10) :].mean()),
        "average": float(losses.mean()),
        "best": best,
        "losses": losses[:: max(1, steps // 200)].tolist(),
    }


def _ratios(means: list[float]) -> float:
    """The smallest ratio of one to the one before."""
    return min(b / a for a, b in pairwise(means))


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    def means(key: str, name: str) -> list[float]:
        return [found["mean"] for found in raw["table"][key][name].values()]

    claims = [
        Claim(
            f"{PAGE}.5",
            f"{name}: {what}, least ratio of neighbouring d, mean over seeds",
            _ratios(means(key, name)),
            ">",
            1.0,
        )
        for name in GRADIENTS
        for key, what in (("final", "final loss"), ("iterations", "iterations to the threshold"))
    ]
    slow, exact = means("iterations", "SQ2"), means("iterations", "FP")
    what = "SQ2 over FP: iterations to the threshold, least ratio over d"
    least = min(a / b for a, b in zip(slow, exact, strict=True))
    return [*claims, Claim(f"{PAGE}.5", what, least, ">", 1.0)]


@experiment("laq-linear-dimension", seeds=range(5), judge=_judge)
def linear_dimension(context: Context) -> dict[str, Any]:
    """Loss-aware gradients 5: LAB on a linear model against its dimension, FP, SQ2 and SQ3."""
    sizes = DIMENSIONS[:3] if context.quick else DIMENSIONS
    steps = 120 if context.quick else STEPS
    jobs = [(d, g, s, steps) for d in sizes for g in GRADIENTS for s in context.seeds]
    rows = context.map(run, jobs)
    figures = {
        key: {
            name: {
                d: [r[key] for r in rows if (r["gradients"], r["d"]) == (name, d)] for d in sizes
            }
            for name in GRADIENTS
        }
        for key in ("final", "iterations", "average")
    }
    titles = {
        "final loss": figures["final"],
        "iterations to a quarter of the way": figures["iterations"],
        "average loss": figures["average"],
    }
    drawn = draw(titles, context.work / "linear-dimension.svg", xlabel="d", ylabel="")
    table = {
        key: {n: {str(d): spread(v) for d, v in by.items()} for n, by in lines.items()}
        for key, lines in figures.items()
    }
    return {
        "steps": steps, "threshold": PART, "table": table, "picture": drawn.name, "runs": rows,
    }  # fmt: skip
