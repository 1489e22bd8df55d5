"""SNIP on the LeNets and MNIST: pruned before training, in one shot, from one batch.

Lee, Ajanthan, Torr, ICLR 2019, tables 1 and 2, figure 2. Settings of the paper: batches of 100,
SGD with momentum .9, learning rate .1 divided by 10 every 25,000 iterations, weight decay 5e-4.
LeNet-300-100 trains for 100 epochs of 550 steps (55,000 iterations). LeNet-5-Caffe trains for 20
epochs (11,000 iterations) with a cosine in place of the steps: a fifth of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from gossamer import nets
from gossamer.analysis.plots import pictures, pixel_counts
from gossamer.core import names
from gossamer.core.masks import Masks
from gossamer.core.method import Masked
from gossamer.datasets import Split
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.lenets import error, mnist
from gossamer.prune import snip
from gossamer.training import TrainConfig, evaluate, train

__all__ = ["lenet_5_caffe", "lenet_300_100", "trained"]

PAGE = "snip"
BATCH = 100
CONFIGS = {
    "lenet-300-100": TrainConfig(
        100, batch_size=BATCH, lr=0.1, weight_decay=5e-4, schedule="step",
        lr_steps=(25_000 / 55_000, 50_000 / 55_000),
    ),
    "lenet-5": TrainConfig(20, batch_size=BATCH, lr=0.1, weight_decay=5e-4, schedule="cosine"),
}  # fmt: skip
PICTURED = 0.1  # density of the pictures, the paper's lowest row


def one_batch(split: Split, seed: int, count: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    """One batch of a split drawn by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return [split.batch(torch.randperm(len(split), generator=generator)[:count])]


def trained(
    net: str, density: float, seed: int, work: Path, quick: bool
) -> tuple[nn.Module, Masks | None, float]:
    """One network pruned to ``density`` at its initialisation and trained; 1 is the reference.

    Model, masks, and the least test error (percent) of any epoch, which the published one is.
    """
    data = mnist(quick)
    model = nets.build(net, seed=seed)
    masks = None
    if density < 1:
        masks = snip.prune(model, one_batch(data.train, seed), density)
    config = CONFIGS[net]
    work.mkdir(parents=True, exist_ok=True)
    history = train(
        model,
        data,
        replace(config, seed=seed, epochs=1 if quick else config.epochs),
        methods=[] if masks is None else [Masked(masks)],
        checkpoint=work / f"{net}-{density:g}-{seed}.pt",
        monitor={"test": data.test},
    )
    return model, masks, 100 * (1 - max(row["test_accuracy"] for row in history.epochs))


def run_of(net: str, density: float, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """Test error (percent) and what was kept, of one network."""
    model, masks, best = trained(net, density, seed, work, quick)
    weights = names.weights(model)
    total = sum(w.numel() for w in weights.values())
    return {
        "net": net,
        "density": density,
        "seed": seed,
        "error": error(evaluate(model, mnist(quick).test)),
        "best_error": best,
        "weights": total,
        "kept": total if masks is None else masks.kept,
        "nonzero": sum(int(torch.count_nonzero(w)) for w in weights.values()),
        "kept_by_layer": {} if masks is None else masks.densities(),
    }


def exactness(seed: int, quick: bool) -> dict[str, float]:
    """How far the scores are from autograd through a mask variable, and their sum from 1."""
    model = nets.build("lenet-300-100", seed=seed)
    batch = one_batch(mnist(quick).train, seed)
    found = snip.scores(model, batch)
    (inputs, targets), weights = batch[0], names.weights(model)
    c = {name: torch.ones_like(w, requires_grad=True) for name, w in weights.items()}
    outputs = functional_call(model, {n: c[n] * w.detach() for n, w in weights.items()}, (inputs,))
    raw = torch.autograd.grad(F.cross_entropy(outputs, targets), list(c.values()))
    whole = sum(float(g.abs().double().sum()) for g in raw)
    far = max(float((found[n] - g.abs() / whole).abs().max()) for n, g in zip(c, raw, strict=True))
    return {
        # of scores near 1e-6 an absolute deviation would say nothing
        "deviation": far / max(float(s.max()) for s in found.values()),
        "sum_minus_1": abs(sum(float(s.double().sum()) for s in found.values()) - 1),
    }


def _correlation(a: Tensor, b: Tensor) -> float:
    pair = torch.stack([a.double().reshape(-1), b.double().reshape(-1)])
    return float(torch.corrcoef(pair)[0, 1])


def picture_of(seed: int, quick: bool) -> dict[str, Any]:
    """First-layer kept counts of masks from a batch of all digits, and of one digit each.

    With their correlation with the digits' mean images over the training split, and the kept
    weights of a pixel in the outer 4 rings and inside them.
    """
    split = mnist(quick).train
    model = nets.build("lenet-300-100", seed=seed)

    def counts(part: Split) -> Tensor:
        masks = snip.prune(model, one_batch(part, seed), PICTURED)
        return pixel_counts(masks["ip1.weight"], (1, 28, 28))

    digits = [split.take((split.targets == k).nonzero().flatten()) for k in range(10)]
    means = [digit.inputs.mean(0) for digit in digits]
    mixed, single = counts(split), [counts(digit) for digit in digits]
    against = [[_correlation(kept, mean) for mean in means] for kept in single]
    inner = torch.zeros(28, 28, dtype=torch.bool)
    inner[4:-4, 4:-4] = True
    return {
        "seed": seed,
        "correlation": _correlation(mixed, split.inputs.mean(0)),
        "correlation_by_digit": [row[k] for k, row in enumerate(against)],
        "likest_digit": [max(range(10), key=row.__getitem__) for row in against],
        "border": float(mixed[~inner].double().mean()),
        "centre": float(mixed[inner].double().mean()),
        "kept": mixed.tolist(),
        "kept_by_digit": [kept.tolist() for kept in single],
    }


def _errors(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    densities = dict.fromkeys(r["density"] for r in rows)
    return {f"{d:g}": spread([r["error"] for r in rows if r["density"] == d]) for d in densities}


def _inexact(rows: list[dict[str, Any]]) -> int:
    """Pruned runs whose count, in the mask or in the trained weights, is not the budget."""
    pruned = [r for r in rows if r["density"] < 1]
    return sum(
        not r["kept"] == r["nonzero"] == int(r["density"] * r["weights"] + 0.5) for r in pruned
    )


def _count_kept(raw: Mapping[str, Any]) -> Claim:
    what = "runs with another count than asked for"
    return Claim(f"{PAGE}.1", what, _inexact(raw["runs"]), "==", 0)


def _judge_300(raw: Mapping[str, Any]) -> list[Claim]:
    exact, seen = raw["exactness"], raw["picture"]
    steps = f"{CONFIGS['lenet-300-100'].epochs * 550:,} iterations"
    digits = [k == d for r in seen for k, d in enumerate(r["likest_digit"])]
    rows = [
        (1, "scores against autograd through a mask, over the largest score",
         max(e["deviation"] for e in exact), "<=", 1e-6),
        (1, "sum of the scores, deviation from 1", max(e["sum_minus_1"] for e in exact), "<=",
         1e-6),
        *(
            (2, f"{pruned} % pruned, {steps}: error of the last checkpoint, mean over seeds, "
             "percent", raw["error"][density]["mean"], "<=", most)
            for pruned, density, most in ((95, "0.05", 1.9), (98, "0.02", 2.7))
        ),
        (4, "kept weights of a pixel against the mean digit, least correlation of seeds",
         min(r["correlation"] for r in seen), ">=", 0.5),
        (4, "from a batch of one digit, against that digit's mean, least of digits and seeds",
         min(min(r["correlation_by_digit"]) for r in seen), ">=", 0.5),
        (4, "masks from one digit that look most like it among the ten, fraction",
         sum(digits) / len(digits), ">=", 0.9),
        (4, "weights kept for a border pixel over a centre pixel, largest of seeds",
         max(r["border"] / r["centre"] for r in seen), "<", 1.0),
    ]  # fmt: skip
    return [_count_kept(raw), *(Claim(f"{PAGE}.{point}", *rest) for point, *rest in rows)]


@experiment("snip-lenet-300-100", judge=_judge_300)
def lenet_300_100(context: Context) -> dict[str, Any]:
    """SNIP 1, 2, 4: exactness, LeNet-300-100 at 95 and 98 % pruned, the first layer's picture."""
    net = "lenet-300-100"
    jobs = [(net, d, s, context.work, context.quick) for d in (0.05, 0.02, 1.0)
            for s in context.seeds]  # fmt: skip
    rows = context.map(run_of, jobs)
    exact = [exactness(seed, context.quick) for seed in context.seeds]
    seen = [picture_of(seed, context.quick) for seed in context.seeds]
    images = {"all digits": torch.tensor(seen[0]["kept"])}
    by_digit = [r.pop("kept_by_digit") for r in seen]  # 30 pictures are no figures to read
    images |= {str(k): torch.tensor(kept) for k, kept in enumerate(by_digit[0])}
    drawn = pictures(images, context.work / "first-layer.svg", columns=11)
    return {
        "error": _errors(rows), "exactness": exact, "runs": rows, "picture": seen,
        "picture_file": drawn.name,
    }  # fmt: skip


def _judge_5(raw: Mapping[str, Any]) -> list[Claim]:
    error = raw["error"]["0.02"]["mean"]
    return [
        _count_kept(raw),
        Claim(f"{PAGE}.3", "98 % pruned: error, mean over seeds, percent", error, "<=", 1.0),
    ]


@experiment("snip-lenet-5-caffe", judge=_judge_5)
def lenet_5_caffe(context: Context) -> dict[str, Any]:
    """SNIP 1, 3: LeNet-5-Caffe 98 % pruned before training, 20 epochs."""
    jobs = [("lenet-5", d, s, context.work, context.quick) for d in (0.02,)
            for s in context.seeds]  # fmt: skip
    rows = context.map(run_of, jobs)
    return {"error": _errors(rows), "runs": rows}
