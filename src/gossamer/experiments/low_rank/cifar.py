"""CIFAR-10 networks at 2 and 4 times fewer multiply-adds, without training and after a little.

ResNet-20 as published, and LeNet-5 on colour images, trained here: filters of 5 x 5, whose
responses lie in fewer dimensions. What is reported at a ratio is the way with the best validation
score of its first images; accuracies are of test images.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gossamer
from gossamer import nets
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.low_rank.network import (
    calibration,
    cifar,
    first,
    looked,
    milliseconds,
    reduced,
)
from gossamer.structure.low_rank import energies
from gossamer.training import evaluate
from gossamer.training.renorm import reestimate

__all__ = ["low_rank_cifar"]

RATIOS = (2.0, 4.0)
WAYS = {
    "lenet-5": ("nonlinear", "linear", "spatial", "svd"),
    "resnet-20": ("nonlinear", "spatial"),
}
_IMAGES, _VALIDATED, _TUNED = 600, 1000, 12_800
_RATE = 0.01
_SHAPE = (3, 32, 32)


def _network(name: str, work: Path) -> nn.Module:
    if name == "resnet-20":
        return nets.build(name, pretrained=True)
    net = nets.build("lenet-5", in_shape=_SHAPE, seed=0)
    net.load_state_dict(torch.load(work / f"{name}.pt", weights_only=True))
    return net


def _trained(work: Path, quick: bool) -> dict[str, Any]:
    """LeNet-5 on CIFAR-10."""
    net, data = nets.build("lenet-5", in_shape=_SHAPE, seed=0), cifar(quick)
    config = gossamer.TrainConfig(
        epochs=1 if quick else 3, lr=0.02, batch_size=128, weight_decay=5e-4, schedule="cosine"
    )
    gossamer.train(net, data, config)
    torch.save(net.state_dict(), work / "lenet-5.pt")
    return {"validation": 100 * evaluate(net, data.validation).accuracy}


def _file(work: Path, name: str, kind: str, ratio: float, asymmetric: bool) -> Path:
    side = "" if asymmetric else "-symmetric"
    return work / f"{name}-{kind}-{ratio:g}{side}.pt"


def _way(
    name: str, kind: Any, ratio: float, asymmetric: bool, seed: int, work: Path, quick: bool
) -> dict[str, Any]:
    """A network by one kind at a ratio, untrained; batch-norm is measured anew where nearer."""
    net, data = _network(name, work), cifar(quick)
    batches = calibration(32 if quick else _IMAGES, quick)
    seen = looked(net, batches, seed)
    made, row = reduced(net, batches, seen, kind, ratio, asymmetric=asymmetric, seed=seed)
    some = first(data.validation, 50 if quick else _VALIDATED)
    plain = evaluate(made, some)
    renewed = reestimate(made, net, batches[:-1], batches[-1:]) if len(batches) > 1 else None
    after = evaluate(made, some)
    torch.save(made, _file(work, name, kind, ratio, asymmetric))
    return {
        "network": name,
        "kind": kind,
        "ratio": ratio,
        "asymmetric": asymmetric,
        "validation_plain": 100 * plain.accuracy,
        "validation": 100 * after.accuracy,
        "validation_loss": after.loss,
        "validation_loss_plain": plain.loss,
        "batch_norm": renewed,
        "parameters": [sum(p.numel() for p in m.parameters()) for m in (net, made)],
        **row,
        "energy": {
            n: (lambda e: (e.cumsum(0) / e.sum()).tolist())(energies(p))
            for n, p in seen.pairs.items()
        },
    }


def _made(name: str, row: Mapping[str, Any] | None, work: Path) -> nn.Module:
    if row is None:
        return _network(name, work)
    file = _file(work, name, row["kind"], row["ratio"], row["asymmetric"])
    made: nn.Module = torch.load(file, weights_only=False)  # written by this run
    return made


def _tested(name: str, row: dict[str, Any] | None, work: Path, quick: bool) -> dict[str, Any]:
    """Test accuracy."""
    test = cifar(quick).test
    found = evaluate(_made(name, row, work), first(test, 50) if quick else test)
    return {"accuracy": 100 * found.accuracy, "loss": found.loss, "images": found.total}


def _tuned(name: str, row: dict[str, Any], work: Path, quick: bool) -> dict[str, Any]:
    """A short training of the factors; validation and test accuracy after it."""
    made, data = _made(name, row, work), cifar(quick)
    part = copy.copy(data)
    object.__setattr__(part, "train", first(data.train, 200 if quick else _TUNED))
    config = gossamer.TrainConfig(
        epochs=1, lr=_RATE, batch_size=128, weight_decay=1e-4, schedule="cosine"
    )
    gossamer.train(made, part, config)
    some = first(data.validation, 50 if quick else _VALIDATED)
    test = first(data.test, 50) if quick else data.test
    return {
        "network": name,
        "ratio": row["ratio"],
        "rate": _RATE,
        "images": len(part.train),
        "validation": 100 * evaluate(made, some).accuracy,
        "accuracy": 100 * evaluate(made, test).accuracy,
    }


def _timed(name: str, rows: list[dict[str, Any]], work: Path, quick: bool) -> dict[str, Any]:
    """The dense network and the chosen ones, interleaved; batch 1 and 32."""
    every = [_made(name, None, work), *(_made(name, row, work) for row in rows)]
    data = cifar(quick)
    return {str(n): milliseconds(every, data.test.batch(slice(0, n))[0], work) for n in (1, 32)}


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    claims, page = [], "low-rank"
    for name in raw["chosen"]:
        for row in raw["chosen"][name]:
            ratio, most = row["ratio"], 0.5 if row["ratio"] == 2.0 else 2.0
            lost = raw["dense"][name]["accuracy"] - row["test"]["accuracy"]
            what = f"{name}, {ratio:g} times fewer multiply-adds"
            kind = f"{row['kind']}, without training"
            claims.append(Claim(f"{page}.5", f"{what}, {kind}: points lost", lost, "<=", most))
            if "tuned" in row:
                lost = raw["dense"][name]["accuracy"] - row["tuned"]["accuracy"]
                short = f"after {row['tuned']['images']} images of training"
                claims.append(Claim(f"{page}.5", f"{what}, {short}: points lost", lost, "<=", most))
            fewer = row["macs"][0] / row["macs"][1]
            claims.append(Claim(f"{page}.5", f"{what}: counted", fewer, ">=", ratio))
        for engine in ("torch", "onnxruntime"):
            times = raw["times"][name]["1"][engine]
            for row, ms in zip(raw["chosen"][name], times[1:] if times else (), strict=False):
                what = f"{name} at {row['ratio']:g}x, batch 1, {engine}: measured speed-up"
                claims.append(Claim(f"{page}.5", what, times[0] / ms, ">", 1.0))
    for name, (asymmetric, symmetric) in raw["symmetric"].items():
        what = f"{name} at 4x, nonlinear: loss on validation images, asymmetric over symmetric"
        ratio = asymmetric["validation_loss_plain"] / symmetric["validation_loss_plain"]
        claims.append(Claim(f"{page}.3", what, ratio, "<", 1.0))
    return claims


@experiment("low-rank-cifar", seeds=(0,), judge=_judge)
def low_rank_cifar(context: Context) -> dict[str, Any]:
    """Low rank 3, 5: CIFAR-10 networks at 2 and 4 times fewer multiply-adds, accuracy and time."""
    work, quick, seed = context.work, context.quick, context.seeds[0]
    networks = ("lenet-5",) if quick else ("lenet-5", "resnet-20")
    trained = context.map(_trained, [(work, quick)])[0]
    ways = [(n, k, r, True) for n in networks for r in RATIOS for k in WAYS[n]]
    ways += [(n, "nonlinear", 4.0, False) for n in networks]
    rows = context.map(_way, [(*way, seed, work, quick) for way in ways])
    dense = dict(zip(networks, context.map(
        _tested, [(n, None, work, quick) for n in networks]), strict=True))  # fmt: skip
    chosen: dict[str, list[dict[str, Any]]] = {}
    symmetric: dict[str, Any] = {}
    for name in networks:
        mine = [r for r in rows if r["network"] == name]
        best = [
            max((r for r in mine if r["ratio"] == ratio and r["asymmetric"]),
                key=lambda r: float(r["validation"]))
            for ratio in RATIOS
        ]  # fmt: skip
        keys = ("kind", "ratio", "asymmetric")
        brief = [{k: r[k] for k in keys} for r in best]
        tested = context.map(_tested, [(name, b, work, quick) for b in brief])
        chosen[name] = [
            {**b, "macs": r["macs"], "test": t, "validation": r["validation"]}
            for b, r, t in zip(brief, best, tested, strict=True)
        ]
        tuned = context.map(_tuned, [(name, b, work, quick) for b in brief])
        for row, after in zip(chosen[name], tuned, strict=True):
            row["tuned"] = after
        at = [r for r in mine if r["ratio"] == 4.0 and r["kind"] == "nonlinear"]
        symmetric[name] = sorted(at, key=lambda r: not r["asymmetric"])
        symmetric[name] = [
            {k: r[k] for k in ("asymmetric", "validation_plain", "validation_loss_plain")}
            for r in symmetric[name]
        ]
    times = {
        n: context.alone(
            _timed, [(n, [{k: r[k] for k in ("kind", "ratio", "asymmetric")} for r in rows_],
                      work, quick)]
        )[0]
        for n, rows_ in chosen.items()
    }  # fmt: skip
    energy = {r["network"]: r["energy"] for r in rows}
    slim = [{k: v for k, v in r.items() if k != "energy"} for r in rows]
    return {
        "trained": trained, "dense": dense, "ways": slim, "chosen": chosen, "times": times,
        "symmetric": symmetric, "energy": energy,
    }  # fmt: skip
