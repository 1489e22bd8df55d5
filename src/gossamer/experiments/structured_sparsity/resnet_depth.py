"""ResNet-20 on CIFAR-10 without some of its residual blocks, at what cost: point 6 of the page.

From the published weights, where structured sparsity learning (Wen et al., NIPS 2016, section 4.2)
trains with a lasso over whole layers. Blocks go one by one, each time the one without which most
validation images stay right: the weights behind its branch are set to zero, and
:func:`gossamer.structure.shrink` takes out what then feeds nothing. Batch-norm is measured anew.
The figure is the validation error by blocks taken out, before any training. The network without the
first of them, two convolutions fewer, is trained for two epochs against the soft outputs of the
whole one, in bfloat16 with float32 weights. The published weights were trained on the validation
images too, so that they tell blocks apart and no more; test images are only evaluated, in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import nets
from gossamer.datasets import Dataset
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.low_rank.network import calibration, cifar, first
from gossamer.experiments.shared.mixed import Mixed
from gossamer.structure import shrink
from gossamer.training import TrainConfig, evaluate, train
from gossamer.training.renorm import reestimate

__all__ = ["resnet_depth", "without"]

_EPOCHS, _GONE, _DEEPEST = 2, 1, 4  # epochs; blocks that go for good, and in the figure
_CONFIG = TrainConfig(
    _EPOCHS, batch_size=128, lr=0.02, nesterov=True, weight_decay=1e-4, schedule="cosine"
)


def _dense() -> nn.Module:
    return nets.build("resnet-20", pretrained=True).eval()


def _data(quick: bool) -> Dataset:
    """CIFAR-10; of a smoke run 50 images to evaluate."""
    data = cifar(quick)
    if not quick:
        return data
    return replace(data, validation=first(data.validation, 50), test=first(data.test, 50))


def _convolutions(net: nn.Module) -> int:
    """Layers of 3 x 3 weights that are left."""
    return sum(p.ndim == 4 and p.shape[-1] == 3 for p in net.parameters())


def _blocks(net: nn.Module) -> list[str]:
    """Residual blocks by name."""
    return [name.removesuffix(".conv2") for name, _ in net.named_modules() if ".conv2" in name]


def without(net: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """The network in which these blocks are their shortcuts."""
    made = copy.deepcopy(net)
    with torch.no_grad():
        for block in blocks:
            for part in ("conv2.weight", "bn2.weight", "bn2.bias"):
                made.get_parameter(f"{block}.{part}").zero_()
    example = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return shrink(made, example).model


def _shallower(blocks: Sequence[str], quick: bool) -> nn.Module:
    net = _dense()
    made = without(net, blocks)
    images = calibration(64 if quick else 512, quick)
    reestimate(made, net, images[:-1], images[-1:])
    return made


def _next(gone: list[str], quick: bool) -> dict[str, Any]:
    """Validation error, %, without one block more, by block; and the block that costs least."""
    data = first(_data(quick).validation, 50 if quick else 2000)
    every = [block for block in _blocks(_dense()) if block not in gone]
    errors = {
        block: 100 - 100 * evaluate(_shallower([*gone, block], quick), data).accuracy
        for block in (every[:2] if quick else every)
    }
    best = min(errors, key=lambda block: errors[block])
    return {"errors": errors, "block": best, "error": errors[best]}


def _trained(gone: list[str], work: Path, quick: bool) -> dict[str, Any]:
    """Two epochs without these blocks; errors in percent."""
    data, net, epochs = _data(quick), _shallower(gone, quick), 1 if quick else _EPOCHS
    before = evaluate(net, data.test)
    train(
        Mixed(net), data, replace(_CONFIG, epochs=epochs), teacher=Mixed(_dense()),
        evaluate_every=epochs, checkpoint=work / f"train-{len(gone)}.pt",
    )  # fmt: skip
    return {
        "blocks": gone, "epochs": epochs, "untrained": 100 - 100 * before.accuracy,
        "validation": 100 - 100 * evaluate(net, data.validation).accuracy,
        "error": 100 - 100 * evaluate(net, data.test).accuracy,
        "convolutions": _convolutions(net),
    }  # fmt: skip


def _whole(quick: bool) -> dict[str, Any]:
    data, net = _data(quick), _dense()
    return {
        "error": 100 - 100 * evaluate(net, data.test).accuracy,
        "validation": 100
        - 100 * evaluate(net, first(data.validation, 50 if quick else 2000)).accuracy,
        "convolutions": _convolutions(net),
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    dense, page, claims = raw["dense"], "structured-sparsity.6", []
    for row in raw["trained"]:
        what = f"ResNet-20 without {', '.join(row['blocks'])}, {row['epochs']} epochs"
        fewer = dense["convolutions"] - row["convolutions"]
        claims += [
            Claim(page, f"{what}: layers fewer", fewer, ">=", 2),
            Claim(
                page,
                f"{what}: points of test error over its own baseline ({dense['error']:.2f} %)",
                row["error"] - dense["error"],
                "<=",
                0.3,
            ),
        ]
    return claims


@experiment("resnet-depth", seeds=(0,), judge=_judge)
def resnet_depth(context: Context) -> dict[str, Any]:
    """Structured sparsity 6: ResNet-20 without residual blocks, and its error by their number."""
    work, quick = context.work, context.quick
    (dense,) = context.map(_whole, [(quick,)])
    gone: list[str] = []
    steps = []
    for _ in range(2 if quick else _DEEPEST):
        (step,) = context.map(_next, [(gone, quick)])
        gone = [*gone, step["block"]]
        context.say(f"without {', '.join(gone)}: {step['error']:.2f} % of validation images wrong")
        steps.append(step)
    trained = context.map(_trained, [(gone[:_GONE], work, quick)])
    for row in trained:
        context.say(f"{row['error']:.2f} % of {dense['error']:.2f} %")
    return {
        "dense": dense, "steps": steps, "trained": trained,
        "note": "the published weights were trained on the validation images too",
    }  # fmt: skip
