"""Whole sparse networks as plans, against onnxruntime in float32 and int8, in one run.

AlexNet without its response normalization, 90 % of the weights of conv2 to fc8 taken out at random
(a kernel's time depends on how many are left, not on which); the published ResNet-20 as the recipe
``resnet-20-sparse`` leaves it, 15 % of its weights trained on, with its accuracy in float32 and as
an int8 plan; LeNet-300-100 and LeNet-5 at a twelfth of their weights, from packed files. Plans in
float32 and, each layer where it is faster, in int8. Batch 1, one thread, the least of that thread's
own seconds over interleaved rounds. ``auto`` beside the best of the dense float32 engines tells
where it loses.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.compression.eight_bits import Planned
from gossamer.compression.measure import density
from gossamer.compression.records import load
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.inference import sparse_resnet
from gossamer.experiments.post_training.stage import calibrated, first
from gossamer.experiments.shared.recipes import of_recipes
from gossamer.pack import pack
from gossamer.runtime.bench import bench
from gossamer.runtime.engines import Subject, installed
from gossamer.runtime.plan.door import compile_network
from gossamer.training import evaluate

__all__ = ["alexnet", "network", "networks", "thinned"]

NETWORKS = ("alexnet", "resnet-20", "lenet-300-100", "lenet-5")
ENGINES = (
    "gossamer",
    "gossamer-int8",
    "torch",
    "onnxruntime",
    "onnxruntime-int8",
    "openvino",
    "openvino-int8",
)
INT8 = ("onnxruntime-int8", "openvino-int8")
FLOAT = ("torch", "onnxruntime", "openvino")
_ALEXNET, _LENET = 0.1, 1 / 12  # densities


def thinned(net: nn.Module, kept: float, *whole: str) -> nn.Module:
    """The network with a part of its layers' weights, which chance picks; but of ``whole``."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and name not in whole:
                module.weight.mul_(torch.rand(module.weight.shape, generator=draw) < kept)
    return net


def alexnet(quick: bool) -> nn.Module:
    """The network without its response normalization, of random weights."""
    side = 67 if quick else 227
    net = nets.build("alexnet", in_shape=(3, side, side))
    del net.norm1, net.norm2  # as the engines' published times have it
    return net


def _pair(
    name: str, work: Path, quick: bool, trained: Path
) -> tuple[nn.Module, nn.Module, Tensor, dict[str, Any]]:
    """The dense network, the sparse one, an example, and what is known of their accuracy."""
    draw = torch.Generator().manual_seed(0)
    if name == "alexnet":
        dense, sparse = (alexnet(quick) for _ in range(2))
        sparse.load_state_dict(dense.state_dict())
        side = 67 if quick else 227
        return (
            dense,
            thinned(sparse, _ALEXNET, "conv1"),
            torch.randn(1, 3, side, side, generator=draw),
            {},
        )
    if name == "resnet-20":
        dense, data = nets.build(name, pretrained=True), calibrated(quick)
        sparse = load(trained, nets.build(name, seed=1))
        test = first(data.test, 50) if quick else data.test
        example = data.test.batch(slice(0, 1))[0]
        plan = compile_network(
            sparse, example, engine="plan", precision="int8",
            calibration=first(data.train, 16 if quick else 512), rounds=3 if quick else 30,
        )  # fmt: skip
        found = [100 * evaluate(m, test).accuracy for m in (dense, sparse, Planned(plan))]
        known = dict(zip(("before", "after", "int8"), found, strict=True))
        return dense, sparse, example, {"images": len(test), **known}
    dense = nets.build(name, seed=0)
    file = work / f"{name}.gsm"
    pack(thinned(nets.build(name, seed=0), _LENET), file).close()
    sparse = load(file, nets.build(name, seed=1))
    return dense, sparse, torch.randn(1, 1, 28, 28, generator=draw), {}


def network(name: str, work: Path, quick: bool, trained: Path) -> dict[str, Any]:
    """Least milliseconds of a network, dense and sparse, in every engine that is here.

    ``trained``: the file of the sparse ResNet-20.
    """
    work.mkdir(parents=True, exist_ok=True)
    dense, sparse, example, accuracy = _pair(name, work, quick, trained)
    subjects = [Subject("dense", dense, example), Subject("sparse", sparse, example)]
    found = bench(
        subjects,
        engines=[engine for engine in ENGINES if installed(engine)],
        rounds=3 if quick else 100,
        seconds=2.0 if quick else 20.0,
        clock=time.thread_time,
    )
    ms: dict[str, dict[str, float]] = {"dense": {}, "sparse": {}}
    for t in found.timings:
        ms[t.network][t.engine] = t.least_ms
    return {
        "name": name,
        "density": density(sparse),
        "accuracy": accuracy,
        "ms": ms,
        "notes": list(found.notes),
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for row in raw["networks"]:
        name, ms = row["name"], row["ms"]
        ours = ms["sparse"]["gossamer"]
        exact = min(ms["dense"][e] for e in FLOAT if e in ms["dense"])
        eight = min((ms["dense"][e] for e in INT8 if e in ms["dense"]), default=float("nan"))
        integers = ms["sparse"].get("gossamer-int8", float("inf"))  # where it was refused
        if name == "alexnet":
            what = f"whole AlexNet at {100 * (1 - row['density']):.0f} %"
            claims += [
                Claim("inference.5", f"{what}, {plan} plan: times as fast as {engine}", a, ">=", b)
                for plan, engine, a, b in (
                    ("float32", "the best float32 engine", exact / ours, 4.0),
                    ("int8", "the best float32 engine", exact / integers, 7.0),
                    ("int8", "the best int8 engine", eight / integers, 1.8),
                )
            ]
        elif name == "resnet-20":
            what = f"trained ResNet-20, {100 * row['density']:.0f} % of its weights"
            claims += [
                Claim("inference.6", f"{what}, {plan} plan: times as fast as {engine}", a, ">", 1.0)
                for plan, engine, a in (
                    ("float32", "float32", exact / ours),
                    ("int8", "int8", eight / integers),
                )
            ]
            claims += [
                Claim(
                    "inference.6",
                    f"{what}: points of test accuracy lost",
                    row["accuracy"]["before"] - row["accuracy"]["after"],
                    "<=",
                    2.0,
                ),
            ]
            if "int8" in row["accuracy"]:  # runs of before that have none
                lost = row["accuracy"]["after"] - row["accuracy"]["int8"]
                text = f"{what}, int8 plan: points of test accuracy lost beside its float32"
                claims.append(Claim("inference.6", text, lost, "<=", 0.5))
    return claims


@experiment("inference-networks", seeds=(0,), judge=_judge)
def networks(context: Context) -> dict[str, Any]:
    """Inference 5, 6: whole AlexNet, ResNet-20 and LeNets as sparse plans, against onnxruntime."""
    work, quick = context.work, context.quick
    folder = context.beside("sparse-resnet", sparse_resnet.__name__)
    folder = of_recipes(folder, sparse_resnet.RECIPE)
    (file,) = context.map(sparse_resnet.made, [(context.seeds[0], folder, quick)])
    jobs = [(name, work / name, quick, folder / file) for name in NETWORKS]
    rows = context.alone(network, jobs)
    for row in rows:
        for kind, ms in row["ms"].items():
            context.say(
                f"{row['name']} {kind}: " + ", ".join(f"{e} {v:.3f}" for e, v in ms.items())
            )
        row["auto_over_best"] = {
            kind: ms["gossamer"] / min(ms[e] for e in FLOAT if e in ms)
            for kind, ms in row["ms"].items()
        }
    return {"networks": rows}
