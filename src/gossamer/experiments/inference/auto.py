"""What ``auto`` loses to the fastest engine on networks of every kind, dense ones among them.

Twenty networks with random weights, batch 1, one thread: :func:`gossamer.compile` with its
defaults beside onnxruntime, OpenVINO where it is installed, and torch, all in float32 and
interleaved in one run a network; a time is the least of that thread's own seconds. torch.compile
takes minutes to prepare and is left out. Sparse networks keep a tenth of the weights of their
matrices but the first one's, which chance picks.

Beyond those twenty, by claims of their own: recurrent networks in float32, and some of the twenty
in eight bits, calibrated on random inputs, beside float32 and eight bits of the same engines. What
``auto`` runs is kept for each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.core.errors import ArgumentError
from gossamer.core.timing import interleaved, threads
from gossamer.experiments import Claim, Context, experiment
from gossamer.runtime.engines import ENGINES, Subject, installed
from gossamer.runtime.plan.door import compile_network
from gossamer.runtime.plan.plan import Plan

__all__ = ["EIGHT_BITS", "LOOPS", "NETWORKS", "auto", "measured"]

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
EIGHT_BITS = ("lenet-5", "conv-6", "vgg-11", "vgg-16, sparse", "resnet-20", "resnet-20, sparse")
LOOPS = {  # name -> layer, steps
    "lstm 2 x 256, 20 steps": (nn.LSTM, 20),
    "lstm 2 x 256, one step": (nn.LSTM, 1),
    "gru 2 x 256, 20 steps": (nn.GRU, 20),
}
FLOATS = ("torch", "onnxruntime", "openvino")
INTEGERS = ("onnxruntime", "openvino", "onnxruntime-int8", "openvino-int8")
_MOST, _CALIBRATION = 0.03, 32


class _Loop(nn.Module):
    """The last step's state of a recurrent layer, classified."""

    def __init__(self, layer: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.layer, self.out = layer(64, 256, 2, batch_first=True), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.layer(x)[0][:, -1])
        return found


def _made(name: str) -> tuple[nn.Module, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    if name in LOOPS:
        layer, steps = LOOPS[name]
        torch.manual_seed(0)
        return _Loop(layer).eval(), torch.randn(1, steps, 64, generator=draw)
    kind, shape, kept, options = NETWORKS[name]
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


def measured(name: str, precision: str, quick: bool) -> dict[str, Any]:
    """Least milliseconds of a network in each engine, and what ``auto`` runs.

    ``precision``: ``float32`` or ``int8``.
    """
    net, example = _made(name)
    if precision == "float32":
        plan = compile_network(net, example)
        return _raced(Subject(name, net, example), plan, FLOATS, quick)
    draw = torch.Generator().manual_seed(1)
    seen = [torch.randn(_CALIBRATION, *example.shape[1:], generator=draw)]
    plan = compile_network(net, example, precision="int8", calibration=seen)
    return _raced(Subject(name, net, example, calibration=seen), plan, INTEGERS, quick)


def _raced(subject: Subject, plan: Plan, engines: Sequence[str], quick: bool) -> dict[str, Any]:
    rows, notes = subject.rows(1), list(plan.facts.notes)
    arrays = [t.numpy() for t in rows]
    calls: dict[str, Any] = {"gossamer": partial(plan.arrays, arrays, plan.batch(arrays))}
    for name in engines:
        if not installed(name):
            continue
        try:
            calls[name] = ENGINES[name].prepare(subject, rows, 1).run
        except ArgumentError as e:
            notes.append(f"{subject.name} is not in {name}: {e}")
    with torch.no_grad(), threads(1):
        taken = interleaved(
            list(calls.values()),
            rounds=3 if quick else 200,
            seconds=1.0 if quick else 4.0,
            clock=time.thread_time,
        )
    return {
        "name": subject.name,
        "ms": {name: 1e3 * min(times) for name, times in zip(calls, taken, strict=True)},
        "runs": f"{plan.facts.engine} in {plan.facts.precision}",
        "candidates": plan.facts.whole,
        "check": plan.facts.check,
        "notes": notes + subject.notes,
    }


_SETS = {
    "networks": ("inference.auto", "auto: most that it loses to the best engine on one of"),
    "loops": ("inference.auto.loops", "auto, LSTM and GRU: most that it loses on one of"),
    "eight_bits": ("inference.auto.int8", "auto in int8: most that it loses to the best on one of"),
}


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for key, (claim, what) in _SETS.items():
        lost = {}
        for row in raw.get(key, ()):
            best = min(ms for engine, ms in row["ms"].items() if engine != "gossamer")
            lost[row["name"]] = row["ms"]["gossamer"] / best - 1
        if lost:
            worst = max(lost, key=lambda name: lost[name])
            told = f"{what} {len(lost)} networks ({worst})"
            claims.append(Claim(claim, told, lost[worst], "<=", _MOST))
    return claims


@experiment("inference-auto", seeds=(0,), judge=_judge)
def auto(context: Context) -> dict[str, Any]:
    """Inference: auto is no slower than the best dense engine on 20 networks."""
    names = {"networks": list(NETWORKS), "loops": list(LOOPS), "eight_bits": list(EIGHT_BITS)}
    found: dict[str, Any] = {}
    for key, those in names.items():
        precision = "int8" if key == "eight_bits" else "float32"
        if context.quick:
            those = those[: 2 if key == "networks" else 1]
        jobs = [(name, precision, context.quick) for name in those]
        found[key] = context.alone(measured, jobs)
        for row in found[key]:
            times = ", ".join(f"{e} {v:.4f}" for e, v in row["ms"].items())
            context.say(f"{row['name']}, {precision}: {times} (runs {row['runs']})")
    return found
