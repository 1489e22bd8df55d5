"""LeNet-300-100 on CIFAR-10: a network whose responses lie in few dimensions.

Its first layer reads whole colour images, whose power lies in low frequencies; 300 responses to
them need far fewer components. Chosen on validation images, reported on test images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gossamer
from gossamer import nets
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.low_rank.network import (
    calibration,
    cifar,
    first,
    looked,
    milliseconds,
    reduced,
)
from gossamer.structure.fit_network import Kind
from gossamer.structure.low_rank import energies
from gossamer.training import evaluate

__all__ = ["low_rank_mlp"]

RATIOS = (2.0, 4.0)
WAYS: tuple[Kind, ...] = ("nonlinear", "linear", "svd")
_MOST = {2.0: 0.5, 4.0: 2.0}


def _file(work: Path, seed: int) -> Path:
    return work / f"mlp-{seed}.pt"


def _network(work: Path, seed: int) -> nn.Module:
    net = nets.build("lenet-300-100", in_shape=(3, 32, 32), seed=seed)
    net.load_state_dict(torch.load(_file(work, seed), weights_only=True))
    return net


def _trained(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    net, data = nets.build("lenet-300-100", in_shape=(3, 32, 32), seed=seed), cifar(quick)
    config = gossamer.TrainConfig(
        epochs=1 if quick else 10, lr=0.001, optimizer="adam", batch_size=128, seed=seed
    )
    gossamer.train(net, data, config)
    torch.save(net.state_dict(), _file(work, seed))
    return {"seed": seed, "test": 100 * evaluate(net, data.test).accuracy}


def _ways(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """Every kind at every ratio; the chosen ones on test images and on the clock."""
    net, data = _network(work, seed), cifar(quick)
    batches = calibration(64 if quick else 3000, quick)
    seen = looked(net, batches, seed)
    some = first(data.validation, 50) if quick else data.validation
    rows, chosen, networks = [], [], [net]
    for ratio in RATIOS:
        made = {k: reduced(net, batches, seen, k, ratio, asymmetric=True, seed=seed) for k in WAYS}
        scores = {k: 100 * evaluate(m, some).accuracy for k, (m, _) in made.items()}
        rows += [{"kind": k, "ratio": ratio, "validation": s} for k, s in scores.items()]
        kind = max(scores, key=lambda k: scores[k])
        best, row = made[kind]
        test = first(data.test, 50) if quick else data.test
        networks.append(best)
        chosen.append(
            {"kind": kind, "ratio": ratio, "test": 100 * evaluate(best, test).accuracy, **row}
        )
    x = data.test.batch(slice(0, 1))[0]
    kept = {n: energies(p) for n, p in seen.pairs.items()}
    return {
        "seed": seed,
        "ways": rows,
        "chosen": chosen,
        "times": milliseconds(networks, x, work),
        "energy": {n: (e.cumsum(0) / e.sum()).tolist() for n, e in kept.items()},
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    claims, name = [], "LeNet-300-100 on CIFAR-10"
    dense = {row["seed"]: row["test"] for row in raw["trained"]}
    for number, ratio in enumerate(RATIOS):
        rows = [(one["chosen"][number], one) for one in raw["runs"]]
        lost = max(dense[one["seed"]] - row["test"] for row, one in rows)
        what = f"{name}, {ratio:g} times fewer multiply-adds, without training"
        claims.append(Claim("low-rank.5", f"{what}: points lost, the worst seed", lost, "<=",
                            _MOST[ratio]))  # fmt: skip
        fewer = min(row["macs"][0] / row["macs"][1] for row, _ in rows)
        claims.append(Claim("low-rank.5", f"{what}: counted", fewer, ">=", ratio))
        for engine in ("torch", "onnxruntime"):
            times = [one["times"][engine] for _, one in rows]
            if all(times):
                faster = min(t[0] / t[1 + number] for t in times)
                what_ = f"{name} at {ratio:g}x, batch 1, {engine}: measured speed-up"
                claims.append(Claim("low-rank.5", what_, faster, ">", 1.0))
    return claims


@experiment("low-rank-mlp", seeds=(0,), judge=_judge)
def low_rank_mlp(context: Context) -> dict[str, Any]:
    """Low rank 5: a network whose spectrum allows 2 and 4 times without training."""
    jobs = [(seed, context.work, context.quick) for seed in context.seeds]
    return {
        "trained": context.map(_trained, jobs),
        "runs": context.alone(_ways, jobs),
    }
