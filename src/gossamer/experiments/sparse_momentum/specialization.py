"""Class specialization and the three speed-up figures of a sparse LeNet-5 against a dense one.

Dettmers and Zettlemoyer, *Sparse Networks from Scratch*, arXiv 1907.04840, sections 4.2 and 5.2.
LeNet-5-Caffe trained by sparse momentum at 5 % of its weights, and dense, from the same initial
weights, 3 epochs each on MNIST; measured on the test split. In so short a training weights are
reallocated ten times an epoch. The paper's sparse features are more general, clearly so in AlexNet
only: what is measured here is reported, not judged.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.analysis import compare, histograms, specialization, speedups
from gossamer.datasets import Split
from gossamer.experiments import Context, experiment, spread
from gossamer.experiments.shared.lenets import error, mnist
from gossamer.experiments.sparse_momentum.sparse_momentum import CONFIGS
from gossamer.prune.dynamic import FAMILY, DynamicSparse
from gossamer.training import evaluate, train

__all__ = ["sparse_specialization"]

DENSITY = 0.05
NET = "lenet-5-caffe"
CONFIG = replace(CONFIGS[NET], epochs=3)
REALLOCATIONS = 10  # an epoch
FACTORS = {"channel": "estimated_channel", "ideal": "estimated_ideal", "measured": "measured"}
FEATURES = ("conv1", "conv2", "ip1")  # ip2's units are the classes


def measured_on(quick: bool) -> Split:
    """The test split; 500 of its images in a smoke run."""
    test = mnist(quick).test
    return test.take(slice(0, 500)) if quick else test


def networks(seed: int, work: Path, quick: bool) -> dict[str, nn.Module]:
    """The sparse and the dense network of one seed, trained."""
    data = mnist(quick)
    config = replace(CONFIG, seed=seed, epochs=1 if quick else CONFIG.epochs)
    epoch = -(-len(data.train) // config.batch_size)
    sparse = DynamicSparse(
        FAMILY["sparse-momentum"],
        DENSITY,
        steps=config.epochs * epoch,
        every=max(1, epoch // REALLOCATIONS),
        generator=torch.Generator().manual_seed(seed),
    )
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, nn.Module] = {}
    for kind, methods in (("sparse", [sparse]), ("dense", [])):
        found[kind] = nets.build(NET, seed=seed)
        train(found[kind], data, config, methods=methods, checkpoint=work / f"{kind}-{seed}.pt")
    return found


def one_seed(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """All figures of one pair of networks but the timings."""
    test = measured_on(quick)
    models = networks(seed, work, quick)
    seen = {kind: specialization(model, test, include=FEATURES) for kind, model in models.items()}
    return {
        "seed": seed,
        "error": {kind: error(evaluate(model, test)) for kind, model in models.items()},
        "specialization": {kind: found.as_dict() for kind, found in seen.items()},
        "comparison": compare(seen["sparse"], seen["dense"]).rows,
    }


def speeds_of(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """The speed-up figures of one pair, which is loaded from its checkpoints."""
    test, rounds = measured_on(quick), 3 if quick else 50
    return {
        kind: speedups(model, test, rounds=rounds).as_dict()
        for kind, model in networks(seed, work, quick).items()
    }


@experiment("sparse-specialization", judge=lambda raw: [])
def sparse_specialization(context: Context) -> dict[str, Any]:
    """Class specialization and speed-up of LeNet-5 by sparse momentum at 5 %, against dense."""
    jobs = [(seed, context.work, context.quick) for seed in context.seeds]
    rows = context.map(one_seed, jobs)
    speeds = context.alone(speeds_of, jobs)
    scores: dict[str, dict[str, Tensor]] = {
        kind: {
            layer: torch.tensor(row["scores"])
            for layer, row in rows[0]["specialization"][kind].items()
        }
        for kind in ("sparse", "dense")
    }
    histograms(scores, context.work / "specialization.svg", low=0.1)
    layers = [*FEATURES, "all"]
    differences = {
        layer: spread([r["comparison"][layer]["difference"] for r in rows]) for layer in layers
    }
    factors = {
        figure: {kind: spread([s[kind][key] for s in speeds]) for kind in ("sparse", "dense")}
        for figure, key in FACTORS.items()
    }
    return {
        "difference_of_means": differences,
        "error": {k: spread([r["error"][k] for r in rows]) for k in ("sparse", "dense")},
        "speed_up": factors,
        "threads": 1,
        "runs": rows,
        "speeds": speeds,
    }
