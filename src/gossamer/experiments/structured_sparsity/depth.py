"""ResNet-20 on CIFAR-10 with fewer layers: whole residual blocks go, two convolutions each.

The depth of Wen et al., NIPS 2016, table 4, from published weights in place of training with group
lasso: the block goes whose branch is missed least, by the loss on validation images with
batch-norm measured anew, then the next one of what is left. A branch of zeros is collapsed to its
shortcut by :func:`gossamer.structure.shrink`. The network without the first of them is trained for
a few epochs against the published network's soft outputs, in bfloat16 with float32 weights, on
images that are cropped and mirrored.

The published weights were trained on the validation images too: these tell blocks apart and no
more. Test images are only evaluated, in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.core import flops
from gossamer.datasets import Split
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.low_rank.network import briefly, calibration, first
from gossamer.experiments.shared.mixed import Mixed
from gossamer.nets.resnet import BasicBlock
from gossamer.structure import shrink
from gossamer.training import TrainConfig, evaluate, train
from gossamer.training.renorm import reestimate

__all__ = ["blocks", "resnet_depth", "without"]

_MOST = 4  # blocks taken out for the figure
_TRAINED = (1,)  # blocks out of networks that are trained
_EPOCHS = 3
_CONFIG = TrainConfig(
    _EPOCHS, batch_size=128, lr=0.02, nesterov=True, weight_decay=1e-4, schedule="cosine"
)


def _dense() -> nn.Module:
    return nets.build("resnet-20", pretrained=True).eval()


def _example() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def blocks(net: nn.Module) -> dict[str, BasicBlock]:
    """Its residual blocks that have a branch."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, BasicBlock) and isinstance(module.conv2, nn.Conv2d)
    }


@torch.no_grad()
def without(net: nn.Module, name: str) -> nn.Module:
    """A copy whose block of that name is its shortcut."""
    made = copy.deepcopy(net)
    block = blocks(made)[name]
    for p in (block.conv2.weight, block.bn2.weight, block.bn2.bias):
        p.zero_()
    return shrink(made, _example()).model


def _layers(net: nn.Module) -> int:
    return sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in net.modules())


def _known(net: nn.Module) -> dict[str, Any]:
    return {
        "layers": _layers(net),
        "macs": flops.count(net, _example()).totals()["macs"],
        "parameters": sum(p.numel() for p in net.parameters()),
    }


def _order(work: Path, quick: bool) -> list[dict[str, Any]]:
    """Blocks one after the other, without training; validation error in percent after each."""
    dense, images = _dense(), calibration(64 if quick else 512, quick)
    seen = first(briefly(quick).validation, 50 if quick else 1000)
    net, rows = dense, [{"block": None, "error": _error(dense, seen), **_known(dense)}]
    for number in range(1, (1 if quick else _MOST) + 1):
        tried = {}
        for name in list(blocks(net))[: 2 if quick else None]:
            made = without(net, name)
            reestimate(made, dense, images[:-1], images[-1:])
            tried[name] = (evaluate(made, seen).loss, made)
        name = min(tried, key=lambda n: tried[n][0])
        net = tried[name][1]
        torch.save(net, work / f"without-{number}.pt")
        losses = {n: loss for n, (loss, _) in tried.items()}
        rows.append({"block": name, "losses": losses, "error": _error(net, seen), **_known(net)})
    return rows


def _error(net: nn.Module, split: Split) -> float:
    return 100 - 100 * evaluate(net, split).accuracy


def _trained(removed: int, work: Path, quick: bool) -> dict[str, Any]:
    """A few epochs against the published network's soft outputs; errors in percent."""
    data = briefly(quick)
    path = work / f"without-{removed}.pt"
    net: nn.Module = torch.load(path, weights_only=False)  # written by this run
    untrained = _error(net, data.test)
    epochs = 1 if quick else _EPOCHS
    train(
        Mixed(net), data, replace(_CONFIG, epochs=epochs), teacher=Mixed(_dense()),
        evaluate_every=epochs, checkpoint=work / f"train-{removed}.pt",
    )  # fmt: skip
    return {
        "removed": removed, "epochs": epochs, "images": len(data.train), "untrained": untrained,
        "validation": _error(net, data.validation), "error": _error(net, data.test), **_known(net),
    }  # fmt: skip


def _tested(quick: bool) -> dict[str, Any]:
    net = _dense()
    return {"error": _error(net, briefly(quick).test), **_known(net)}


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    dense, page = raw["dense"], "structured-sparsity.6"
    best = min(raw["trained"], key=lambda row: float(row["validation"]))
    what = f"ResNet-20 from published weights, {best['epochs']} epochs after"
    return [
        Claim(page, f"{what}: layers removed", dense["layers"] - best["layers"], ">=", 2),
        Claim(
            page,
            f"{what}: test error above its own baseline's, points",
            best["error"] - dense["error"],
            "<=",
            0.3,
        ),
    ]


@experiment("resnet-depth", seeds=(0,), judge=_judge)
def resnet_depth(context: Context) -> dict[str, Any]:
    """Structured sparsity 6: ResNet-20 without a residual block, from trained weights."""
    work, quick = context.work, context.quick
    (order,) = context.map(_order, [(work, quick)])
    for row in order:
        context.say(f"{row['layers']} layers: {row['error']:.2f} % of validation, no training")
    trained = context.map(
        _trained, [(n, work, quick) for n in (_TRAINED[:1] if quick else _TRAINED)]
    )
    (dense,) = context.map(_tested, [(quick,)])
    for row in trained:
        context.say(f"{row['layers']} layers: {row['error']:.2f} % of {dense['error']:.2f} %")
    return {
        "dense": dense, "order": order, "trained": trained,
        "note": "the published weights were trained on the validation images too",
    }  # fmt: skip
