"""TernGrad's accuracy: LeNet on MNIST and CifarNet on CIFAR-10, N workers against float.

Wen et al., *TernGrad*, NeurIPS 2017, section 5.1: LeNet 20-50-500, momentum .9, rate .01, weight
decay 5e-4, total batch 64, polynomial decay of power .5 to 0, 10,000 iterations; here
:data:`LENET_STEPS`, named as shortened. CifarNet: two 5 x 5 x 64 convolutions, 384, 192, Adam 2e-4,
weight decay .004 on fully-connected layers, 24 x 24 crops, batch 128, 300,000 iterations; here
:data:`CIFAR_STEPS`, named as reduced.

N workers play in one process, with the bits of N processes (one test starts two): each takes its
part of the batch, their gradients are exchanged under one scale a tensor, one optimizer steps.
Weight decay is the optimizer's, after the exchange, so it is not ternarised. Deviations: no moving
average of parameters; LeNet without SAME padding, and with a ReLU after each convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import datasets, nets
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.datasets import Dataset, Split
from gossamer.distribute import TernGrad
from gossamer.distribute.exchange.average import simulate
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.parts import source
from gossamer.experiments.shared.lenets import mnist
from gossamer.experiments.shared.panels import draw
from gossamer.training import evaluate
from gossamer.training.checkpoints import load_checkpoint, save_atomic

__all__ = ["Setup", "cifarnet", "gradients", "lenet_workers", "parts", "train_workers"]

PAGE = "terngrad"
EXCHANGE: dict[str, Any] = {
    "topology": "all_gather",
    "shared_scale": True,  # scaler sharing, section 3.3
    "threshold": 64,  # elements; biases of 10 and 20 stay float
}


@dataclass(frozen=True)
class Setup:
    """A network and how it is trained.

    Attributes:
        batch: of all workers together.
        optimizer: from the model.
        power: of the rate's polynomial decay to 0; 0: constant.
        crop: side of random crops and mirror images; None: the images as they are.
    """

    net: str
    batch: int
    steps: int
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    power: float
    crop: int | None


def _momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    dense = [p for n, p in model.named_parameters() if n.startswith("fc") and p.ndim > 1]
    held = {id(p) for p in dense}
    rest = [p for p in model.parameters() if id(p) not in held]
    groups: list[dict[str, Any]] = [{"params": dense, "weight_decay": 0.004}, {"params": rest}]
    return torch.optim.Adam(groups, lr=2e-4)


LENET_STEPS = 4000
CIFAR_STEPS = 2500
LENET = Setup("lenet-5", 64, LENET_STEPS, _momentum, 0.5, None)
CIFARNET = Setup("cifarnet", 128, CIFAR_STEPS, _adam, 0.0, 24)


def parts(seed: int, step: int, total: int, batch: int, workers: int) -> list[Tensor]:
    """Indices of every worker's examples at a step: a new order each pass, nothing remembered."""
    a_pass = total // batch
    turn, place = divmod(step, a_pass)
    g = torch.Generator().manual_seed((seed * 1_000_003 + turn) % (1 << 63))
    order = torch.randperm(total, generator=g)[place * batch : (place + 1) * batch]
    return list(order.chunk(workers))


def _cropped(stored: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Each image at a random place, half of them mirrored: (N, C, side, side)."""
    n, _, h, w = stored.shape
    y = torch.randint(0, h - side + 1, (n,), generator=generator)
    x = torch.randint(0, w - side + 1, (n,), generator=generator)
    windows = stored.unfold(2, side, 1).unfold(3, side, 1)[torch.arange(n), :, y, x]
    mirrored = torch.rand(n, generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), windows.flip(3), windows)


def gradients(
    model: nn.Module, split: Split, index: Tensor, crop: int | None, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of some examples, and the gradient of every parameter by clean name."""
    augment = None if crop is None else (lambda x, g: _cropped(x, crop, g))
    inputs, targets = split.batch(index, augment, generator)
    loss = nn.functional.cross_entropy(model(inputs), targets)
    parameters = names.parameters(model)
    found = torch.autograd.grad(loss, list(parameters.values()))
    return loss.detach(), dict(zip(parameters, found, strict=True))


def train_workers(
    setup: Setup, workers: int, seed: int, data: Dataset, checkpoint: Path | None
) -> tuple[nn.Module, list[float]]:
    """Train: ``workers`` = 0 in float, in one piece. The model, and losses every 50 steps."""
    shape = data.in_shape if setup.crop is None else (data.in_shape[0], setup.crop, setup.crop)
    model = nets.build(setup.net, seed=seed, in_shape=shape)
    optimizer, losses, begin = setup.optimizer(model), [], 0
    rates = [group["lr"] for group in optimizer.param_groups]
    made_by = [source(__name__), setup.net, setup.steps, setup.batch, workers, seed]
    if checkpoint is not None and checkpoint.exists():
        state = load_checkpoint(checkpoint)
        if state.get("made_by") != made_by:
            raise ArgumentError(
                f"checkpoint {checkpoint} is of another program or setting; delete it"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses, begin = state["losses"], state["step"]
    model.train()
    for step in range(begin, setup.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / setup.steps) ** setup.power
        indices = parts(seed, step, len(data.train), setup.batch, max(1, workers))
        found = []
        for rank, index in enumerate(indices):
            g = torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + rank)
            found.append(gradients(model, data.train, index, setup.crop, g))
        mean = found[0][1]
        if workers:
            mean = simulate([own for _, own in found], TernGrad(), step=step, seed=seed, **EXCHANGE)
        for name, p in names.parameters(model).items():
            p.grad = mean[name]
        optimizer.step()
        if step % 50 == 0:
            losses.append(float(torch.stack([loss for loss, _ in found]).mean()))
        if checkpoint is not None and (step + 1) % 500 == 0:
            save_atomic(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "losses": losses,
                    "step": step + 1,
                    "made_by": made_by,
                },
                checkpoint,
            )
    return model, losses


def _central(split: Split, side: int) -> Split:
    """The middle of every image."""
    at = (split.stored.shape[2] - side) // 2
    stored = split.stored[:, :, at : at + side, at : at + side].contiguous()
    return Split(stored, split.targets, mean=split.mean, std=split.std)


def _figures(
    setup: Setup, workers: int, seed: int, data: Dataset, checkpoint: Path
) -> dict[str, Any]:
    model, losses = train_workers(setup, workers, seed, data, checkpoint)
    splits = {"validation": data.validation, "test": data.test}
    if setup.crop is not None:
        splits = {name: _central(split, setup.crop) for name, split in splits.items()}
    found = {name: 100 * evaluate(model, split).accuracy for name, split in splits.items()}
    return {"workers": workers, "seed": seed, "losses": losses, **found}


def _lenet_job(workers: int, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    setup = replace(LENET, steps=10) if quick else LENET
    name = f"lenet-{workers}-{seed}-{setup.steps}"
    return _figures(setup, workers, seed, mnist(quick), work / f"{name}.pt")


def _cifar_job(workers: int, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    setup = replace(CIFARNET, steps=2, batch=16) if quick else CIFARNET
    data = datasets.load("cifar10", subset=500 if quick else None)
    if quick:
        few = slice(0, 100)
        data = replace(data, validation=data.validation.take(few), test=data.test.take(few))
    name = f"cifarnet-{workers}-{seed}-{setup.steps}"
    return _figures(setup, workers, seed, data, work / f"{name}.pt")


def _table(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Workers ("float" for none) -> spread of the test accuracy over seeds."""
    counts = sorted({r["workers"] for r in rows})
    return {
        str(n or "float"): spread([r["test"] for r in rows if r["workers"] == n]) for n in counts
    }


def _loss_figure(rows: list[dict[str, Any]], path: Path) -> str:
    lines: dict[str, dict[int, list[float]]] = {}
    for n in sorted({r["workers"] for r in rows}):
        curves = [r["losses"] for r in rows if r["workers"] == n]
        lines[f"N = {n}" if n else "float"] = {
            50 * i + 1: list(values) for i, values in enumerate(zip(*curves, strict=True))
        }
    panel = {"training loss of a batch": lines}
    return draw(panel, path, xlabel="iteration", ylabel="loss", xlog=False).name


def _judge_lenet(raw: Mapping[str, Any]) -> list[Claim]:
    found = raw["accuracy"]
    return [
        Claim(
            f"{PAGE}.5",
            f"{n} workers, {found[n]['n']} seeds: points off float, means",
            abs(found["float"]["mean"] - found[n]["mean"]),
            "<=",
            0.25,
        )
        for n in found
        if n != "float"
    ]


@experiment("terngrad-lenet-workers", judge=_judge_lenet)
def lenet_workers(context: Context) -> dict[str, Any]:
    """TernGrad 5: LeNet on MNIST, 2 to 16 workers against float; shortened to 4,000 iterations."""
    counts = (2,) if context.quick else (2, 4, 8, 16)
    jobs = [(n, s, context.work, context.quick) for n in (0, *counts) for s in context.seeds]
    rows = context.map(_lenet_job, jobs)
    return {
        "iterations": LENET_STEPS,
        "accuracy": _table(rows),
        "picture": _loss_figure(rows, context.work / "lenet-loss.svg"),
        "runs": rows,
    }


@experiment("terngrad-cifarnet", seeds=(0,), judge=lambda raw: [])
def cifarnet(context: Context) -> dict[str, Any]:
    """TernGrad, reduced: CifarNet, 2 workers against float, 2,500 iterations of 300,000."""
    jobs = [(n, s, context.work, context.quick) for n in (0, 2) for s in context.seeds]
    rows = context.map(_cifar_job, jobs)
    found = _table(rows)
    return {
        "iterations": CIFAR_STEPS,
        "gap_points": found["float"]["mean"] - found["2"]["mean"],
        "accuracy": found,
        "picture": _loss_figure(rows, context.work / "cifarnet-loss.svg"),
        "runs": rows,
    }
