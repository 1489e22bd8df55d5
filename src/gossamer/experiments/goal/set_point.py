"""A file's size given, in one run: against the best of twenty runs whose prices are tried by hand.

The perceptron is LeNet-300-100 on MNIST, trained once. Every run prunes it and trains it on a grid
under a price for bits; with ``max_bytes`` the price is found within the run
(:mod:`gossamer.quantize.set_point`), the twenty have each a price and a grid step of their own. Of
those that are small enough for a size the one with the best validation score stands for them;
accuracies are of test images. Seconds are the processor's own, of runs that do the same work
otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import gossamer
from gossamer import nets
from gossamer.compression import compress
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.shared.lenets import mnist
from gossamer.training import evaluate

__all__ = ["set_point"]

NET = "lenet-300-100"
SIZES = (3_000, 5_000, 8_000)
PRICES, STEPS = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4), (0.3, 0.5, 0.7, 0.9)
PLAIN = (1e-5, 0.5)
_TRAINING: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.0001, "nesterov": True}


def _stages(price: float, step: float, quick: bool) -> list[Any]:
    """The recipe of every run."""
    pruned, priced = (1, 1) if quick else (3, 8)
    return [
        {"prune": {
            "density": {"ip1": 0.06, "ip2": 0.1, "ip3": 0.5},
            "retrain": {**_TRAINING, "epochs": pruned},
        }},
        {"rate_aware": {
            "lam": price, "step": step, "retrain": {**_TRAINING, "epochs": priced},
        }},
        {"quantize_biases": {"bits": 8}},
        {"pack": {"profile": "smallest"}},
        {"evaluate": {"latency": False}},
    ]  # fmt: skip


def _trained(work: Path, quick: bool) -> dict[str, Any]:
    net, data = nets.build(NET, seed=0), mnist(quick)
    gossamer.train(net, data, gossamer.TrainConfig(epochs=1 if quick else 10, **_TRAINING))
    torch.save(net.state_dict(), work / "trained.pt")
    return {"accuracy": 100 * evaluate(net, data.test).accuracy}


def _compressed(
    price: float, step: float, most: int | None, work: Path, quick: bool
) -> dict[str, Any]:
    """One run: what its file takes, scores and cost."""
    net, data = nets.build(NET, seed=0), mnist(quick)
    net.load_state_dict(torch.load(work / "trained.pt", weights_only=True))
    recipe = {"name": "set-point", "max_drop": 1, "stages": _stages(price, step, quick)}
    out = work / f"run-{price:g}-{step:g}-{most}"
    began = time.process_time()
    found = compress(net, data, recipe=recipe, out=out, max_bytes=most, restart=True,
                     progress=False)  # fmt: skip
    rows = {row["stage"].partition("-")[2]: row for row in found.run["stages"]}
    return {
        "price": price,
        "step": step,
        "most": most,
        "bytes": found.bytes,
        "validation": 100 * rows["pack"]["score"],
        "accuracy": 100 * found.after.accuracy,
        "seconds": time.process_time() - began,
        "found": rows["rate_aware"].get("size"),
        "density": rows["pack"]["density"],
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for row in raw["sized"]:
        what = f"perceptron, {row['most']:,} bytes"
        share = row["bytes"] / row["most"]
        fitting = [r for r in raw["grid"] if r["bytes"] <= row["most"]]
        claims += [
            Claim("goal.1", f"{what}: the file over its target", share, "<=", 1.0),
            Claim("goal.1", f"{what}: the file over its target, at least", share, ">=", 0.98),
            Claim(
                "goal.1", f"{what}: processor seconds over those of the run without a target",
                row["seconds"] / raw["plain"]["seconds"], "<=", 1.5,
            ),
        ]  # fmt: skip
        if fitting:
            best = max(fitting, key=lambda r: float(r["validation"]))
            under = best["accuracy"] - row["accuracy"]
            told = f"{what}: points under the best of {len(raw['grid'])} runs at that size"
            claims.append(Claim("goal.1", told, under, "<=", 0.2))
    return claims


@experiment("set-point", seeds=(0,), judge=_judge)
def set_point(context: Context) -> dict[str, Any]:
    """Goal 1: a perceptron's file at three sizes, in one run each, against twenty by hand."""
    work, quick = context.work, context.quick
    trained = context.map(_trained, [(work, quick)])[0]
    prices, steps = (PRICES[:1], STEPS[:1]) if quick else (PRICES, STEPS)
    jobs: list[tuple[float, float, int | None, Path, bool]]
    jobs = [(price, step, None, work, quick) for step in steps for price in prices]
    jobs += [(*PLAIN, most, work, quick) for most in (SIZES[:1] if quick else SIZES)]
    rows = context.map(_compressed, jobs)
    grid = [row for row in rows if row["most"] is None]
    plain = next((r for r in grid if (r["price"], r["step"]) == PLAIN), grid[0])
    return {
        "trained": trained,
        "plain": plain,
        "sized": [row for row in rows if row["most"] is not None],
        "grid": grid,
    }
