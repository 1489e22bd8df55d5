"""Networks with quantized activations under the three estimators: LeNet-5, and a small ResNet-20.

Yin et al., ICLR 2019, arXiv 1903.05662, section 4: batch-norm without scale and shift before each
activation, float weights, alpha of the half-normal distribution, SGD with momentum .9, started
from the trained float network. Schedules are shortened, and named as such.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import datasets, nets
from gossamer.datasets import Dataset
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.layout import channels_last_
from gossamer.experiments.shared.lenets import error, mnist
from gossamer.quantize import QuantizedReLU, normalize_, quantize_activations_
from gossamer.quantize.activations import ESTIMATORS
from gossamer.training import TrainConfig, evaluate, train

__all__ = ["lenet", "resnet_reduced"]

PAGE = "straight-through"
BITS = (2, 4)

# LeNet-5: 5 epochs float, then 16 a cell of 2 bits and 3 of 4 bits. As in the paper all cells have
# one schedule. Its rate: over 3 epochs from one float network the 2-bit cells were, on validation
# images, at 98.96 (ReLU) and 98.70 % (identity) with .05 and batches of 64, 98.92 and 98.60 with
# .1; batches of 128 take twice that.
FLOAT = TrainConfig(5, batch_size=128, lr=0.1, weight_decay=5e-4, schedule="cosine")
CELL = {
    bits: TrainConfig(epochs, batch_size=128, lr=0.2, weight_decay=5e-4, schedule="cosine")
    for bits, epochs in ((2, 16), (4, 3))
}


def _short(config: TrainConfig, seed: int, quick: bool) -> TrainConfig:
    return replace(config, seed=seed, epochs=1 if quick else config.epochs)


def quantized(model: nn.Module, bits: int, estimator: str) -> nn.Module:
    """A copy with its activations quantized, ceil form, alpha of the half-normal distribution."""
    return quantize_activations_(
        copy.deepcopy(model), bits, estimator=estimator, form="ceil", functional=False
    )


def _few(data: Dataset, quick: bool) -> Dataset:
    """A smoke run's data: 500 images to train on, 200 and 200 to evaluate."""
    if not quick:
        return data
    return replace(
        data,
        train=data.train.take(slice(0, 500)),
        validation=data.validation.take(slice(0, 200)),
        test=data.test.take(slice(0, 200)),
    )


def lenet_float(seed: int, work: Path, quick: bool) -> tuple[nn.Module, Dataset]:
    """The float network of one seed, batch-norm before each ReLU, trained once."""
    data = _few(mnist(quick), quick)
    model = nets.build("lenet-5", seed=seed)
    normalize_(model, torch.zeros(2, 1, 28, 28))
    channels_last_(model)
    train(model, data, _short(FLOAT, seed, quick), checkpoint=work / f"float-{seed}.pt")
    return model, data


def lenet_cell(bits: int, estimator: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """One cell: test accuracy in percent at the end, and the training loss."""
    model, data = lenet_float(seed, work, quick)
    student = quantized(model, bits, estimator)
    history = train(
        student,
        data,
        _short(CELL[bits], seed + 100, quick),
        checkpoint=work / f"cell-{bits}-{estimator}-{seed}.pt",
    )
    last = history.epochs[-1]
    return {
        "bits": bits,
        "estimator": estimator,
        "seed": seed,
        "accuracy": 100 - error(evaluate(student, data.test)),
        "validation": 100 * last["validation_accuracy"],
        "train_loss": last["train_loss"],
        "float_accuracy": 100 - error(evaluate(model, data.test)),
    }


def _judge_lenet(raw: Mapping[str, Any]) -> list[Claim]:
    table = raw["accuracy"]
    two = {e: table[f"2 bits, {e}"]["mean"] for e in ESTIMATORS}
    four = {e: table[f"4 bits, {e}"]["mean"] for e in ESTIMATORS}
    claims = [
        Claim(f"{PAGE}.4", f"2 bits, {e}: test accuracy, mean, percent", two[e], ">=", 99.1)
        for e in ("relu", "clipped")
    ]
    claims += [
        Claim(
            f"{PAGE}.4", f"2 bits: {e} less identity, means, points", two[e] - two["identity"],
            ">=", 0.4,
        )
        for e in ("relu", "clipped")
    ]  # fmt: skip
    claims += [
        Claim(
            f"{PAGE}.4", f"4 bits: {e} less identity, means, points", four[e] - four["identity"],
            ">", 0.0,
        )
        for e in ("relu", "clipped")
    ]  # fmt: skip
    return claims


@experiment("ste-lenet", judge=_judge_lenet)
def lenet(context: Context) -> dict[str, Any]:
    """Straight-through 4: LeNet-5, 2 and 4 bits, three estimators; 5 + 16 and 3 epochs (short)."""
    grid = [(bits, estimator) for bits in BITS for estimator in ESTIMATORS]
    where = (context.work, context.quick)
    # the float networks first: every other job starts from one
    context.map(_only_float, [(seed, *where) for seed in context.seeds])
    rows = context.map(lenet_cell, [(b, e, s, *where) for b, e in grid for s in context.seeds])
    table = {
        f"{b} bits, {e}": spread(
            [r["accuracy"] for r in rows if (r["bits"], r["estimator"]) == (b, e)]
        )
        for b, e in grid
    }
    return {
        "accuracy": table,
        "float_accuracy": spread(
            [next(r["float_accuracy"] for r in rows if r["seed"] == s) for s in context.seeds]
        ),
        "epochs": {"float": FLOAT.epochs, **{f"{b} bits": c.epochs for b, c in CELL.items()}},
        "lr": {f"{b} bits": c.lr for b, c in CELL.items()},
        "runs": rows,
    }


def _only_float(seed: int, work: Path, quick: bool) -> None:
    lenet_float(seed, work, quick)


# ResNet-20 at half width on 10,000 images of CIFAR-10: a quarter of the multiplications an image.
WIDTH, IMAGES = 0.5, 10_000
RESNET_FLOAT = TrainConfig(
    30, batch_size=128, lr=0.1, weight_decay=5e-4, schedule="cosine", nesterov=True
)
RESNET_CELL = TrainConfig(10, batch_size=128, lr=0.02, weight_decay=1e-4, schedule="cosine")
RESTART = TrainConfig(5, batch_size=128, lr=1e-5)
STILL = 0.02  # nats; running batch-norm statistics alone move the loss by less


def _cifar(quick: bool) -> Dataset:
    return _few(datasets.load("cifar10", subset=500 if quick else IMAGES), quick)


def resnet_float(seed: int, work: Path, quick: bool) -> tuple[nn.Module, Dataset]:
    """The reduced float network, batch-norm before each ReLU, trained once."""
    data = _cifar(quick)
    model = nets.build("resnet-20", seed=seed, width=0.25 if quick else WIDTH)
    normalize_(model, torch.zeros(2, 3, 32, 32))
    channels_last_(model)
    train(model, data, _short(RESNET_FLOAT, seed, quick), checkpoint=work / f"float-{seed}.pt")
    return model, data


def resnet_cell(bits: int, estimator: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """One cell: validation and test accuracy in percent at the end, and the training loss."""
    model, data = resnet_float(seed, work, quick)
    student = _resnet_quantized(model, data, bits, estimator, seed, work, quick)
    found = evaluate(student, data.test)
    return {
        "bits": bits,
        "estimator": estimator,
        "seed": seed,
        "accuracy": 100 - error(found),
        "float_accuracy": 100 - error(evaluate(model, data.test)),
    }


def _resnet_quantized(
    model: nn.Module,
    data: Dataset,
    bits: int,
    estimator: str,
    seed: int,
    work: Path,
    quick: bool,
) -> nn.Module:
    student = quantized(model, bits, estimator)
    train(
        student,
        data,
        _short(RESNET_CELL, seed + 100, quick),
        checkpoint=work / f"cell-{bits}-{estimator}-{seed}.pt",
    )
    return student


def restarted(estimator: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """From the clipped estimator's 4-bit minimum on with another one at 1e-5: losses by epoch.

    The loss is that of the training split in evaluation mode, before and after each epoch.
    """
    model, data = resnet_float(seed, work, quick)
    student = _resnet_quantized(model, data, 4, "clipped", seed, work, quick)
    for module in student.modules():
        if isinstance(module, QuantizedReLU):
            module.estimator = estimator
    before = evaluate(student, data.train).loss
    history = train(
        student,
        data,
        _short(RESTART, seed + 200, quick),
        checkpoint=work / f"restart-{estimator}-{seed}.pt",
        monitor={"measured": data.train},
    )
    return {
        "estimator": estimator,
        "seed": seed,
        "losses": [before, *(row["measured_loss"] for row in history.epochs)],
    }


def _judge_resnet(raw: Mapping[str, Any]) -> list[Claim]:
    table, restarts = raw["accuracy"], raw["restarts"]

    def change(estimator: str) -> list[float]:
        return [r["losses"][-1] - r["losses"][0] for r in restarts if r["estimator"] == estimator]

    gap = table["2 bits, clipped"]["mean"] - table["2 bits, identity"]["mean"]
    return [
        Claim(f"{PAGE}.5", "2 bits: clipped less identity, points", gap, ">=", 20.0),
        Claim(
            f"{PAGE}.5",
            "restart at 1e-5, identity: rise of the training loss, least of seeds",
            min(change("identity")),
            ">",
            STILL,
        ),
        Claim(
            f"{PAGE}.5",
            "restart at 1e-5, clipped: rise of the training loss, most of seeds",
            max(change("clipped")),
            "<=",
            STILL,
        ),
    ]


@experiment("ste-resnet20-reduced", seeds=(0,), judge=_judge_resnet)
def resnet_reduced(context: Context) -> dict[str, Any]:
    """Straight-through 5: ResNet-20 of half width on 10,000 CIFAR-10 images, 30 + 10 epochs."""
    where = (context.work, context.quick)
    context.map(_only_resnet, [(seed, *where) for seed in context.seeds])
    cells = [(2, "identity"), (2, "relu"), (2, "clipped"), (4, "clipped")]
    rows = context.map(resnet_cell, [(b, e, s, *where) for b, e in cells for s in context.seeds])
    restarts = context.map(
        restarted, [(e, s, *where) for e in ("identity", "clipped") for s in context.seeds]
    )
    table = {
        f"{b} bits, {e}": spread(
            [r["accuracy"] for r in rows if (r["bits"], r["estimator"]) == (b, e)]
        )
        for b, e in cells
    }

    return {"accuracy": table, "runs": rows, "restarts": restarts, "width": WIDTH, "images": IMAGES}


def _only_resnet(seed: int, work: Path, quick: bool) -> None:
    resnet_float(seed, work, quick)
