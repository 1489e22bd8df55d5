"""What ``auto`` loses to the fastest engine on networks of every kind, dense ones among them.

Twenty networks with random weights, batch 1, one thread: :func:`gossamer.compile` with its
defaults beside onnxruntime, OpenVINO where it is installed, and torch, all in float32 and
interleaved in one run a network; a time is the least of that thread's own seconds. torch.compile
takes minutes to prepare and is left out. Sparse networks keep a tenth of the weights of their
matrices but the first one's, which chance picks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gossamer import nets
from gossamer.experiments import Claim, Context, experiment
from gossamer.runtime.bench import bench
from gossamer.runtime.engines import Subject, installed

__all__ = ["NETWORKS", "auto", "measured"]

# name -> network, shape of an input (None: 32 tokens), part of the weights kept, options
NETWORKS: dict[str, tuple[str, tuple[int, ...] | None, float, dict[str, Any]]] = {
    "mlp 64-32-10": ("mlp", (64,), 1.0, {"sizes": (64, 32, 10)}),
    "mlp 784-1024-1024-10": ("mlp", (784,), 1.0, {"sizes": (784, 1024, 1024, 10)}),
    "mlp 784-1024-1024-10, sparse": ("mlp", (784,), 0.1, {"sizes": (784, 1024, 1024, 10)}),
    "lenet-300-100": ("lenet-300-100", (1, 28, 28), 1.0, {}),
    "lenet-300-100, sparse": ("lenet-300-100", (1, 28, 28), 0.1, {}),
    "lenet-5": ("lenet-5", (1, 28, 28), 1.0, {}),
    "lenet-5, sparse": ("lenet-5", (1, 28, 28), 0.1, {}),
    "conv-2": ("conv-2", (3, 32, 32), 1.0, {}),
    "conv-4, sparse": ("conv-4", (3, 32, 32), 0.1, {}),
    "conv-6": ("conv-6", (3, 32, 32), 1.0, {}),
    "convnet": ("convnet", (3, 32, 32), 1.0, {}),
    "alexnet": ("alexnet", (3, 227, 227), 1.0, {}),
    "alexnet, sparse": ("alexnet", (3, 227, 227), 0.1, {}),
    "vgg-11": ("vgg-11", (3, 32, 32), 1.0, {}),
    "vgg-16, sparse": ("vgg-16", (3, 32, 32), 0.1, {}),
    "resnet-20": ("resnet-20", (3, 32, 32), 1.0, {}),
    "resnet-20, sparse": ("resnet-20", (3, 32, 32), 0.1, {}),
    "resnet-56, sparse": ("resnet-56", (3, 32, 32), 0.1, {}),
    "wrn-16-2": ("wrn-16-2", (3, 32, 32), 1.0, {}),
    "gpt": (
        "gpt", None, 1.0,
        {"classes": 256, "width": 128, "layers": 2, "heads": 4, "context": 32, "tied": False},
    ),
}  # fmt: skip
ENGINES = ("gossamer", "torch", "onnxruntime", "openvino")
_MOST = 0.03


def _made(name: str) -> tuple[nn.Module, torch.Tensor]:
    kind, shape, kept, options = NETWORKS[name]
    draw = torch.Generator().manual_seed(0)
    if shape is None:
        example = torch.randint(256, (1, 32), generator=draw)
    else:
        example = torch.randn(1, *shape, generator=draw)
        if len(shape) > 1:
            options = {"in_shape": shape, **options}
    net = nets.build(kind, seed=0, **options)
    with torch.no_grad():
        for p in [p for p in net.parameters() if p.ndim > 1][1:]:
            p.mul_(torch.rand(p.shape, generator=draw) < kept)
    return net.eval(), example


def measured(name: str, quick: bool) -> dict[str, Any]:
    """Least milliseconds of a network in each engine."""
    net, example = _made(name)
    found = bench(
        [Subject(name, net, example)],
        engines=[engine for engine in ENGINES if installed(engine)],
        rounds=3 if quick else 200,
        seconds=1.0 if quick else 4.0,
        clock=time.thread_time,
    )
    return {
        "name": name,
        "ms": {t.engine: t.least_ms for t in found.timings},
        "notes": list(found.notes),
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    lost = {}
    for row in raw["networks"]:
        best = min(ms for engine, ms in row["ms"].items() if engine != "gossamer")
        lost[row["name"]] = row["ms"]["gossamer"] / best - 1
    worst = max(lost, key=lambda name: lost[name])
    what = f"auto: most that it loses to the best engine on one of {len(lost)} networks ({worst})"
    return [Claim("inference.auto", what, lost[worst], "<=", _MOST)]


@experiment("inference-auto", seeds=(0,), judge=_judge)
def auto(context: Context) -> dict[str, Any]:
    """Inference: auto is no slower than the best dense engine on 20 networks."""
    names = list(NETWORKS)[:2] if context.quick else list(NETWORKS)
    rows = context.alone(measured, [(name, context.quick) for name in names])
    for row in rows:
        context.say(f"{row['name']}: " + ", ".join(f"{e} {v:.4f}" for e, v in row["ms"].items()))
    return {"networks": rows}
