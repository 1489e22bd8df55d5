"""Sparse momentum on MNIST: accuracy by density, the ablation, exact counts, resume and overhead.

Dettmers and Zettlemoyer 2019, arXiv 1907.04840, figure 3 and table 4 (LeNet-300-100, LeNet-5
Caffe), section 5.3 (ablation).
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from gossamer import nets
from gossamer.compression import fresh
from gossamer.core.names import weights
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.lenets import error, mnist
from gossamer.prune.dynamic import FAMILY, DynamicSparse, Rule
from gossamer.training import TrainConfig, evaluate, train
from gossamer.training.evaluation import cross_entropy

__all__ = ["ablation", "exact", "lenet_5", "lenet_300_100"]

PAGE = "sparse-momentum"
# Published: batch 100, x0.1 every 25,000 iterations, 100 epochs of 60,000 images. The validation
# split is held back here, so an epoch is 550 iterations.
PUBLISHED = TrainConfig(
    100,
    batch_size=100,
    lr=0.1,
    nesterov=True,
    weight_decay=5e-4,
    schedule="step",
    lr_steps=(25_000 / 55_000, 50_000 / 55_000),
)
# A LeNet-5 step costs twenty of the other's, so 20 epochs must do; a cosine from .05, since the
# published steps from .1, compressed to 30 epochs, gave .76 and .97 % error at 5 % and lost the
# third seed altogether.
CONFIGS = {
    "lenet-300-100": PUBLISHED,
    "lenet-5-caffe": replace(PUBLISHED, epochs=20, lr=0.05, schedule="cosine"),
}
_MOMENTUM = FAMILY["sparse-momentum"]
# SET under sparse momentum's own budget: uniform densities, rate and schedule (the paper's row).
RULES: dict[str, Rule | None] = {
    "dense": None,
    "sparse-momentum": _MOMENTUM,
    "set": replace(_MOMENTUM, growth="random", redistribution=None),
    # with the division over layers that SET itself has; uniform leaves the last layer little
    "set, erdos-renyi": replace(
        _MOMENTUM, growth="random", redistribution=None, distribution="erdos-renyi"
    ),
    "random growth, momentum redistribution": replace(_MOMENTUM, growth="random"),
    "momentum growth, no redistribution": replace(_MOMENTUM, redistribution=None),
}


SETS = ("set", "set, erdos-renyi")


def trained(
    net: str, rule: str, density: float, seed: int, work: Path, quick: bool
) -> dict[str, Any]:
    """Train one network from scratch; test accuracy in percent at the end, and its densities."""
    data, chosen = mnist(quick), RULES[rule]
    config = replace(CONFIGS[net], seed=seed, epochs=2 if quick else CONFIGS[net].epochs)
    epoch = -(-len(data.train) // config.batch_size)
    model = nets.build(net, seed=seed)
    if net != "lenet-300-100":
        # a sixth faster on a CPU
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    methods = []
    if chosen is not None:
        methods.append(
            DynamicSparse(
                chosen,
                density,
                steps=config.epochs * epoch,
                every=epoch,
                generator=torch.Generator().manual_seed(seed),
            )
        )
    folder = work / f"{net}-{CONFIGS[net].epochs}-{config.schedule}"
    history = train(
        model,
        data,
        config,
        methods=methods,
        checkpoint=folder / f"{rule.replace(', ', '-').replace(' ', '-')}-{density:g}-{seed}.pt",
        evaluate_every=5,
    )
    row: dict[str, Any] = {
        "net": net,
        "rule": rule,
        "density": density,
        "seed": seed,
        "accuracy": 100 - error(evaluate(model, data.test)),
        "validation": 100 * history.epochs[-1]["validation_accuracy"],
        "nonzero": sum(int((w != 0).sum()) for w in weights(model).values()),
    }
    if methods:
        row["active"] = methods[0].masks.kept
        row["densities"] = methods[0].masks.densities()
    return row


def _work(context: Context) -> Path:
    folder = context.beside("sparse-momentum-shared", __name__)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _runs(context: Context, net: str, cells: list[tuple[str, float]]) -> list[dict[str, Any]]:
    jobs = [(net, r, d, s, _work(context), context.quick) for r, d in cells for s in context.seeds]
    return context.map(trained, jobs)


def _table(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    table: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        cell = table.setdefault(row["rule"], {}).setdefault(f"{row['density']:g}", [])
        cell.append(row["accuracy"])
    return {r: {d: spread(v) for d, v in cells.items()} for r, cells in table.items()}


def _judge_300(raw: Mapping[str, Any]) -> list[Claim]:
    table, page = raw["accuracy"], f"{PAGE}.1"
    ours = table["sparse-momentum"]
    dense = table["dense"]["1"]["mean"]
    claims = [
        Claim(page, "5 %: test accuracy, mean, percent", ours["0.05"]["mean"], ">=", 98.4),
        Claim(page, "1 %: test accuracy, mean, percent", ours["0.01"]["mean"], ">=", 97.3),
        Claim(page, "dense: test accuracy, mean, percent", dense, ">=", 98.6),
        Claim(page, "dense: test accuracy, mean, percent", dense, "<=", 98.8),
    ]
    claims += [
        Claim(
            page,
            f"{100 * float(d):g} %: sparse momentum minus {way}, means, points",
            ours[d]["mean"] - table[way][d]["mean"],
            ">",
            0.0,
        )
        for way in SETS
        for d in table[way]
    ]
    return claims


@experiment("sparse-momentum-lenet-300-100", judge=_judge_300)
def lenet_300_100(context: Context) -> dict[str, Any]:
    """Sparse momentum 1: LeNet-300-100 by density, against SET and dense."""
    cells = [("dense", 1.0)]
    cells += [("sparse-momentum", d) for d in (0.01, 0.05, 0.02, 0.1)]
    cells += [(way, d) for way in SETS for d in (0.01, 0.02, 0.05)]
    rows = _runs(context, "lenet-300-100", cells)
    return {"accuracy": _table(rows), "runs": rows}


def _judge_5(raw: Mapping[str, Any]) -> list[Claim]:
    table, page = raw["accuracy"], f"{PAGE}.2"
    ours = table["sparse-momentum"]
    return [
        Claim(page, "5 %: test error, mean, percent", 100 - ours["0.05"]["mean"], "<=", 0.75),
        Claim(page, "1 %: test error, mean, percent", 100 - ours["0.01"]["mean"], "<=", 0.95),
    ]


@experiment("sparse-momentum-lenet-5", judge=_judge_5)
def lenet_5(context: Context) -> dict[str, Any]:
    """Sparse momentum 2: LeNet-5-Caffe at 5 and 1 %, in 20 epochs instead of 100."""
    rows = _runs(context, "lenet-5-caffe", [("sparse-momentum", 0.05), ("sparse-momentum", 0.01)])
    epochs = CONFIGS["lenet-5-caffe"].epochs
    return {"accuracy": _table(rows), "runs": rows, "epochs": epochs}


@experiment("sparse-momentum-ablation", judge=lambda raw: [])
def ablation(context: Context) -> dict[str, Any]:
    """Sparse momentum 5: growth by momentum or at random, with or without redistribution."""
    grid = [
        ("sparse-momentum", "momentum", "momentum"),
        ("momentum growth, no redistribution", "momentum", "none"),
        ("random growth, momentum redistribution", "random", "momentum"),
        ("set", "random", "none"),
    ]
    densities = (0.05,)
    rows = _runs(context, "lenet-300-100", [(r, d) for r, _, _ in grid for d in densities])
    table = _table(rows)
    cells = []
    for rule, growth, redistribution in grid:
        for density, found in table[rule].items():
            # Student's t, 97.5 %, for the seeds at hand: three seeds are no Gaussian sample
            half = _T.get(found["n"], 1.96) * found["std"] / found["n"] ** 0.5
            cells.append(
                {
                    "growth": growth,
                    "redistribution": redistribution,
                    "density": float(density),
                    **found,
                    "interval_95": [found["mean"] - half, found["mean"] + half],
                }
            )
    return {"cells": cells, "runs": rows}


_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def counted(seed: int, quick: bool) -> dict[str, int]:
    """Steps at which the count was off, or an inactive weight was not exactly 0."""
    data = mnist(True)
    model = nets.build("lenet-300-100", seed=seed)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = 60 if quick else 600
    method = DynamicSparse(
        _MOMENTUM, 0.05, steps=steps, every=20, generator=torch.Generator().manual_seed(seed)
    ).attach(model, optimizer)
    wanted, off, leaked = method.masks.kept, 0, 0
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(data.train), (100,), generator=order)
        x, y = data.train.batch(rows, None, order)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        off += method.masks.kept != wanted
        chosen = weights(model)
        leaked += any(bool((chosen[n][~m] != 0).any()) for n, m in method.masks.items())
    return {"steps": steps, "updates": len(method.history), "count_off": off, "leaked": leaked}


def resumable(folder: Path) -> None:
    """A short sparse training that a kill interrupts; its final weights go to ``done.txt``."""
    torch.set_num_threads(1)
    data = mnist(True)
    config = TrainConfig(12, batch_size=100, lr=0.05, nesterov=True, weight_decay=5e-4)
    model = nets.build("lenet-300-100", seed=0)
    epoch = -(-len(data.train) // config.batch_size)
    method = DynamicSparse(
        _MOMENTUM,
        0.05,
        steps=config.epochs * epoch,
        every=7,
        generator=torch.Generator().manual_seed(0),
    )
    train(
        model,
        data,
        config,
        methods=[method],
        checkpoint=folder / "run.pt",
        checkpoint_every=0.05,
    )
    (folder / "done.txt").write_text(fresh.digest(model.state_dict()))


def killed(folder: Path, seed: int, kills: int) -> int:
    """Run :func:`resumable` in a process of its own, killed at random moments; kills that hit."""
    folder.mkdir(parents=True, exist_ok=True)
    moments, hits = random.Random(seed), 0
    for attempt in range(kills + 50):
        process = get_context("spawn").Process(target=resumable, args=(folder,))
        process.start()
        if attempt < kills:
            while process.is_alive() and not (folder / "run.pt").exists():
                time.sleep(0.01)
            time.sleep(moments.uniform(0.05, 0.6))
            if process.is_alive():
                process.kill()  # SIGKILL
                hits += 1
        process.join()
        if (folder / "done.txt").exists():
            break
    return hits


def resumed(work: Path) -> dict[str, Any]:
    """Whether a training killed twice ends with the unbroken one's bits; kills that hit."""
    whole, broken = work / "whole", work / "broken"
    for folder in (whole, broken):  # an earlier run's would have nothing left to kill
        shutil.rmtree(folder, ignore_errors=True)
    killed(whole, 0, 0)
    hits = killed(broken, 1, 2)
    one, other = ((folder / "done.txt").read_text() for folder in (whole, broken))
    return {"kills_that_hit": hits, "same_bits": one == other}


def overhead(net: str, quick: bool) -> float:
    """A sparse step over a dense one, between reallocations: median over paired blocks.

    Of this process's processor time, which other processes do not enter.
    """
    data = mnist(True)
    steps = 5 if net != "lenet-300-100" else 50
    runs = []
    for rule in (None, _MOMENTUM):
        model: nn.Module = nets.build(net, seed=0)
        optimizer = torch.optim.SGD(
            model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
        )
        if rule is not None:
            DynamicSparse(
                rule, 0.05, steps=1 << 40, every=1 << 30, generator=torch.Generator()
            ).attach(model, optimizer)
        runs.append((model, optimizer))
    x, y = data.train.batch(torch.arange(100), None, torch.Generator())
    ratios = []
    for _ in range(3 if quick else 40):
        seconds = []
        for model, optimizer in runs:
            start = time.process_time()
            for _ in range(steps):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
            seconds.append(time.process_time() - start)
        ratios.append(seconds[1] / seconds[0])
    return median(ratios)


def _judge_exact(raw: Mapping[str, Any]) -> list[Claim]:
    off, leaked = (sum(c[key] for c in raw["counts"]) for key in ("count_off", "leaked"))
    hits, same = (float(raw["resume"][key]) for key in ("kills_that_hit", "same_bits"))
    claims = [
        Claim(f"{PAGE}.3", "steps with another count", off, "==", 0),
        Claim(f"{PAGE}.3", "steps with an inactive weight not exactly 0", leaked, "==", 0),
        Claim(f"{PAGE}.6", "kills that hit a running training", hits, ">=", 2),
        Claim(f"{PAGE}.6", "same bits as the unbroken run", same, "==", 1),
    ]
    claims += [
        Claim(f"{PAGE}.6", f"{net}: step over dense, between updates", ratio, "<=", 1.05)
        for net, ratio in raw["overhead"].items()
    ]
    return claims


@experiment("sparse-momentum-exact", judge=_judge_exact)
def exact(context: Context) -> dict[str, Any]:
    """Sparse momentum 3, 6: exact counts, exact zeros, resume after kills, overhead of a step."""
    counts = context.map(counted, [(seed, context.quick) for seed in context.seeds])
    (resume,) = context.map(resumed, [(context.work,)])
    ratios = context.alone(overhead, [(net, context.quick) for net in CONFIGS])
    overheads = dict(zip(CONFIGS, ratios, strict=True))
    return {"counts": counts, "resume": resume, "overhead": overheads}
