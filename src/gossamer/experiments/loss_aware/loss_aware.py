"""Loss-aware weights, what must be exact: projections against brute force, monotone alternation.

Hou, Yao, Kwok, ICLR 2017 (LAB); Hou, Kwok, ICLR 2018 (LAT, LAQ).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from gossamer.experiments import Claim, Context, experiment
from gossamer.quantize import loss_aware
from gossamer.quantize.loss_aware import objective

__all__ = ["exact"]

PAGE = "loss-aware"
LARGEST = 12  # weights of a brute-force search: 3^12 codes


def problem(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A Gaussian weight and a curvature spread over four orders of magnitude, double precision."""
    g = torch.Generator().manual_seed(1000 * seed + count)
    w = torch.randn(count, generator=g, dtype=torch.float64)
    return w, 10 ** (-4 * torch.rand(count, generator=g, dtype=torch.float64))


def brute(w: Tensor, d: Tensor, levels: Sequence[float]) -> float:
    """The smallest objective over all codes, each with its best scale above 0."""
    codes = torch.tensor(list(product(levels, repeat=len(w))), dtype=w.dtype)
    above, below = codes @ (d * w), codes.square() @ d
    gain = torch.where((below > 0) & (above > 0), above.square() / below, 0)
    return float((d * w.square()).sum() - gain.max())


def against_brute_force(seed: int, largest: int) -> list[dict[str, Any]]:
    """Objective over the smallest possible, minus 1, for each number of weights."""
    rows = []
    for count in range(2, largest + 1):
        w, d = problem(count, seed)
        best = brute(w, d, (-1, 0, 1))
        sides = [side for side in (w > 0, w < 0) if side.any()]
        best_two = sum(brute(w[side], d[side], (-1, 0, 1)) for side in sides)
        # against the whole, since the best objective may be 0
        whole = objective(w, d, torch.zeros_like(w))

        def off(value: Tensor, best: float, w: Tensor = w, d: Tensor = d) -> float:
            return (objective(w, d, value) - best) / whole  # noqa: B023 (called at once)

        rows.append(
            {
                "weights": count,
                "seed": seed,
                "lab": off(loss_aware.binary(w, d), brute(w, d, (-1, 1))),
                "lat": off(loss_aware.ternary(w, d, scales=1), best),
                "lat2": off(loss_aware.ternary(w, d, scales=2), best_two),
                "lat, approximate": off(loss_aware.linear(w, d, bits=2), best),
            }
        )
    return rows


RULES = {
    **{f"linear, {bits} bits": partial(loss_aware.linear, bits=bits) for bits in (2, 3, 4, 8)},
    **{f"logarithmic, {b} bits": partial(loss_aware.logarithmic, bits=b) for b in (2, 3, 4)},
}


def alternation(seed: int, count: int) -> dict[str, dict[str, Any]]:
    """Objectives after 0 to 10 alternations, and the largest rise between two, relative."""
    w, d = problem(count, seed)
    found = {}
    for name, rule in RULES.items():
        losses = [
            objective(w, d, rule(w, d, iterations=i, tolerance=0.0)) / len(w) for i in range(11)
        ]
        rise = max((b - a) / a for a, b in pairwise(losses))
        found[name] = {"objective": losses, "largest_rise": rise}
    return found


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    rows = raw["brute_force"]
    largest = max(row["weights"] for row in rows)
    rises = [rule["largest_rise"] for run in raw["alternation"].values() for rule in run.values()]
    claims = [
        Claim(
            f"{PAGE}.4",
            f"{name}: objective over brute force's, up to {largest} weights, part of sum d w^2",
            max(row[name] for row in rows),
            "<=",
            1e-12,
        )
        for name in ("lat", "lat2", "lab")
    ]
    what = "alternation: largest rise of the objective"
    return [*claims, Claim(f"{PAGE}.4", what, max(rises), "<=", 1e-12)]


@experiment("loss-aware-exact", seeds=range(5), judge=_judge)
def exact(context: Context) -> dict[str, Any]:
    """Loss-aware weights 4: exact projections equal brute force, the alternation is monotone."""
    largest = 7 if context.quick else LARGEST
    found = context.map(against_brute_force, [(seed, largest) for seed in context.seeds])
    runs = context.map(alternation, [(seed, 2000) for seed in context.seeds])
    rows = [row for of_seed in found for row in of_seed]
    return {
        "brute_force": rows,
        "alternation": {str(s): run for s, run in zip(context.seeds, runs, strict=True)},
        "approximate_worst": max(row["lat, approximate"] for row in rows),
    }
