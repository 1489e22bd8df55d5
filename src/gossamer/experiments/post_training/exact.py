"""The layer-wise solver against Optimal Brain Surgeon by brute force, and its prices against bytes.

Brute force sets one weight after the other, and after each one inverts the Hessian of those that
are left anew; it makes its own choices, from those inverses alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer import datasets, nets
from gossamer.core import names
from gossamer.core.obs import Choice, factor, solve
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.post_training.stage import begun, calibrated, obs
from gossamer.pack import pack_bytes
from gossamer.quantize.obs import Coded, Prices, Pruned, Rounded

__all__ = ["exact"]

_STEP, _BITS, _DENSITY = 0.3, 4, 0.5
_ALL = 5  # inputs up to which every order is tried
_ORDERS = 24  # random ones beyond
RATES = (0.0005, 0.001, 0.002, 0.004)


def problem(inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """A row (1, inputs) and the Hessian of correlated inputs, float64."""
    g = torch.Generator().manual_seed(1000 * seed + inputs)
    mix = torch.randn(inputs, inputs, generator=g, dtype=torch.float64)
    x = torch.randn(4 * inputs, inputs, generator=g, dtype=torch.float64) @ mix
    return torch.randn(1, inputs, generator=g, dtype=torch.float64), x.T @ x / len(x)


def surgeon(
    row: Tensor, hessian: Tensor, order: Sequence[int], *, prune: bool, rounds: bool
) -> Tensor:
    """Optimal Brain Surgeon with an exact inverse after each weight.

    Half of the weights go where it prunes: those that cost least to remove when their turn comes,
    looked at before any is set. The rest are rounded to the grid, or kept.
    """
    w, left = row.clone(), list(order)
    costs = []
    for i in range(len(left)):
        inverse = torch.linalg.inv(hessian[left[i:]][:, left[i:]])
        costs.append(float(w[left[i]].square() / inverse[0, 0]))
    ranked = sorted(range(len(left)), key=costs.__getitem__)
    gone = {order[i] for i in ranked[: int((1 - _DENSITY) * len(left) + 0.5)]} if prune else set()
    top = (1 << (_BITS - 1)) - 1
    for j in order:
        inverse = torch.linalg.inv(hessian[left][:, left])
        value = w[j]
        if j in gone:
            value = torch.zeros_like(value)
        elif rounds:
            value = (value / _STEP).round().clamp(-top, top) * _STEP
        w[left] -= (w[j] - value) / inverse[0, 0] * inverse[:, 0]  # j is the first that is left
        w[j] = value
        left.remove(j)
    return w


def _solver(inputs: int, seed: int) -> dict[str, Any]:
    """The largest differences between solver and brute force, and lambda 0 against no rate."""
    row, hessian = problem(inputs, seed)
    orders: list[Sequence[int]]
    if inputs <= _ALL:
        orders = list(itertools.permutations(range(inputs)))
    else:
        g = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(inputs, generator=g).tolist() for _ in range(_ORDERS)]
    found = {"prune": 0.0, "round": 0.0, "both": 0.0, "lambda 0": 0.0}
    for order in orders:
        places = torch.tensor(order)
        upper = factor(hessian[places][:, places], 0.0)

        def solved(choice: Choice, upper: Tensor = upper, places: Tensor = places) -> Tensor:
            return solve(row, upper, choice, order=places).weight

        plain = solved(Rounded(_BITS, step=_STEP))
        ways = {
            "prune": (solved(Pruned(_DENSITY)), (True, False)),
            "round": (plain, (False, True)),
            "both": (solved(Pruned(_DENSITY, then=Rounded(_BITS, step=_STEP))), (True, True)),
        }
        for way, (mine, (prune, rounds)) in ways.items():
            theirs = surgeon(row[0], hessian, order, prune=prune, rounds=rounds)
            found[way] = max(found[way], float((mine[0] - theirs).abs().max()))
        # the same grid, and every code as long as any other
        free = Coded(_STEP, 0.0, Prices.even(1, inputs, (1 << (_BITS - 1)) - 1))
        found["lambda 0"] = max(found["lambda 0"], float((solved(free) - plain).abs().max()))
    return {"inputs": inputs, "seed": seed, "orders": len(orders), **found}


def _prices(rate: float, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """What the stage reckons a network's codes at, and what they take in the file."""
    if quick:
        data = datasets.load("digits")
        model = nets.build("conv-2", in_shape=(1, 8, 8), seed=0)
    else:
        data = calibrated(quick)
        model = nets.build("resnet-20", pretrained=True)
    state = begun(model, data, work / f"prices-{rate:g}", seed)
    row = obs(state, rate=rate, calibration=64)
    # each tensor without what a file has but once
    empty = len(pack_bytes({"": torch.zeros(0)}, profile="smallest"))
    weights = names.weights(state.model).values()
    real = [len(pack_bytes({"": w.detach()}, profile="smallest")) - empty for w in weights]
    reckoned = sum(layer["bits"] for layer in row["layers"]) / 8
    return {"rate": rate, "reckoned": reckoned, "bytes": sum(real)}


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    page = "post-training.1"
    claims = [
        Claim(
            page,
            f"largest difference from brute-force OBS, up to 12 inputs: {way}",
            max(row[way] for row in raw["solver"]),
            "<=",
            1e-8,
        )
        for way in ("prune", "round", "both")
    ]
    most = max(row["lambda 0"] for row in raw["solver"])
    claims.append(Claim(page, "lambda 0 against the form without a rate", most, "<=", 0.0))
    for row in raw["prices"]:
        off = 100 * abs(row["reckoned"] / row["bytes"] - 1)
        what = f"rate {row['rate']:g}: the codes' price, used in choosing, against their bytes, %"
        claims.append(Claim(page, what, off, "<=", 2.0))
    return claims


@experiment("post-training-exact", judge=_judge)
def exact(context: Context) -> dict[str, Any]:
    """Post-training 1: the solver against exact inverses, and its prices against the file."""
    sizes = range(1, 6 if context.quick else 13)
    solver = context.map(_solver, [(n, seed) for n in sizes for seed in context.seeds])
    rates = RATES[-1:] if context.quick else RATES
    jobs = [(rate, context.seeds[0], context.work, context.quick) for rate in rates]
    prices = context.map(_prices, jobs)
    ways = ("prune", "round", "both", "lambda 0")
    worst = {way: spread([row[way] for row in solver]) for way in ways}
    return {"solver": solver, "prices": prices, "worst": worst}
