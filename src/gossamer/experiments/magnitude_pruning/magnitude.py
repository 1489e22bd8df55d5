"""Train, prune, retrain on the LeNets: parameters kept, curves, the mask's picture, the scan.

Han, Pool, Tran, Dally, NIPS 2015, tables 1 and 3, figures 4-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gossamer import nets
from gossamer.compression.stages.train import Train
from gossamer.core.errors import one_of
from gossamer.core.masks import Masks
from gossamer.core.method import Masked
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.lenets import (
    NETS,
    after,
    error,
    lenets_folder,
    mnist,
    recipe,
)
from gossamer.prune import magnitude, sensitivity
from gossamer.training import TrainConfig, evaluate, train

__all__ = ["curves", "exact_zeros", "lenets", "picture", "scan"]

PAGE = "magnitude-pruning"
# net -> (most weights kept, highest error in percent)
BOUNDS = {"lenet-300-100": (22_000, 1.65), "lenet-5": (36_000, 0.85)}
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.03)
CURVE = TrainConfig(6, lr=0.02, schedule="cosine", nesterov=True)
L2: dict[str, Any] = {"weight_decay": 5e-4}
L1: dict[str, Any] = {"l1": 2e-5}


def kept_and_errors(net: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """Weights kept and test errors (percent) before and after, of one seed."""
    dense, pruned = (after(stage, net, seed, work, quick) for stage in ("train", "prune"))
    return {
        "net": net,
        "seed": seed,
        "kept": pruned.masks.kept,
        "kept_by_layer": pruned.masks.densities(),
        "error_dense": error(evaluate(dense.model, dense.data.test)),
        "error_pruned": error(evaluate(pruned.model, pruned.data.test)),
    }


def _judge_lenets(raw: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for number, net in enumerate(NETS, 1):
        before, after = (raw["summary"][net][key] for key in ("error_dense", "error_pruned"))
        kept = max(r["kept"] for r in raw["runs"] if r["net"] == net)
        most, worst = BOUNDS[net]
        page = f"{PAGE}.{number}"
        claims += [
            Claim(page, f"{net}: weights kept", kept, "<=", most),
            Claim(page, f"{net}: error, mean over seeds, percent", after["mean"], "<=", worst),
            Claim(
                page,
                f"{net}: error over its own reference, mean, points",
                after["mean"] - before["mean"],
                "<=",
                0.0,
            ),
        ]
    return claims


@experiment("magnitude-lenets", judge=_judge_lenets)
def lenets(context: Context) -> dict[str, Any]:
    """Magnitude pruning 1, 2: weights kept and errors of LeNet-300-100 and LeNet-5."""
    work = lenets_folder(context)
    jobs = [(net, seed, work, context.quick) for net in NETS for seed in context.seeds]
    rows = context.map(kept_and_errors, jobs)
    keys = ("error_dense", "error_pruned")
    summary = {
        net: {key: spread([r[key] for r in rows if r["net"] == net]) for key in keys}
        for net in NETS
    }
    return {"summary": summary, "runs": rows}


def curve(seed: int, work: Path, quick: bool) -> dict[str, dict[str, float]]:
    """Test error (percent) by density of the five ways, of one seed."""
    data, net = mnist(quick), NETS[0]
    short = replace(CURVE, seed=seed, epochs=1 if quick else CURVE.epochs)
    folder = work / f"curves-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, float]] = {}

    def start(kind: str) -> nn.Module:
        if kind == "L2":
            return after("train", net, seed, work, quick).model
        model = nets.build(net, seed=seed)
        reference = recipe(net, seed, quick).work[0]
        assert isinstance(reference, Train)  # the recipe's first stage
        config = replace(reference.config(seed), weight_decay=0.0, **L1)
        train(model, data, config, checkpoint=folder / "dense-l1.pt")
        return model

    for kind, regularizer in (("L2", L2), ("L1", L1)):
        for density in DENSITIES:
            model = start(kind)
            masks = magnitude.prune(model, density)
            masks.apply_(model)
            key = f"{density:g}"
            found.setdefault(f"{kind}, no retraining", {})[key] = error(evaluate(model, data.test))
            train(
                model,
                data,
                replace(short, **regularizer),
                methods=[Masked(masks)],
                checkpoint=folder / f"{kind}-{key}.pt",
            )
            found.setdefault(f"{kind}, retrained", {})[key] = error(evaluate(model, data.test))
    model = start("L2")
    within: Masks | None = None
    for density in DENSITIES:
        within = magnitude.prune(model, density, within=within)
        train(
            model,
            data,
            replace(short, **L2),
            methods=[Masked(within)],
            checkpoint=folder / f"iterative-{density:g}.pt",
        )
        found.setdefault("L2, iterative", {})[f"{density:g}"] = error(evaluate(model, data.test))
    return found


def _judge_curves(raw: Mapping[str, Any]) -> list[Claim]:
    table = raw["error"]
    low = [f"{d:g}" for d in DENSITIES if d <= 0.1]

    def mean(way: str) -> float:
        return float(sum(table[way][d]["mean"] for d in low)) / len(low)

    at = "error at densities <= 10 %:"
    return [
        Claim(
            f"{PAGE}.3",
            f"{at} retrained minus not retrained, points",
            mean("L2, retrained") - mean("L2, no retraining"),
            "<",
            0.0,
        ),
        Claim(
            f"{PAGE}.3",
            f"{at} iterative minus one-shot retrained, points",
            mean("L2, iterative") - mean("L2, retrained"),
            "<",
            0.0,
        ),
    ]


@experiment("magnitude-curves", judge=_judge_curves)
def curves(context: Context) -> dict[str, Any]:
    """Magnitude pruning 3: error against density, one-shot, retrained, iterative; L1 against L2."""
    work = lenets_folder(context)
    runs = context.map(curve, [(seed, work, context.quick) for seed in context.seeds])
    table = {way: {d: spread([r[way][d] for r in runs]) for d in runs[0][way]} for way in runs[0]}
    difference = {
        way: {d: table[f"L1, {way}"][d]["mean"] - table[f"L2, {way}"][d]["mean"]
              for d in table[f"L2, {way}"]}
        for way in ("no retraining", "retrained")
    }  # fmt: skip
    return {"error": table, "l1_minus_l2": difference}


def bands(kept: torch.Tensor) -> dict[str, float]:
    """How a first layer's kept counts, one for each of 28 x 28 pixels, are banded.

    ``lag``: the lag in 14..42 of the highest autocorrelation over the 784 inputs; 28 when rows
    repeat. ``border``, ``centre``: mean kept weights of a pixel in the outer 4 rings, and inside.
    """
    flat = kept.double().reshape(-1) - kept.double().mean()
    correlation = {lag: float((flat[lag:] * flat[:-lag]).sum()) for lag in range(14, 43)}
    inner = torch.zeros(28, 28, dtype=torch.bool)
    inner[4:-4, 4:-4] = True
    image = kept.reshape(28, 28).double()
    return {
        "lag": float(max(correlation, key=lambda lag: correlation[lag])),
        "border": float(image[~inner].mean()),
        "centre": float(image[inner].mean()),
    }


def picture_of(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """The first layer's kept counts of one seed."""
    kept = after("prune", NETS[0], seed, work, quick).masks["ip1.weight"].sum(0)
    return {"seed": seed, **bands(kept), "kept": kept.tolist()}


def _judge_picture(raw: Mapping[str, Any]) -> list[Claim]:
    rows, page = raw["runs"], f"{PAGE}.4"
    what = "weights kept for a border pixel over a centre pixel, largest of seeds"
    return [
        Claim(
            page,
            "seeds whose kept weights repeat every 28 inputs, fraction",
            sum(r["lag"] == 28 for r in rows) / len(rows),
            "==",
            1.0,
        ),
        Claim(page, what, max(r["border"] / r["centre"] for r in rows), "<", 1.0),
    ]


@experiment("magnitude-picture", judge=_judge_picture)
def picture(context: Context) -> dict[str, Any]:
    """Magnitude pruning 4: the first layer's mask has 28 bands and a thin border."""
    work = lenets_folder(context)
    return {"runs": context.map(picture_of, [(s, work, context.quick) for s in context.seeds])}


def nonzero_after(optimizer: str, seed: int, quick: bool) -> int:
    """Pruned entries that are not exactly 0 after many steps."""
    one_of("optimizer", optimizer, ("sgd", "adam"))
    g = torch.Generator().manual_seed(seed)
    model = nets.build("lenet-300-100", seed=seed)
    masks = magnitude.prune(model, 0.1)
    if optimizer == "sgd":
        made: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4
        )
    else:
        made = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=5e-4)
    method = Masked(masks).attach(model, made)
    for _ in range(20 if quick else 1000):
        x, y = torch.randn(32, 784, generator=g), torch.randint(0, 10, (32,), generator=g)
        made.zero_grad()
        F.cross_entropy(model(x), y).backward()
        made.step()
    method.finish()
    state = model.state_dict()
    return sum(int((state[n][~m] != 0).sum()) for n, m in masks.items())


def _judge_zeros(raw: Mapping[str, Any]) -> list[Claim]:
    return [
        Claim(f"{PAGE}.5", f"{how}: pruned weights not exactly 0 after 1000 steps", max(c), "==", 0)
        for how, c in raw["counts"].items()
    ]


@experiment("magnitude-exact-zeros", judge=_judge_zeros)
def exact_zeros(context: Context) -> dict[str, Any]:
    """Magnitude pruning 5: pruned weights stay exactly 0 under momentum, Adam and weight decay."""
    counts = {
        how: [nonzero_after(how, seed, context.quick) for seed in context.seeds]
        for how in ("sgd", "adam")
    }
    return {"counts": counts}


@experiment("magnitude-sensitivity", seeds=(0,), judge=lambda raw: [])
def scan(context: Context) -> dict[str, Any]:
    """Magnitude pruning 6: the sensitivity scan of both LeNets as table and plot."""
    jobs = [(net, context.seeds[0], lenets_folder(context), context.quick) for net in NETS]
    return dict(zip(NETS, context.map(scanned, jobs), strict=True))


def scanned(net: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """One network's scan, what it suggests at half a point, and its picture's name."""
    dense = after("train", net, seed, work, quick)
    found = sensitivity.scan(dense.model, dense.data.validation)
    return {
        "scan": found.as_dict(),
        "suggested": found.suggest(0.005),
        "picture": found.plot(work / f"sensitivity-{net}.svg").name,
    }
