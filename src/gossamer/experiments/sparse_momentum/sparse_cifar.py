"""The orderings of sparse training on CIFAR-10, on a network that two cores can train.

Reduced and named as such: Conv-2 with 8 channels and hidden layers of 64 (the papers train VGG
and wide ResNets), 10,000 training and 1,000 validation images, 12 epochs of SGD with momentum,
10 % of the weights. Test accuracies are on all 10,000 test images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gossamer import nets
from gossamer.core import names
from gossamer.core.errors import one_of
from gossamer.core.method import Masked, Method
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.lottery_ticket.lottery import cifar
from gossamer.prune import snip
from gossamer.prune.deconstruct import apply_actions, criterion_masks
from gossamer.prune.dynamic import FAMILY, DynamicSparse
from gossamer.training import TrainConfig, evaluate, train

__all__ = ["sparse_cifar"]

DENSITY = 0.1
CONFIG = TrainConfig(
    12, batch_size=100, lr=0.05, nesterov=True, weight_decay=5e-4, schedule="cosine"
)
WAYS = ("dense", "sparse-momentum", "set", "rigl", "static", "snip")
CRITERIA = ("large_final_same_sign", "large_final", "random")
DENSITIES = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def one(way: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """Test accuracy (percent) of one way of training; for ``dense`` of untrained masks too."""
    one_of("way", way, ("dense", "snip", *FAMILY))
    data = cifar(quick)
    config = replace(CONFIG, seed=seed, epochs=1 if quick else CONFIG.epochs)
    model = nets.build("conv-2", seed=seed, filters=8, hidden=64)
    initial = {n: w.detach().clone() for n, w in names.weights(model).items()}
    epoch = -(-len(data.train) // config.batch_size)
    generator = torch.Generator().manual_seed(seed)
    methods: list[Method] = []
    if way == "snip":
        order = torch.randperm(len(data.train), generator=generator)
        masks = snip.prune(model, [data.train.batch(order[:128])], DENSITY)
        methods.append(Masked(masks))
    elif way != "dense":
        # one budget, one division over layers and one schedule for all
        rule = replace(FAMILY[way], distribution="uniform")
        if way in ("set", "rigl"):
            rule = replace(rule, rate=0.5, rate_end=0.005, rate_schedule="cosine", until=1.0)
        methods.append(
            DynamicSparse(
                rule, DENSITY, steps=config.epochs * epoch, every=epoch, generator=generator
            )
        )
    train(model, data, config, methods=methods, checkpoint=work / f"{way}-{seed}.pt")
    row = {"way": way, "seed": seed, "accuracy": 100 * evaluate(model, data.test).accuracy}
    if way == "dense":
        final = {n: w.detach().clone() for n, w in names.weights(model).items()}
        row["untrained"] = {c: _untrained(c, initial, final, seed, data) for c in CRITERIA}
    return row


def _untrained(
    criterion: str, initial: names.Tensors, final: names.Tensors, seed: int, data: Any
) -> dict[str, float]:
    """The initial network under a criterion's mask, at the density that validation chooses."""
    best = {"density": 0.0, "validation": -1.0, "accuracy": 0.0}
    for density in DENSITIES:
        model = nets.build("conv-2", seed=seed, filters=8, hidden=64)
        generator = torch.Generator().manual_seed(seed)
        masks = criterion_masks(criterion, initial, final, density, alpha=1.0, generator=generator)
        apply_actions(initial, final, masks, kept="rewind", signed=True, removed="zero").apply_(
            model
        )
        found = evaluate(model, data.validation).accuracy
        if found > best["validation"]:
            test = 100 * evaluate(model, data.test).accuracy
            best = {"density": density, "validation": found, "accuracy": test}
    return best


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    accuracy, untrained = raw["accuracy"], raw["untrained"]
    net = f"reduced Conv-2, CIFAR-10, {100 * DENSITY:g} %:"

    def over(page: str, way: str, other: str) -> Claim:
        gain = accuracy[way]["mean"] - accuracy[other]["mean"]
        return Claim(page, f"{net} {way} over {other}, means, points", gain, ">", 0.0)

    claims = [
        over("sparse-momentum.1", "sparse-momentum", "set"),
        over("sparse-momentum.1", "sparse-momentum", "static"),
        over("snip.2", "snip", "static"),
    ]
    claims += [
        Claim(
            "deconstructing.1",
            f"reduced Conv-2, CIFAR-10, untrained: {way} over {other}, means, points",
            untrained[way]["mean"] - untrained[other]["mean"],
            ">",
            0.0,
        )
        for way, other in (("large_final_same_sign", "large_final"), ("large_final", "random"))
    ]
    return claims


@experiment("sparse-cifar-reduced", judge=_judge)
def sparse_cifar(context: Context) -> dict[str, Any]:
    """Sparse momentum, SNIP and untrained masks on a small Conv-2 and a part of CIFAR-10."""
    jobs = [(way, seed, context.work, context.quick) for way in WAYS for seed in context.seeds]
    rows = context.map(one, jobs)
    accuracy = {w: spread([r["accuracy"] for r in rows if r["way"] == w]) for w in WAYS}
    dense = [r["untrained"] for r in rows if r["way"] == "dense"]
    untrained = {c: spread([r[c]["accuracy"] for r in dense]) for c in CRITERIA}
    return {"accuracy": accuracy, "untrained": untrained, "runs": rows}
