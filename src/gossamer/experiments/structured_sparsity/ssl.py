"""Structured sparsity learning of LeNet and of a perceptron on MNIST.

Wen et al., NIPS 2016, tables 1 and 2 and section 4.1. Deviation: the strength is not one number
but grows from round to round, an epoch each, and what died is taken out between rounds; a round's
learning rate falls to 0. So no strength has to be searched, and a point of the table is where its
count of multiplications is first reached. Then the zero groups stay, and the small network is
fine-tuned without the lasso. Test images are only evaluated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import nets
from gossamer.core.method import Masked
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.lenets import error, mnist
from gossamer.experiments.structured_sparsity.path import Pull, dead, path
from gossamer.nets.classic import mlp
from gossamer.structure import shrink
from gossamer.training import TrainConfig, evaluate, train

__all__ = ["ssl_lenet", "ssl_mlp"]

_PAGE = "structured-sparsity"
_CONFIG = TrainConfig(1, lr=0.05, batch_size=128, schedule="cosine", weight_decay=5e-4)
_LENET: list[Pull] = [
    ("conv1", "filter", 1.0), ("conv2", "filter", 1.0), ("conv2", "channel", 1.0),
]  # fmt: skip
_MLP: list[Pull] = [(f"fc{i}", kind, 1.0) for i in (1, 2) for kind in ("row", "column")]


def widths(net: nn.Module) -> list[tuple[int, int]]:
    """Rows and columns of each layer's matrix."""
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return [(len(m.weight), m.weight[0].numel()) for m in layers]


def _lenet_flop(net: nn.Module) -> float:
    """Multiplications of conv2 over those of the dense layer, dead units out on both sides."""
    rows, columns = widths(net)[1]
    return rows * columns / (50 * 20 * 25)


def _mlp_flop(net: nn.Module) -> float:
    """Of fc1: inputs that no unit reads count as taken out."""
    weight = net.get_parameter("fc1.weight").detach()
    return int(weight.any(0).sum()) * int(weight.any(1).sum()) / (784 * 500)


def _run(
    net: nn.Module,
    pulls: list[Pull],
    cost: Callable[[nn.Module], float],
    targets: tuple[float, ...],
    strengths: list[float],
    epochs: tuple[int, int],
    config: TrainConfig,
    seed: int,
    work: Path,
    quick: bool,
) -> dict[str, Any]:
    """A dense training, the path, and the fine-tuning at each target."""
    data = mnist(quick)
    example, _ = data.validation.batch(torch.arange(64))
    dense, fine = (1, 1) if quick else epochs
    config = replace(config, seed=1000 * seed)
    train(net, data, replace(config, epochs=dense), checkpoint=work / f"dense-{seed}.pt")
    points = []
    row = {
        "seed": seed,
        "error": error(evaluate(net, data.test)),
        "validation_error": error(evaluate(net, data.validation)),
    }
    found = path(net, data, pulls, strengths, config, cost, targets,
                 lambda made: shrink(made, example).model, work / f"path-{seed}")  # fmt: skip
    for number, (target, strength, reached) in enumerate(found):
        tuned = copy.deepcopy(reached)
        train(
            tuned,
            data,
            replace(config, epochs=fine, seed=config.seed + 500 + number),
            methods=[Masked(dead(tuned, pulls))],
            checkpoint=work / f"tuned-{seed}-{number}.pt",
        )
        tuned = shrink(tuned, example).model
        points.append(
            {
                "target": target,
                "strength": strength,
                "flop": cost(tuned),
                "matrices": widths(tuned),
                "parameters": sum(p.numel() for p in tuned.parameters()),
                "validation_error": error(evaluate(tuned, data.validation)),
                "error": error(evaluate(tuned, data.test)),
            }
        )
    return {**row, "points": points}


def lenet(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """LeNet: filters of both convolutions, channels of the second."""
    net = nets.build("lenet-5", seed=seed)
    strengths = [0.01 * 1.5**i for i in range(2 if quick else 12)]
    return _run(net, _LENET, _lenet_flop, (1.0, 1.0) if quick else (0.1, 0.04), strengths, (4, 10),
                _CONFIG, seed, work, quick)  # fmt: skip


def perceptron(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """784-500-300-10 with dropout .4: rows and columns of the first two layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = mlp(sizes=(784, 500, 300, 10), dropout=0.4)
    strengths = [0.0015 * 1.15**i for i in range(2 if quick else 16)]
    return _run(net, _MLP, _mlp_flop, (1.0,) if quick else (0.36,), strengths, (20, 40),
                replace(_CONFIG, weight_decay=1e-4), seed, work, quick)  # fmt: skip


def _point(rows: list[dict[str, Any]], number: int, key: str) -> list[float]:
    return [row["points"][number][key] for row in rows]


def _claims(
    rows: list[dict[str, Any]], number: str, where: int, what: str, flop: float, most: float
) -> list[Claim]:
    return [
        Claim(
            f"{_PAGE}.{number}",
            f"{what} after removal, % of dense, largest of the seeds",
            100 * max(_point(rows, where, "flop")),
            "<=",
            flop,
        ),
        Claim(
            f"{_PAGE}.{number}",
            f"test error there, %, mean of {len(rows)} seeds",
            spread(_point(rows, where, "error"))["mean"],
            "<=",
            most,
        ),
    ]


def _judge_lenet(raw: Mapping[str, Any]) -> list[Claim]:
    rows = raw["runs"]
    return [
        *_claims(rows, "1", 0, "conv2 multiplications of LeNet, first point,", 10, 0.9),
        *_claims(rows, "1", 1, "conv2 multiplications of LeNet, second point,", 4, 1.1),
    ]


def _judge_mlp(raw: Mapping[str, Any]) -> list[Claim]:
    return _claims(raw["runs"], "2", 0, "fc1 multiplications of 784-500-300-10", 36, 1.5)


@experiment("ssl-lenet", judge=_judge_lenet)
def ssl_lenet(context: Context) -> dict[str, Any]:
    """Structured sparsity 1: LeNet's filters and channels, taken out, on MNIST."""
    return {"runs": context.map(lenet, [(s, context.work, context.quick) for s in context.seeds])}


@experiment("ssl-mlp", judge=_judge_mlp)
def ssl_mlp(context: Context) -> dict[str, Any]:
    """Structured sparsity 2: a perceptron's rows and columns on MNIST."""
    jobs = [(s, context.work, context.quick) for s in context.seeds]
    return {"runs": context.map(perceptron, jobs)}
