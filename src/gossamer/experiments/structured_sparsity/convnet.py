"""Structured sparsity of Caffe's ConvNet on CIFAR-10: columns of the second lowered matrix.

Wen et al., NIPS 2016, table 3, on a reduced schedule: 6,000 images and some 20 epochs in place of
50,000 and 200, one strength that grows from round to round. The baseline is trained on for as many
epochs as rounds and fine-tuning take, and the better of its two ends counts, by validation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from gossamer import datasets, nets
from gossamer.core.errors import GossamerError
from gossamer.core.method import Masked
from gossamer.datasets import Dataset
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.layout import channels_last_
from gossamer.experiments.shared.lenets import error
from gossamer.experiments.structured_sparsity.path import Pull, dead, path
from gossamer.training import TrainConfig, evaluate, train

__all__ = ["ssl_convnet"]

_IMAGES, _BASE, _FINE, _TARGET = 6000, 10, 6, 0.45
_CONFIG = TrainConfig(1, lr=0.02, batch_size=50, schedule="cosine", weight_decay=0.002)
_PULLS: list[Pull] = [("conv2", "shape", 1.0)]


def _left(net: nn.Module) -> float:
    """Fraction of conv2's columns that are not zero."""
    return float(net.get_parameter("conv2.weight").detach().flatten(1).any(0).double().mean())


def _trained(
    net: nn.Module, data: Dataset, config: TrainConfig, checkpoint: Path, **options: Any
) -> None:
    hook = channels_last_(net)
    try:
        train(net, data, config, checkpoint=checkpoint, evaluate_every=config.epochs, **options)
    finally:
        hook.remove()


def one_seed(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """Baseline, rounds, fine-tuning, the baseline's training on."""
    data = datasets.load("cifar10", subset=500 if quick else _IMAGES)
    base, fine = (1, 1) if quick else (_BASE, _FINE)
    config = replace(_CONFIG, seed=1000 * seed)
    dense = nets.build("convnet", seed=seed)
    _trained(dense, data, replace(config, epochs=base), work / f"dense-{seed}.pt")
    rounds: list[float] = []

    def counted(net: nn.Module) -> nn.Module:
        rounds.append(_left(net))
        return net

    strengths = [0.005 * 1.5**i for i in range(1 if quick else 12)]
    found = list(
        path(copy.deepcopy(dense), data, _PULLS, strengths, config, _left,
             (1.0,) if quick else (_TARGET,), counted, work / f"path-{seed}")
    )  # fmt: skip
    if not found:
        raise GossamerError(
            f"no strength up to {strengths[-1]:g} left {_TARGET:.0%} of the columns"
        )
    _, strength, sparse = found[0]
    tuned = replace(config, lr=config.lr / 2, seed=config.seed + 500)
    _trained(
        sparse,
        data,
        replace(tuned, epochs=fine),
        work / f"tuned-{seed}.pt",
        methods=[Masked(dead(sparse, _PULLS))],
    )
    longer = copy.deepcopy(dense)
    extra = replace(tuned, epochs=fine + len(rounds))
    _trained(longer, data, extra, work / f"longer-{seed}.pt")
    validation = [error(evaluate(net, data.validation)) for net in (dense, longer)]
    best = (dense, longer)[validation.index(min(validation))]
    weight = sparse.get_parameter("conv2.weight").detach()
    return {
        "seed": seed,
        "strength": strength,
        "columns_left_by_round": rounds,
        "column_sparsity": 1 - _left(sparse),
        "row_sparsity": 1 - float(weight.flatten(1).any(1).double().mean()),
        "validation_error": {
            "baseline": min(validation),
            "sparse": error(evaluate(sparse, data.validation)),
        },
        "error": {
            "baseline": error(evaluate(best, data.test)),
            "sparse": error(evaluate(sparse, data.test)),
        },
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    rows, page = raw["runs"], "structured-sparsity.4"
    return [
        Claim(
            page,
            "conv2 columns that are zero, %, least of the seeds",
            100 * min(r["column_sparsity"] for r in rows),
            ">=",
            55,
        ),
        Claim(
            page,
            "test error above its own baseline's, points, mean of the seeds; reduced schedule",
            spread([r["error"]["sparse"] - r["error"]["baseline"] for r in rows])["mean"],
            "<=",
            0.5,
        ),
    ]


@experiment("ssl-convnet", judge=_judge, seeds=(0,))
def ssl_convnet(context: Context) -> dict[str, Any]:
    """Structured sparsity 4: columns of ConvNet's second layer on 6,000 CIFAR-10 images."""
    return {
        "runs": context.map(one_seed, [(s, context.work, context.quick) for s in context.seeds])
    }
