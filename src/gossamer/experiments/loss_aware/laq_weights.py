"""Loss-aware weights and convergence: dimension, and the bits of a weight.

Hou, Zhang, Kwok, *Analysis of Quantized Models*, ICLR 2019, the weight half of its figures: exact
gradients, taken at the quantized weight and applied to the float one by RMSProp, whose second
moment is the curvature of the projection (:mod:`gossamer.quantize.loss_aware`).

- A linear model: x and w* ~ U[-.5, .5], y ~ N(x^T w*, .2^2), batches of 64, binary weights (LAB),
  learning rate .03 / sqrt(t). Regret is against w*, and expected over x and y, which for this
  model is ||w_q - w*||^2 / 24 a step: exact where a batch's loss is not.
- A perceptron with one hidden layer on MNIST, all of its weights at 1 to 4 bits (LAB, LAQ) and
  float, learning rate .1 / sqrt(t), weights clipped to [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gossamer import nets
from gossamer.analysis import canvas
from gossamer.analysis.regret import spacing
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.lenets import mnist
from gossamer.quantize import LossAware, Projected, loss_aware, normalize_

__all__ = ["dimension", "weight_bits"]

PAGE = "loss-aware"
DIMENSIONS = (64, 128, 256, 512, 1024, 2048)
FINE = (2, 3, 4)  # bits of the linear model's second panel, at one dimension
AT = 256
BATCH = 64
EVERY = 25  # steps between two points of a curve
PART = 0.6  # of the regret at the start: the threshold of speed, above every floor


def attached(model: nn.Module, bits: int | None, rate: float) -> tuple[Any, Any]:
    """Optimizer and schedule, with weights of so many bits (1: LAB, more: LAQ; None: float).

    All weights stay in [-1, 1], float ones too.
    """
    optimizer = torch.optim.RMSprop(model.parameters(), rate)
    if bits is None:
        Projected(lambda w: w, clip=1.0, ends=True).attach(model, optimizer)
    else:
        rule = "lab" if bits == 1 else partial(loss_aware.linear, bits=bits)
        LossAware(rule, beta=None, clip=1.0, ends=True).attach(model, optimizer)
    slower = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) ** -0.5)
    return optimizer, slower


def linear_run(d: int, bits: int | None, steps: int, seed: int) -> dict[str, Any]:
    """Average expected regret by step, the mean regret of the last tenth, and the speed.

    ``reached``: the first step whose regret is at most ``PART`` of that at the start.
    """
    g = torch.Generator().manual_seed(1000 * seed + d)
    target = torch.rand(d, generator=g) - 0.5
    model = nn.Linear(d, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(0.1 * (torch.rand(1, d, generator=g) - 0.5))
    optimizer, slower = attached(model, bits, 0.03)
    seen = []
    for _ in range(steps):
        x = torch.rand(BATCH, d, generator=g) - 0.5
        y = x @ target + 0.2 * torch.randn(BATCH, generator=g)
        optimizer.zero_grad()
        weight = model.weight
        seen.append(float((weight.detach()[0] - target).square().sum()) / 24)
        ((F.linear(x, weight)[:, 0] - y).square().mean() / 2).backward()
        optimizer.step()
        slower.step()
    regret = torch.tensor(seen, dtype=torch.float64)
    average = regret.cumsum(0) / torch.arange(1, steps + 1)
    low = torch.nonzero(regret <= PART * regret[0])
    return {
        "d": d,
        "bits": bits,
        "seed": seed,
        "average_regret": average[EVERY - 1 :: EVERY].tolist(),
        "final": float(regret[-max(1, steps // 10) :].mean()),
        "reached": int(low[0]) if len(low) else steps,
    }


def draw_linear(rows: list[dict[str, Any]], path: Path) -> Path:
    """Average regret by step: by dimension (LAB), and by bits at one dimension."""
    figure = canvas(11, 4.2)
    left, right = figure.subplots(1, 2)
    for axes, key, mine in (
        (left, "d", [r for r in rows if r["bits"] == 1]),
        (right, "bits", [r for r in rows if r["d"] == AT]),
    ):
        for value in dict.fromkeys(r[key] for r in mine):
            curves = torch.tensor([r["average_regret"] for r in mine if r[key] == value])
            steps = [EVERY * (i + 1) for i in range(curves.shape[1])]
            axes.loglog(steps, curves.mean(0).tolist(), label=f"{key} = {value or 'float'}")
        axes.set(xlabel="step T", ylabel="average regret R(T)/T")
        axes.legend()
    left.set_title("binary weights (LAB)")
    right.set_title(f"d = {AT}")
    figure.savefig(path)
    return path


def _judge_dimension(raw: Mapping[str, Any]) -> list[Claim]:
    binary, floats = ([*raw[kind].values()] for kind in ("binary", "float"))
    what = "weights, linear model"
    return [
        Claim(f"{PAGE}.5", f"{what}, LAB: least growth of the final regret from d to 2d, times",
              _least_growth(binary, "final"), ">", 1.0),
        Claim(f"{PAGE}.5", f"{what}, LAB: least growth of the steps to {PART:g} of the regret at "
              "the start from d to 2d, times", _least_growth(binary, "reached"), ">", 1.0),
        Claim(f"{PAGE}.5", f"{what}, LAB: least growth of the average regret from d to 2d, times",
              _least_growth(binary, "average_regret"), ">", 1.0),
        Claim(f"{PAGE}.5", f"{what}, float: least growth of the average regret from d to 2d, "
              "times", _least_growth(floats, "average_regret"), ">", 1.0),
        Claim(f"{PAGE}.5", f"{what}, d = {AT}: final regret of 1, 2, 3, 4 bits and float, least "
              "fall from one to the next, times",
              _least_growth([*raw["bits"].values()][::-1], "final"), ">", 1.0),
    ]  # fmt: skip


def _least_growth(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    means = [row[key]["mean"] for row in rows]
    return min(b / a for a, b in pairwise(means))


@experiment("laq-dimension", judge=_judge_dimension)
def dimension(context: Context) -> dict[str, Any]:
    """Loss-aware 5, weight half: regret of a linear model against dimension and weight spacing."""
    steps = 200 if context.quick else 4000
    sizes = (64, 128, AT) if context.quick else DIMENSIONS
    settings = [(d, bits) for d in sizes for bits in (1, None)] + [(AT, bits) for bits in FINE]
    rows = context.map(linear_run, [(d, b, steps, s) for d, b in settings for s in context.seeds])
    path = draw_linear(rows, context.work / "laq-dimension.svg")

    def figures(d: int, bits: int | None) -> dict[str, dict[str, Any]]:
        mine = [r for r in rows if (r["d"], r["bits"]) == (d, bits)]
        last = [r["average_regret"][-1] for r in mine]
        return {
            "average_regret": spread(last),
            **{key: spread([r[key] for r in mine]) for key in ("final", "reached")},
        }

    bits = (1, *FINE, None)
    return {
        "binary": {str(d): figures(d, 1) for d in sizes},
        "float": {str(d): figures(d, None) for d in sizes},
        "bits": {
            str(b or "float"): {"delta_w": spacing(b) if b and b > 1 else None, **figures(AT, b)}
            for b in bits
        },
        "steps": steps,
        "picture": path.name,
        "runs": rows,
    }


HIDDEN = (32, 64, 128)
BITS = (1, 2, 3, 4, None)


def perceptron_run(hidden: int, bits: int | None, steps: int, seed: int) -> dict[str, Any]:
    """Loss of the batches, means of ``EVERY``, and of the last tenth of the steps."""
    data = mnist(False).train
    model = nets.build(f"mlp-784-{hidden}-10", seed=seed)
    normalize_(model, torch.zeros(2, 1, 28, 28))
    optimizer, slower = attached(model, bits, 0.1)
    g = torch.Generator().manual_seed(seed)
    seen: list[float] = []
    for _ in range(steps):
        x, y = data.batch(torch.randint(len(data), (BATCH,), generator=g))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        slower.step()
        seen.append(loss.item())
    curve = [sum(seen[i : i + EVERY]) / EVERY for i in range(0, steps - EVERY + 1, EVERY)]
    tail = seen[-max(1, steps // 10) :]
    return {
        "hidden": hidden,
        "bits": bits,
        "seed": seed,
        "curve": curve,
        "final": sum(tail) / len(tail),
    }


def draw_perceptron(rows: list[dict[str, Any]], path: Path) -> Path:
    """Training loss by step, a panel for each width, and the final loss by bits."""
    widths = tuple(dict.fromkeys(r["hidden"] for r in rows))
    figure = canvas(4.2 * (len(widths) + 1), 4)
    *panels, last = figure.subplots(1, len(widths) + 1)
    for axes, hidden in zip(panels, widths, strict=True):
        finals = []
        for bits in BITS:
            mine = [r for r in rows if (r["hidden"], r["bits"]) == (hidden, bits)]
            curve = torch.tensor([r["curve"] for r in mine]).mean(0).tolist()
            steps = [EVERY * (i + 1) for i in range(len(curve))]
            axes.plot(steps, curve, label="float" if bits is None else f"{bits} bits")
            finals.append(spread([r["final"] for r in mine])["mean"])
        axes.set(xlabel="step", ylabel="training loss", yscale="log", title=f"{hidden} hidden")
        axes.legend()
        last.plot(BITS[:-1], finals[:-1], marker="o", label=f"{hidden} hidden")
        last.axhline(finals[-1], linestyle="--", color=last.lines[-1].get_color())
    last.set(xlabel="bits of a weight", ylabel="final training loss (dashed: float)",
             xticks=BITS[:-1])  # fmt: skip
    last.legend()
    figure.savefig(path)
    return path


def _judge_bits(raw: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for hidden, found in raw["final"].items():
        means = {bits: figure["mean"] for bits, figure in found.items()}
        what = f"weights, perceptron of {hidden}"
        claims += [
            Claim(f"{PAGE}.5", f"{what}: {a} bits' final training loss over {b} bits'",
                  means[str(a)] / means[str(b)], ">", 1.0)
            for a, b in pairwise(BITS[:-1])
        ]  # fmt: skip
        lost = means["1"] - means["float"]
        claims += [
            Claim(f"{PAGE}.5", f"{what}: {bits} bits' loss over float's, part of 1 bit's",
                  (means[bits] - means["float"]) / lost, "<=", 0.25)
            for bits in ("3", "4")
        ]  # fmt: skip
    return claims


@experiment("laq-weight-bits", judge=_judge_bits)
def weight_bits(context: Context) -> dict[str, Any]:
    """Loss-aware 5, weight half: a perceptron on MNIST with weights of 1 to 4 bits, and float."""
    steps = 60 if context.quick else 2500
    widths = HIDDEN[:1] if context.quick else HIDDEN
    jobs = [(h, bits, steps, s) for h in widths for bits in BITS for s in context.seeds]
    rows = context.map(perceptron_run, jobs)
    path = draw_perceptron(rows, context.work / "laq-weight-bits.svg")
    finals = {
        str(h): {
            str(bits or "float"): spread(
                [r["final"] for r in rows if (r["hidden"], r["bits"]) == (h, bits)]
            )
            for bits in BITS
        }
        for h in widths
    }
    return {"final": finals, "steps": steps, "picture": path.name, "runs": rows}
