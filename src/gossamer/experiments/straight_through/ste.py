"""The theory of straight-through estimators, measured: closed forms, the landscape, figure 1.

Yin et al., ICLR 2019, arXiv 1903.05662, sections 2 and 3. The network has m = 4 hidden units and
n = 8 inputs throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.analysis import canvas, ste, ste_sampling
from gossamer.experiments import Claim, Context, experiment

__all__ = ["closed_forms", "figure_1", "landscape"]

PAGE = "straight-through"
V_STAR = torch.tensor([1.0, -0.5, 0.8, -0.3], dtype=torch.float64)
INPUTS = 8
NAMES = ("loss", "gradient_v", "gradient_w", *ste.ESTIMATORS)


def _unit(size: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(size, dtype=torch.float64, generator=generator)
    return x / x.norm()


def point(theta: float, norm: float, generator: torch.Generator) -> tuple[Tensor, ...]:
    """(v, w, v*, w*) with w of the given norm at the angle theta to w*, v near 1.5 v*."""
    w_star, other = _unit(INPUTS, generator), _unit(INPUTS, generator)
    other = other - (other @ w_star) * w_star
    w = norm * (math.cos(theta) * w_star + math.sin(theta) * other / other.norm())
    v = 1.5 * V_STAR + 0.3 * torch.randn(4, dtype=torch.float64, generator=generator)
    return v, w, V_STAR, w_star


def exact(at: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The closed forms at a point, under the names of ``ste_sampling.monte_carlo``."""
    v, w, v_star, w_star = at
    return {
        "loss": ste.loss(*at),
        "gradient_v": ste.gradient_v(*at),
        "gradient_w": ste.gradient_w(*at),
        **{e: ste.coarse_gradient(e, v, w, v_star, w_star) for e in ste.ESTIMATORS},
    }


def deviations(seed: int, samples: int) -> dict[str, Any]:
    """Monte Carlo against the closed forms at three angles, relative to their norms."""
    generator = torch.Generator().manual_seed(seed)
    rows, worst = [], 0.0
    for theta, norm in ((0.6, 0.5), (1.5, 0.7), (2.5, 0.5)):
        at = point(theta, norm, generator)
        closed = exact(at)
        found = ste_sampling.monte_carlo(*at, samples=samples, generator=generator)
        for name in ste.ESTIMATORS:
            direct = closed[name] @ closed["gradient_w"]
            worst = max(worst, abs(float(direct - ste.inner_product(name, *at))))
        far = {n: float((found[n] - closed[n]).norm() / closed[n].norm()) for n in NAMES}
        rows.append({"theta": theta, "norm": norm, "deviation": far})
    return {"seed": seed, "points": rows, "inner_product": worst}


def identities(seed: int, points: int) -> float:
    """Largest deviation of the inner-product identities over random points."""
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for _ in range(points):
        theta = float(torch.rand((), generator=generator)) * math.pi
        at = point(theta, 0.1 + 2 * float(torch.rand((), generator=generator)), generator)
        slope = ste.gradient_w(*at)
        for name in ste.ESTIMATORS:
            direct = ste.coarse_gradient(name, *at) @ slope
            worst = max(worst, abs(float(direct - ste.inner_product(name, *at))))
    return worst


def _judge_closed_forms(raw: Mapping[str, Any]) -> list[Claim]:
    rows = raw["runs"]
    far = {n: max(p["deviation"][n] for r in rows for p in r["points"]) for n in NAMES}
    worst = max(*raw["identities"], *(r["inner_product"] for r in rows))
    what = {"loss": "f", "gradient_v": "df/dv", "gradient_w": "df/dw"}
    claims = [
        Claim(
            f"{PAGE}.1",
            f"{what.get(n, f'coarse gradient, {n}')}: Monte Carlo, deviation over the norm",
            value,
            "<=",
            0.01,
        )
        for n, value in far.items()
    ]
    return [*claims, Claim(f"{PAGE}.1", "inner-product identities, deviation", worst, "<=", 1e-10)]


@experiment("ste-closed-forms", seeds=(0,), judge=_judge_closed_forms)
def closed_forms(context: Context) -> dict[str, Any]:
    """Straight-through 1: Monte Carlo against loss, gradients and coarse gradients; identities."""
    samples, points = (20_000, 20) if context.quick else (4_000_000, 500)
    return {
        "samples": samples,
        "identities": context.map(identities, [(seed, points) for seed in context.seeds]),
        "runs": context.map(deviations, [(seed, samples) for seed in context.seeds]),
    }


RATE = 0.01


def descent(estimator: str, seed: int, steps: int) -> dict[str, Any]:
    """Algorithm 1 from near the spurious minimum: f on the way and where it ends."""
    generator = torch.Generator().manual_seed(seed)
    w_star = _unit(INPUTS, generator)
    v = ste.spurious_minimum(V_STAR)
    v = v + 0.01 * torch.randn(4, dtype=torch.float64, generator=generator)
    w = -w_star + 0.01 * torch.randn(INPUTS, dtype=torch.float64, generator=generator)
    seen, v, w = ste.descend(estimator, v, w, V_STAR, w_star, rate=RATE, steps=steps)
    rise, at = seen.diff().max(0)
    # the highest of each window: jumps last for a few steps only
    window = max(1, steps // 2000)
    shown = [(i, float(seen[i : i + window].max())) for i in range(0, steps + 1, window)]
    return {
        "estimator": estimator,
        "seed": seed,
        "start": float(seen[0]),
        "end": float(seen[-1]),
        "theta_end": float(ste.angle(w, w_star)),
        "largest_rise": float(rise),
        "at_step": int(at) + 1,
        "curve": shown,
    }


def surface(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Theta, the place between the spurious v (0) and v* (1), and f over both."""
    spurious = ste.spurious_minimum(V_STAR)
    w_star = torch.tensor([1.0, 0.0], dtype=torch.float64)
    thetas = torch.linspace(0, math.pi, size, dtype=torch.float64)
    places = torch.linspace(-0.5, 1.5, size, dtype=torch.float64)
    f = torch.empty(size, size, dtype=torch.float64)
    for i, place in enumerate(places):
        v = spurious + place * (V_STAR - spurious)
        for k, theta in enumerate(thetas):
            f[i, k] = ste.loss(v, torch.stack([theta.cos(), theta.sin()]), V_STAR, w_star)
    return thetas, places, f


def draw_landscape(rows: list[dict[str, Any]], path: Path, size: int) -> Path:
    """f by step for the three estimators, and f over theta and v."""
    figure = canvas(11, 4.2)
    left, right = figure.subplots(1, 2)
    styles = dict(zip(ste.ESTIMATORS, ("-", "--", ":"), strict=True))
    for row in rows:
        steps, seen = zip(*row["curve"], strict=True)
        left.plot(steps, seen, styles[row["estimator"]], label=row["estimator"])
    left.set(xlabel="step", ylabel="population loss f", title="from near the spurious minimum")
    left.legend()
    thetas, places, f = surface(size)
    drawn = right.contourf(thetas.numpy(), places.numpy(), f.numpy(), 24)
    figure.colorbar(drawn, ax=right, label="f")
    right.plot([math.pi], [0], "wx", markersize=9, markeredgewidth=2, clip_on=False)
    right.plot([0], [1], "w*", markersize=12, clip_on=False)
    right.set(
        xlabel="theta, radians",
        ylabel="v: 0 the spurious one, 1 the teacher's",
        title="x spurious minimum, * global minimum",
    )
    figure.savefig(path)
    return path


def _judge_landscape(raw: Mapping[str, Any]) -> list[Claim]:
    def rises(estimator: str) -> list[float]:
        return [r["largest_rise"] for r in raw["runs"] if r["estimator"] == estimator]

    page, what = f"{PAGE}.2", "largest rise of f in a step"
    return [
        Claim(page, f"relu: {what}", max(rises("relu")), "<=", 1e-6),
        Claim(page, f"identity: {what}", min(rises("identity")), ">=", 0.1),
        Claim(page, f"clipped: {what} (not on the page)", max(rises("clipped")), "<=", 1e-6),
    ]


@experiment("ste-landscape", seeds=(0,), judge=_judge_landscape)
def landscape(context: Context) -> dict[str, Any]:
    """Straight-through 2: near the spurious minimum the identity estimator's loss jumps."""
    steps = 2_000 if context.quick else 20_000
    jobs = [(e, seed, steps) for e in ste.ESTIMATORS for seed in context.seeds]
    rows = context.map(descent, jobs)
    path = context.work / "ste-landscape.svg"
    drawn = draw_landscape(
        [r for r in rows if r["seed"] == context.seeds[0]], path, 15 if context.quick else 61
    )
    return {
        "runs": rows, "rate": RATE, "norm_at_minimum": float(ste.identity_norm(V_STAR)),
        "picture": drawn.name,
    }  # fmt: skip


SAMPLES = (10, 100, 1_000, 10_000)
LONGEST = 1.5  # the population loss falls up to 2 sqrt(2 pi) / ||v*||^2 = 2.5


def line(seed: int, samples: int, points: int) -> dict[str, Any]:
    """The empirical loss along one coarse (ReLU) step, both from the same samples.

    ``rises``: the sum of its rises over the sum of all its changes. ``jump``: the largest change
    between neighbouring step sizes over its range.
    """
    generator = torch.Generator().manual_seed(seed)
    w_star, w = _unit(INPUTS, generator), _unit(INPUTS, generator)
    z = torch.randn(samples, 4, INPUTS, dtype=torch.float64, generator=generator)
    g = ste_sampling.sample_coarse_gradient("relu", V_STAR, w, V_STAR, w_star, z).mean(0)
    expected = ste.coarse_gradient("relu", V_STAR, w, V_STAR, w_star)
    rates = torch.linspace(0, LONGEST, points, dtype=torch.float64)
    curve = torch.stack(
        [ste_sampling.sample_loss(V_STAR, w - eta * g, V_STAR, w_star, z).mean() for eta in rates]
    )
    population = torch.stack(
        [ste.loss(V_STAR, w - eta * expected, V_STAR, w_star) for eta in rates]
    )
    change = curve.diff()
    travel = float(change.abs().sum())
    return {
        "seed": seed,
        "samples": samples,
        "rises": float(change.clamp(min=0).sum()) / travel if travel else 0.0,
        "jump": float(change.abs().max() / (curve.max() - curve.min())) if travel else 1.0,
        "population_rise": float(population.diff().max()),
        "rates": rates.tolist(),
        "curve": curve.tolist(),
        "population": population.tolist(),
    }


def draw_lines(rows: list[dict[str, Any]], path: Path) -> Path:
    """A panel a sample size: the empirical losses, and the population's dashed."""
    sizes = sorted({r["samples"] for r in rows})
    figure = canvas(3.2 * len(sizes), 3.4)
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for i, row in enumerate([r for r in rows if r["samples"] == size][:3]):
            axes.plot(row["rates"], row["curve"], f"C{i}", linewidth=1)
            axes.plot(row["rates"], row["population"], f"C{i}--", linewidth=0.7)
        axes.set(title=f"{size:,} samples", xlabel="step size")
    figure.axes[0].set_ylabel("loss (dashed: population)")
    figure.savefig(path)
    return path


def _judge_figure_1(raw: Mapping[str, Any]) -> list[Claim]:
    sizes, means, page = raw["samples"], raw["means"], f"{PAGE}.3"
    what = {
        "rises": "monotone: share of rises, mean over draws",
        "jump": "smooth: largest jump over the range, mean over draws",
    }
    claims = [
        Claim(page, f"{what[key]}, {b:,} less {a:,} samples", y - x, "<=", 0.0)
        for key, found in means.items()
        for (a, x), (b, y) in pairwise(zip(sizes, found, strict=True))
    ]
    first, last = sizes[0], sizes[-1]
    claims += [
        Claim(
            page, f"{what[key]}, {last:,} over {first:,} samples", found[-1] / found[0], "<=", 0.5
        )
        for key, found in means.items()
    ]
    return [
        *claims,
        Claim(page, f"{what['rises']}, {last:,} samples", means["rises"][-1], "<=", 0.05),
        Claim(
            page,
            "population loss along the expected step: largest rise",
            max(r["population_rise"] for r in raw["runs"]),
            "<=",
            1e-12,
        ),
    ]


@experiment("ste-figure-1", seeds=tuple(range(10)), judge=_judge_figure_1)
def figure_1(context: Context) -> dict[str, Any]:
    """Straight-through 3: the empirical loss along one coarse step against the sample size."""
    points = 21 if context.quick else 101
    sizes = SAMPLES[:3] if context.quick else SAMPLES
    rows = context.map(line, [(seed, n, points) for n in sizes for seed in context.seeds])
    drawn = draw_lines(rows, context.work / "ste-figure-1.svg")
    means = {
        key: [sum(r[key] for r in rows if r["samples"] == n) / len(context.seeds) for n in sizes]
        for key in ("rises", "jump")
    }
    figures = [{k: v for k, v in r.items() if not isinstance(v, list)} for r in rows]
    return {"samples": list(sizes), "means": means, "picture": drawn.name, "runs": figures}
