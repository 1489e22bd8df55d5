"""Two figures of structured sparsity learning, of LeNet on MNIST: 2-D filters, and components.

Wen et al., NIPS 2016, the figures of AlexNet: the fraction of 2-D filters W[n, c] that are zero and
of multiplications that go with them, against the error; and the error of a layer's filters made
again from their principal components, against the number of these. Deviations: LeNet on 10,000
images, and one strength that grows from round to round (:mod:`.path`), a point wherever a target is
reached, fine-tuned with its zero groups held. The dense network is trained on for as many epochs as
the last point has. Nothing is asked of either figure, so there is no claim.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gossamer import datasets, nets
from gossamer.analysis import components_for, lines, pictures, reconstruction_errors
from gossamer.core.method import Masked
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.low_rank.network import first
from gossamer.experiments.shared.lenets import error
from gossamer.experiments.structured_sparsity.path import Pull, dead, path
from gossamer.training import TrainConfig, evaluate, train

__all__ = ["draw", "filters_2d", "one_seed"]

_LAYERS = ("conv1", "conv2")
_PULLS: list[Pull] = [(layer, "2d-filter", 1.0) for layer in _LAYERS]
_TARGETS = (0.8, 0.6, 0.4, 0.2, 0.1)  # of conv2's 2-D filters
_CONFIG = TrainConfig(1, lr=0.03, batch_size=64, schedule="cosine", weight_decay=5e-4)
_DENSE, _FINE = 6, 3


def filters_2d(net: nn.Module) -> tuple[Tensor, Tensor]:
    """The 2-D filters of LeNet's two convolutions that count: bool, (20, 1) and (50, 20).

    Those that are not zero, without what a zero filter makes and what nobody reads.
    """
    one, two = (
        net.get_parameter(f"{layer}.weight").detach().flatten(2).any(2) for layer in _LAYERS
    )
    return one & two.any(0)[:, None], two & one.any(1)


def _left(net: nn.Module) -> float:
    """Fraction of conv2's 2-D filters that count."""
    return float(filters_2d(net)[1].double().mean())


def _seen(net: nn.Module, data: datasets.Dataset) -> dict[str, Any]:
    """The figures of one network."""
    one, two = filters_2d(net)
    macs = 25 * (24 * 24 * int(one.sum()) + 8 * 8 * int(two.sum()))
    found = {
        layer: reconstruction_errors(net.get_parameter(f"{layer}.weight")) for layer in _LAYERS
    }
    return {
        "validation_error": error(evaluate(net, data.validation)),
        "error": error(evaluate(net, data.test)),
        "sparsity_2d": {
            layer: 1 - float(kept.double().mean())
            for layer, kept in zip(_LAYERS, (one, two), strict=True)
        },
        "fewer_macs": 1 - macs / (25 * (24 * 24 * one.numel() + 8 * 8 * two.numel())),
        "reconstruction_error": found,
        "components_of_95": {layer: components_for(e, 0.95) for layer, e in found.items()},
    }


def one_seed(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """The dense network trained on, and the points of the path."""
    data = datasets.load("mnist", subset=500 if quick else 10_000)
    if quick:
        data = replace(data, validation=first(data.validation, 50), test=first(data.test, 50))
    config = replace(_CONFIG, seed=1000 * seed)
    net = nets.build("lenet-5", seed=seed)
    start = replace(config, epochs=1 if quick else _DENSE)
    train(net, data, start, checkpoint=work / f"dense-{seed}.pt")
    dense = copy.deepcopy(net)
    rounds: list[float] = []

    def counted(made: nn.Module) -> nn.Module:
        rounds.append(_left(made))
        return made

    strengths = [0.005 * 1.3**i for i in range(2 if quick else 16)]
    tuned = replace(config, epochs=1 if quick else _FINE, seed=config.seed + 500)
    points: list[dict[str, Any]] = []
    sparse: list[nn.Module] = []
    for number, (target, strength, reached) in enumerate(
        path(net, data, _PULLS, strengths, config, _left, (1.0,) if quick else _TARGETS, counted,
             work / f"path-{seed}")
    ):  # fmt: skip
        made = copy.deepcopy(reached)
        train(
            made,
            data,
            tuned,
            methods=[Masked(dead(made, _PULLS))],
            checkpoint=work / f"tuned-{seed}-{number}.pt",
        )
        sparse.append(made)
        points.append({"target": target, "strength": strength, **_seen(made, data)})
    longer = replace(tuned, epochs=tuned.epochs + len(rounds))
    train(dense, data, longer, checkpoint=work / f"longer-{seed}.pt")
    for name, model in zip(("before", "after"), (dense, sparse[-1]), strict=False):
        kernels = model.get_parameter("conv2.weight").detach()[:10, :10]
        pictures(kernels.abs(), work / f"kernels-{seed}-{name}.svg")
    return {
        "seed": seed,
        "images": len(data.train),
        "left_by_round": rounds,
        "dense": _seen(dense, data),
        "points": points,
    }


def draw(raw: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw both figures of the first seed from a results file's figures; the files' names."""
    row = raw["runs"][0]
    every = [row["dense"], *row["points"]]
    zero = {
        f"2-D filters of {layer}": [(p["error"], 100 * p["sparsity_2d"][layer]) for p in every]
        for layer in _LAYERS
    }
    less = {"multiplications": [(p["error"], 100 * p["fewer_macs"]) for p in every]}
    names = ["dense", *(f"{100 * p['sparsity_2d']['conv2']:.0f} % zero" for p in row["points"])]
    components = {
        layer: {
            name: [(float(k), 100 * e) for k, e in enumerate(p["reconstruction_error"][layer])]
            for name, p in zip(names, every, strict=True)
        }
        for layer in _LAYERS
    }
    made = (
        lines({"LeNet": {**zero, **less}}, folder / "2d-filters.svg",
              xlabel="test error, %", ylabel="less, %"),
        lines(components, folder / "components.svg",
              xlabel="principal components", ylabel="reconstruction error, %"),
    )  # fmt: skip
    return [file.name for file in made]


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    """Figures of the paper, of which nothing is asked."""
    return []


@experiment("ssl-figures", seeds=(0,), judge=_judge)
def ssl_figures(context: Context) -> dict[str, Any]:
    """Structured sparsity: 2-D filters against error, and principal components of the filters."""
    jobs = [(s, context.work, context.quick) for s in context.seeds]
    raw = {"runs": context.map(one_seed, jobs)}
    return {**raw, "pictures": draw(raw, context.work)}
