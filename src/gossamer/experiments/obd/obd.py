"""Optimal Brain Damage on a small convolutional network and MNIST.

LeCun, Denker, Solla, NIPS 1989, figures 1-2: the predicted against the measured increase of the
objective, OBD against magnitude against random removal, and retraining. The network has 3,246
parameters (the paper's had 2,578): convolutions of 4 and 12 maps of 5x5, tanh, average pooling.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import one_of
from gossamer.core.masks import Masks, keep_top
from gossamer.core.method import Masked
from gossamer.datasets import Dataset
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.lenets import error, mnist
from gossamer.prune import magnitude, obd
from gossamer.training import TrainConfig, evaluate, train
from gossamer.training.curvature import hessian_diagonal

__all__ = ["optimal_brain_damage"]

LEVELS = (0.1, 0.2, 0.3, 0.5, 0.6)  # fractions deleted
PATTERNS = 10_000
TRAINING = TrainConfig(20, lr=0.05, schedule="cosine", batch_size=64)
STEPS = (0.8, 0.65, 0.5, 0.4)  # densities on the way to 60 % deleted
RETRAINING = TrainConfig(5, lr=0.02, schedule="cosine", batch_size=64)


def small_net(seed: int) -> nn.Module:
    """The 3,246-parameter network, from torch's initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 4, 5),
                tanh1=nn.Tanh(),
                pool1=nn.AvgPool2d(2),
                conv2=nn.Conv2d(4, 12, 5),
                tanh2=nn.Tanh(),
                pool2=nn.AvgPool2d(2),
                flatten=nn.Flatten(),
                fc=nn.Linear(192, 10),
            )
        )


SCORES = ("obd", "magnitude", "random")


def _scores(
    model: nn.Module, data: Dataset, how: str, seed: int, patterns: int
) -> dict[str, Tensor]:
    one_of("how", how, SCORES)
    if how == "magnitude":
        return magnitude.scores(model)
    if how == "random":
        return magnitude.random_scores(model, torch.Generator().manual_seed(seed))
    weights = names.weights(model)
    part = data.train.take(torch.arange(min(patterns, len(data.train))))
    diagonal = hessian_diagonal(model, part)
    return obd.saliency(weights, {n: diagonal[n] for n in weights})


def _exact_last_layer(model: nn.Module, data: Dataset) -> float:
    """Largest difference of the last layer's diagonal from autograd's, over the largest entry."""
    twin = copy.deepcopy(model).double()
    part = data.train.take(torch.arange(32))
    h = hessian_diagonal(twin, part, include="fc.weight")["fc.weight"]
    weight = twin.get_parameter("fc.weight")
    inputs = part.inputs.double()

    def loss(w: Tensor) -> Tensor:
        out = torch.func.functional_call(twin, {"fc.weight": w}, (inputs,))
        return F.cross_entropy(out, part.targets)

    full = torch.autograd.functional.hessian(loss, weight.detach())
    assert isinstance(full, Tensor)  # one input, one output
    exact = full.reshape(weight.numel(), -1).diagonal().reshape(weight.shape)
    return float((h - exact).abs().max() / exact.abs().max())


def one_seed(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """All figures of one network."""
    data = mnist(quick)
    work.mkdir(parents=True, exist_ok=True)
    model = small_net(seed)
    config = TrainConfig(**{**vars(TRAINING), "seed": seed, "epochs": 2 if quick else 20})
    train(model, data, config, checkpoint=work / f"dense-{seed}.pt")
    patterns = 500 if quick else PATTERNS
    base = evaluate(model, data.train)
    diagonal = hessian_diagonal(
        model, data.train.take(torch.arange(min(patterns, len(data.train))))
    )
    figures: dict[str, Any] = {
        "seed": seed,
        "loss": base.loss,
        "error_dense": error(evaluate(model, data.test)),
        "least_diagonal": min(float(h.min()) for h in diagonal.values()),
        "last_layer_deviation": _exact_last_layer(model, data),
        "increase": {},
        "predicted": {},
    }
    for how in SCORES:
        scores = _scores(model, data, how, seed, patterns)
        for deleted in LEVELS:
            masks = keep_top(scores, 1 - deleted, scope="global")
            damaged = copy.deepcopy(model)
            masks.apply_(damaged)
            key = f"{how} {deleted:g}"
            figures["increase"][key] = evaluate(damaged, data.train).loss - base.loss
            if how == "obd":
                figures["predicted"][key] = obd.predicted_increase(scores, masks)
    within: Masks | None = None
    for i, density in enumerate(STEPS):
        within = keep_top(
            _scores(model, data, "obd", seed, patterns), density, scope="global", within=within
        )
        last = i == len(STEPS) - 1
        epochs = 1 if quick else RETRAINING.epochs * (3 if last else 1)
        train(
            model,
            data,
            TrainConfig(**{**vars(RETRAINING), "seed": seed + 100 * (i + 1), "epochs": epochs}),
            methods=[Masked(within)],
            checkpoint=work / f"retrain-{seed}-{i}.pt",
        )
    figures["error_retrained"] = error(evaluate(model, data.test))
    figures["weights_kept"] = within.kept if within is not None else 0
    return figures


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    rows = raw["runs"]
    change = spread([r["error_retrained"] - r["error_dense"] for r in rows])
    page = "optimal-brain-damage"
    ratios, means = raw["predicted_over_measured"], raw["increase"]
    ordered = [
        tuple(f"{how} {d:g}" for how in ("obd", "magnitude", "random")) for d in (0.3, 0.5, 0.6)
    ]
    by_mean = [means[a]["mean"] < means[b]["mean"] < means[c]["mean"] for a, b, c in ordered]
    by_seed = [
        r["increase"][a] < r["increase"][b] < r["increase"][c] for r in rows for a, b, c in ordered
    ]
    return [
        Claim(
            f"{page}.1",
            "last layer against the exact diagonal, relative, float64",
            max(r["last_layer_deviation"] for r in rows),
            "<=",
            1e-6,
        ),
        Claim(
            f"{page}.2",
            "least entry of the Levenberg-Marquardt diagonal",
            min(r["least_diagonal"] for r in rows),
            ">=",
            0.0,
        ),
        Claim(
            f"{page}.3",
            "predicted over measured increase to 30 %, mean over seeds, least",
            min(r["mean"] for r in ratios.values()),
            ">=",
            0.5,
        ),
        Claim(
            f"{page}.3",
            "the same of single seeds, least",
            min(r["min"] for r in ratios.values()),
            ">=",
            0.5,
        ),
        Claim(
            f"{page}.3",
            "the same of single seeds, largest",
            max(r["max"] for r in ratios.values()),
            "<=",
            2.0,
        ),
        Claim(
            f"{page}.4",
            "OBD < magnitude < random at 30, 50, 60 %, mean over seeds, fraction that holds",
            sum(by_mean) / len(by_mean),
            "==",
            1.0,
        ),
        Claim(
            f"{page}.4",
            "the same of single seeds, fraction that holds",
            sum(by_seed) / len(by_seed),
            "==",
            1.0,
        ),
        Claim(
            f"{page}.5",
            "error change after deleting 60 % and retraining, mean over seeds, points",
            change["mean"],
            "<=",
            0.1,
        ),
    ]


@experiment("optimal-brain-damage", judge=_judge)
def optimal_brain_damage(context: Context) -> dict[str, Any]:
    """Optimal Brain Damage 1-5: exactness, prediction, ordering and retraining on MNIST."""
    rows = context.map(one_seed, [(seed, context.work, context.quick) for seed in context.seeds])
    low = [f"obd {d:g}" for d in LEVELS if d <= 0.3]
    ratios = {key: spread([r["predicted"][key] / r["increase"][key] for r in rows]) for key in low}
    means = {key: spread([r["increase"][key] for r in rows]) for key in rows[0]["increase"]}
    return {
        "increase": means,
        "predicted_over_measured": ratios,
        "error_dense": spread([r["error_dense"] for r in rows]),
        "error_retrained": spread([r["error_retrained"] for r in rows]),
        "runs": rows,
    }
