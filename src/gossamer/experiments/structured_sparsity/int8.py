"""Half the channels and eight bits: a small CNN in int8 against its dense float32, in one run.

VGG-11 for CIFAR at half its width (39 million multiply-adds), trained for a few epochs, in bfloat16
with float32 weights. Then a recipe: half the channels of every coupled group, in sixteens, by
their norms, taken out; a few epochs against the dense network's soft outputs; batch-norm absorbed;
weights rounded to eight bits, layer by layer; packed. The network that is decoded from the file is
exported in int8 and made an int8 plan, both calibrated with 256 training images, and these very two
are timed and evaluated on all test images. Batch 1, one thread, the least of that thread's own
seconds over interleaved rounds, against the dense float32 network in onnxruntime.

Beside it, as figures, the same comparison of other networks with random weights: how much is to be
had grows with a layer's channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.compression import compress
from gossamer.compression.eight_bits import Planned
from gossamer.compression.parts import examples
from gossamer.compression.records import load
from gossamer.core import flops
from gossamer.core.timing import interleaved, threads
from gossamer.datasets import Dataset
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.low_rank.network import cifar, first
from gossamer.experiments.shared.mixed import Mixed
from gossamer.runtime import sessions
from gossamer.runtime.engines import Subject
from gossamer.runtime.plan.door import compile_network
from gossamer.training import TrainConfig, evaluate, train

__all__ = ["NETWORKS", "RECIPE", "channels_and_int8"]

_NETWORK, _WIDTH = "vgg-11", 0.5
_EPOCHS = 8
_CONFIG = TrainConfig(
    _EPOCHS, batch_size=128, lr=0.05, nesterov=True, weight_decay=5e-4, schedule="cosine"
)
RECIPE: list[Any] = [
    {"prune": {"groups": {"kind": "coupled", "multiple": 16}, "density": 0.5}},
    "shrink",
    {
        "train": {
            "epochs": 4, "lr": 0.05, "batch_size": 128, "nesterov": True, "weight_decay": 5e-4,
            "distill": 0.7,
        }
    },
    "absorb_batchnorm",
    {"obs": {"bits": 8, "calibration": 256}},
    {"pack": {"profile": "smallest"}},
]  # fmt: skip
_CALIBRATION = 256
# name, and what nets.build takes for the dense network and for the one of half its channels
NETWORKS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("conv-4", {}, {"filters": 32, "hidden": 128}),
    ("conv-6", {}, {"filters": 32, "hidden": 128}),
    ("vgg-11", {}, {"width": 0.5}),
    ("vgg-16", {"width": 0.5}, {"width": 0.25}),
)


class _Session(nn.Module):
    """An ONNX model in onnxruntime where a network is asked for, to be evaluated."""

    def __init__(self, opened: Any) -> None:
        super().__init__()
        self.opened = opened

    def forward(self, images: Tensor) -> Tensor:
        """As the network that was exported."""
        return sessions.run(self.opened, [images])[0]


def _data(quick: bool) -> Dataset:
    """CIFAR-10; of a smoke run 50 images to evaluate."""
    data = cifar(quick)
    if not quick:
        return data
    return replace(data, validation=first(data.validation, 50), test=first(data.test, 50))


def _fresh(seed: int) -> nn.Module:
    return nets.build(_NETWORK, width=_WIDTH, seed=seed)


def _trained(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """The dense network; accuracy in percent."""
    data, net = _data(quick), _fresh(seed)
    epochs = 1 if quick else _EPOCHS
    train(
        Mixed(net), data, replace(_CONFIG, epochs=epochs, seed=seed),
        evaluate_every=epochs, checkpoint=work / "dense-train.pt",
    )  # fmt: skip
    torch.save(net.state_dict(), work / "dense.pt")
    return {
        "epochs": epochs, "images": len(data.train),
        "validation": 100 * evaluate(net, data.validation).accuracy,
        "accuracy": 100 * evaluate(net, data.test).accuracy, **_size(net),
    }  # fmt: skip


def _size(net: nn.Module) -> dict[str, Any]:
    macs = flops.count(net, torch.zeros(1, 3, 32, 32)).totals()["macs"]
    return {"macs": macs, "parameters": sum(p.numel() for p in net.parameters())}


def _dense(work: Path) -> nn.Module:
    net = _fresh(0)
    net.load_state_dict(torch.load(work / "dense.pt", weights_only=True))
    return net.eval()


def _compressed(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """By the recipe; accuracy of the file's float32 in percent."""
    more = ["stages.train.epochs=1", "stages.obs.calibration=16"] if quick else []
    out = work / "half"
    done = compress(
        _dense(work), _data(quick), recipe=RECIPE, out=out, overrides=[f"seed={seed}", *more]
    )
    return {
        "dense_bytes": done.dense_bytes, "bytes": done.bytes,
        "accuracy": 100 * done.after.accuracy, **_size(done.model),
    }  # fmt: skip


def _timed(work: Path, quick: bool) -> dict[str, Any]:
    """The dense network in float32 and the file's in eight bits: times, and what they answer."""
    data = _data(quick)
    seen = examples(data.train, 16 if quick else _CALIBRATION, torch.Generator().manual_seed(0))
    example = data.test.batch(slice(0, 1))[0]
    half = load(work / "half" / "model.gsm", _fresh(1)).eval()
    networks, calls, facts = _both(_dense(work), half, example, seen, quick)
    found = {name: 100 * evaluate(net, data.test).accuracy for name, net in networks.items()}
    return {"accuracy": found, "images": len(data.test), "ms": _least(calls, quick), **facts}


def _both(
    dense: nn.Module, half: nn.Module, example: Tensor, seen: Sequence[Tensor], quick: bool
) -> tuple[dict[str, nn.Module], dict[str, Callable[[], Any]], dict[str, Any]]:
    """Name -> a network to evaluate and the call of the same to time; bytes, and what was noted."""
    whole = Subject("dense", dense, example, calibration=seen)
    less = Subject("half", half, example, calibration=seen)
    models = {
        "dense, onnxruntime": whole.onnx,
        "dense, onnxruntime int8": whole.int8,
        "half, onnxruntime": less.onnx,
        "half, onnxruntime int8": less.int8,
    }
    networks: dict[str, nn.Module] = {}
    calls: dict[str, Callable[[], Any]] = {}
    array = example.numpy()
    for name, model in models.items():
        opened = sessions.session(model, threads=1)
        feeds = {opened.get_inputs()[0].name: array}
        networks[name] = _Session(opened)
        calls[name] = lambda opened=opened, feeds=feeds: opened.run(None, feeds)  # type: ignore[misc]
    plan = compile_network(
        half, example, engine="plan", precision="int8", calibration=list(seen),
        rounds=3 if quick else 30,
    )  # fmt: skip
    networks["half, int8 plan"] = Planned(plan)
    calls["half, int8 plan"] = lambda: plan.arrays([array], plan.batch([array]))
    size = {name: len(model.SerializeToString()) for name, model in models.items()}
    notes = [*whole.notes, *less.notes, f"half in an int8 plan: {plan.facts.check}"]
    return networks, calls, {"onnx_bytes": size, "notes": notes}


def _least(calls: Mapping[str, Callable[[], Any]], quick: bool) -> dict[str, float]:
    with threads(1), torch.no_grad():
        rounds, seconds = (3, 2.0) if quick else (400, 20.0)
        found = interleaved(
            list(calls.values()), rounds=rounds, seconds=seconds, clock=time.thread_time
        )
    return {name: 1e3 * min(row) for name, row in zip(calls, found, strict=True)}


def _random(name: str, quick: bool) -> dict[str, Any]:
    """The same times of another network with random weights."""
    dense, half = next((a, b) for n, a, b in NETWORKS if n == name)
    example = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pair = [nets.build(name, seed=0, **options).eval() for options in (dense, half)]
    _, calls, facts = _both(pair[0], pair[1], example, [example], quick)
    return {"name": name, "options": dense, "ms": _least(calls, quick), **facts}


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    dense, timed, page = raw["dense"], raw["timed"], "structured-sparsity.beyond"
    ms, seen = timed["ms"], timed["accuracy"]
    what = "VGG-11 of half width on CIFAR-10, half its channels, int8"
    eight = ("half, onnxruntime int8", "half, int8 plan")
    told = ", ".join(f"{seen[name]:.2f} % in {name.removeprefix('half, ')}" for name in eight)
    where = f"{what} ({told}; dense {dense['accuracy']:.2f} %)"
    before = ms["dense, onnxruntime"]
    return [
        Claim(
            page,
            f"{where}: onnxruntime int8, batch 1, times as fast as onnxruntime float32, dense",
            before / ms[eight[0]],
            ">=",
            8.0,
        ),
        Claim(
            page,
            f"{what}: int8 plan, batch 1, times as fast as onnxruntime float32, dense",
            before / ms[eight[1]],
            ">=",
            8.0,
        ),
        Claim(
            page,
            f"{what}: file of the network, times smaller than dense float32",
            raw["half"]["dense_bytes"] / raw["half"]["bytes"],
            ">=",
            13.0,
        ),
    ]


@experiment("channels-and-int8", seeds=(0,), judge=_judge)
def channels_and_int8(context: Context) -> dict[str, Any]:
    """Half the channels and int8 on a small trained CNN: bytes, milliseconds and accuracy."""
    work, quick, seed = context.work, context.quick, context.seeds[0]
    (dense,) = context.map(_trained, [(seed, work, quick)])
    (half,) = context.map(_compressed, [(seed, work, quick)])
    (timed,) = context.alone(_timed, [(work, quick)])
    for name, ms in timed["ms"].items():
        context.say(f"{name}: {ms:.3f} ms, {timed['accuracy'][name]:.2f} %")
    names = [name for name, _, _ in NETWORKS][: 1 if quick else None]
    others = context.alone(_random, [(name, quick) for name in names])
    for row in others:
        times = [f"{row['ms']['dense, onnxruntime'] / v:.1f}x" for v in row["ms"].values()]
        context.say(f"{row['name']}, random weights: {', '.join(times)}")
    return {"dense": dense, "half": half, "timed": timed, "random": others}
