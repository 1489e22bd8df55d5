"""What the low-rank experiments share: data, a network at a ratio of its cost, engines' times."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import datasets
from gossamer.compression.parts import examples
from gossamer.core import names
from gossamer.core.timing import best_of, one_thread
from gossamer.datasets import Dataset, Split
from gossamer.structure.fit_network import Kind, Survey, approximate, form_of, replace, survey
from gossamer.structure.ladders import costs, levels
from gossamer.structure.rank_selection import Ladder, choose_ranks

__all__ = [
    "briefly",
    "calibration",
    "cifar",
    "first",
    "looked",
    "milliseconds",
    "ranks_at",
    "reduced",
]


def cifar(quick: bool) -> Dataset:
    """CIFAR-10."""
    return datasets.load("cifar10", subset=500 if quick else None)


def first(split: Split, count: int) -> Split:
    """Its first examples."""
    return Split(split.stored[:count], split.targets[:count], mean=split.mean, std=split.std)


def briefly(quick: bool) -> Dataset:
    """CIFAR-10; of a smoke run 50 images to evaluate."""
    data = cifar(quick)
    if not quick:
        return data
    validation, test = first(data.validation, 50), first(data.test, 50)
    return dataclasses.replace(data, validation=validation, test=test)


def calibration(count: int, quick: bool, part: int = 0) -> list[Tensor]:
    """Random training images in batches; another ``part`` holds other images."""
    g = torch.Generator().manual_seed(0)
    every = examples(cifar(quick).train, (part + 1) * count, g)
    return list(torch.cat(every)[part * count :].split(64))


def looked(net: nn.Module, batches: Sequence[Any], seed: int) -> Survey:
    """Its survey."""
    generator = torch.Generator().manual_seed(seed)
    return survey(net, batches, list(names.weights(net)), generator=generator)


def ranks_at(
    seen: Survey, kind: Kind, ratio: float
) -> tuple[dict[str, tuple[int, ...]], float, float]:
    """Ranks for so many times fewer multiply-adds, the network's before and after."""
    found = {}
    for name, layer in seen.layers.items():
        form = form_of(kind, layer.module)
        assert form is not None
        found[name] = levels(layer, seen.pairs[name], form, weights=kind == "svd")
    ladders = []
    for name, layer in seen.layers.items():
        each, whole = costs(layer, found[name], "flops")
        ladders.append(Ladder(name, found[name].energies, each, whole))
    whole = seen.fixed[0] + sum(ladder.whole for ladder in ladders)
    at = choose_ranks(ladders, whole / ratio, fixed=seen.fixed[0])
    after = seen.fixed[0] + sum(ladder.cost(at[ladder.name]) for ladder in ladders)
    return {n: found[n].ranks[i] for n, i in at.items() if i is not None}, whole, after


def reduced(
    net: nn.Module,
    batches: Sequence[Any],
    seen: Survey,
    kind: Kind,
    ratio: float,
    *,
    asymmetric: bool,
    seed: int,
) -> tuple[nn.Module, dict[str, Any]]:
    """The network with factors, without any training; its layers and multiply-adds."""
    ranks, before, after = ranks_at(seen, kind, ratio)
    generator = torch.Generator().manual_seed(100 + seed)
    done = approximate(
        net, batches, seen, ranks, kind=kind, asymmetric=asymmetric, generator=generator
    )
    made = copy.deepcopy(net)
    replace(made, done.made)
    return made, {"macs": [before, after], "layers": done.rows}


def milliseconds(networks: Sequence[nn.Module], x: Tensor, work: Path) -> dict[str, Any]:
    """Least of interleaved runs on one thread: in torch, and in onnxruntime where it is there."""
    runs: list[Any] = []
    found: dict[str, Any] = {}
    with torch.inference_mode(), one_thread():
        for net in networks:
            net.eval()
            runs.append(lambda net=net: net(x))
        best_of(runs, 3)
        found["torch"] = [1e3 * s for s in best_of(runs, 60)]
    try:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        sessions = []
        for number, net in enumerate(networks):
            file = work / f"{number}.onnx"
            torch.onnx.export(net, (x,), str(file), dynamo=False, input_names=["x"])
            sessions.append(ort.InferenceSession(str(file), options))
            got = sessions[-1].run(None, {"x": x.numpy()})[0]
            off = float((torch.tensor(got) - net(x).detach()).abs().max())
            assert off < 1e-3, off
        feeds = [lambda s=s: s.run(None, {"x": x.numpy()}) for s in sessions]
        best_of(feeds, 3)
        found["onnxruntime"] = [1e3 * s for s in best_of(feeds, 60)]
    except Exception as e:  # an exporter that is not there; the file says so
        found["onnxruntime"] = None
        found["why"] = f"{type(e).__name__}: {str(e)[:200]}"
    return found
