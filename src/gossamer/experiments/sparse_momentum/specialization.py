"""Class specialization and the three speed-up figures of a sparse LeNet-5 against a dense one.

Dettmers and Zettlemoyer, *Sparse Networks from Scratch*, arXiv 1907.04840, sections 4.2 and 5.2.
LeNet-5-Caffe at 5 % of its weights, pruned before training (SNIP), and dense, from the same
initial weights, 3 epochs each on MNIST; measured on the test split. The paper's sparse features
are more general, clearly so in AlexNet only: what is measured here is reported, not judged.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.analysis import compare, histograms, specialization, speedups
from gossamer.core.masks import Masks
from gossamer.core.method import Masked
from gossamer.datasets import Split
from gossamer.experiments import Context, experiment, spread
from gossamer.experiments.shared.lenets import error, mnist
from gossamer.prune import snip
from gossamer.training import TrainConfig, evaluate, train

__all__ = ["sparse_specialization"]

DENSITY = 0.05
CONFIG = TrainConfig(3, batch_size=100, lr=0.05, weight_decay=5e-4, schedule="cosine")
FEATURES = ("conv1", "conv2", "ip1")  # ip2's units are the classes


def measured_on(quick: bool) -> Split:
    """The test split; 500 of its images in a smoke run."""
    test = mnist(quick).test
    return test.take(slice(0, 500)) if quick else test


def networks(seed: int, work: Path, quick: bool) -> dict[str, nn.Module]:
    """The sparse and the dense network of one seed, trained."""
    data = mnist(quick)
    found: dict[str, nn.Module] = {}
    for kind in ("sparse", "dense"):
        model = nets.build("lenet-5", seed=seed)
        masks: Masks | None = None
        if kind == "sparse":
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(data.train), generator=generator)
            masks = snip.prune(model, [data.train.batch(order[:100])], DENSITY)
        work.mkdir(parents=True, exist_ok=True)
        train(
            model,
            data,
            replace(CONFIG, seed=seed, epochs=1 if quick else CONFIG.epochs),
            methods=[] if masks is None else [Masked(masks)],
            checkpoint=work / f"{kind}-{seed}.pt",
        )
        found[kind] = model
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


@experiment("sparse-specialization", judge=lambda raw: [])
def sparse_specialization(context: Context) -> dict[str, Any]:
    """Class specialization and speed-up figures of LeNet-5 at 5 %, sparse against dense."""
    jobs = [(seed, context.work, context.quick) for seed in context.seeds]
    rows = context.map(one_seed, jobs)
    # the trained ones are loaded from their checkpoints; timed alone, one thread, one after another
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        test = measured_on(context.quick)
        speeds = [
            {
                kind: speedups(model, test, rounds=3 if context.quick else 50)
                for kind, model in networks(*job).items()
            }
            for job in jobs
        ]
    finally:
        torch.set_num_threads(threads)
    context.say(speeds[0]["sparse"].table())
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
        figure: {
            kind: spread([getattr(s[kind], figure) for s in speeds]) for kind in ("sparse", "dense")
        }
        for figure in ("channel", "ideal", "measured")
    }
    return {
        "difference_of_means": differences,
        "error": {k: spread([r["error"][k] for r in rows]) for k in ("sparse", "dense")},
        "speed_up": factors,
        "threads": 1,
        "runs": rows,
        "speeds": [{kind: found.as_dict() for kind, found in s.items()} for s in speeds],
    }
