"""A cold start: from files on disk to the first answer, in a fresh Python process.

ResNet-20 with 15 % of its weights, LeNet-5 and LeNet-300-100 with a twelfth from their packed
files, and AlexNet with a tenth of conv2 to fc8 (which weights chance picks: times depend on how
many there are), each as a plan's file of this library's own kernels (engine ``own``); beside it the
dense network's ONNX file in an onnxruntime session of one thread. The clock starts before either
engine is imported and stops at the answer, so that **both sides' imports count**; numpy and the
input, which both need, are there before. The plan's side checks the file's digest, decodes and
packs the weights, computes the file's example and compares it within that time.

Processes of both in turns, the least of all rounds counts. Bytecode of both is cached in a folder
of the experiment's own, as an installation has it, by a round before that is not timed. A plan of a
megabyte or more (AlexNet) leaves its packed layers beside it in that round; its first load, which
packs them, is told as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.compression.records import load
from gossamer.core.errors import ArgumentError
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.inference.networks import alexnet, thinned
from gossamer.pack import pack
from gossamer.runtime.plan.door import compile_network
from gossamer.runtime.plan.onnx_model import model as onnx_bytes

__all__ = ["NETWORKS", "cold_start", "files", "turns"]

NETWORKS = ("resnet-20", "lenet-5", "lenet-300-100", "alexnet")
_PART = 0.5
_OURS = """
import json, sys, time, numpy as np
x = np.load(sys.argv[2])
begun = time.perf_counter()
import gossamer.runtime
opened = time.perf_counter()
net = gossamer.runtime.load(sys.argv[1], cache=sys.argv[3] == "kept")
loaded = time.perf_counter()
y = net(x)
answered = time.perf_counter()
"""
_THEIRS = """
import json, sys, time, numpy as np
x = np.load(sys.argv[2])
begun = time.perf_counter()
import onnxruntime as o
opened = time.perf_counter()
options = o.SessionOptions()
options.intra_op_num_threads = 1
session = o.InferenceSession(sys.argv[1], options)
loaded = time.perf_counter()
y = session.run(None, {session.get_inputs()[0].name: x})[0]
answered = time.perf_counter()
"""
_TOLD = """
print(json.dumps({"import": opened - begun, "load": loaded - opened, "answer": answered - loaded,
                  "whole": answered - begun, "torch": "torch" in sys.modules,
                  "y": y.ravel().tolist()}))
"""


def _pair(name: str, work: Path, quick: bool) -> tuple[nn.Module, nn.Module, Tensor]:
    """The dense network, the sparse one, and an input."""
    draw = torch.Generator().manual_seed(0)
    if name == "alexnet":
        dense, sparse = (alexnet(quick) for _ in range(2))
        sparse.load_state_dict(dense.state_dict())
        side = 67 if quick else 227
        return dense, thinned(sparse, 0.1, "conv1"), torch.randn(1, 3, side, side, generator=draw)
    dense = nets.build(name, seed=0)
    if name == "resnet-20":
        sparse = thinned(nets.build(name, seed=0), 0.15, "conv1", "linear")
        return dense, sparse, torch.randn(1, 3, 32, 32, generator=draw)
    pack(thinned(nets.build(name, seed=0), 1 / 12), work / f"{name}.gsm").close()
    sparse = load(work / f"{name}.gsm", nets.build(name, seed=1))
    return dense, sparse, torch.randn(1, 1, 28, 28, generator=draw)


def files(name: str, work: Path, quick: bool) -> dict[str, Any]:
    """The plan, the dense ONNX file and an input in a folder; what the sparse network answers."""
    dense, sparse, x = _pair(name, work, quick)
    graph = compile_network(dense, x, engine="numpy", rounds=1).graph
    (work / "dense.onnx").write_bytes(
        onnx_bytes(graph, graph.nodes, graph.inputs, graph.outputs)
    )  # fmt: skip
    compile_network(sparse, x, engine="own", rounds=1 if quick else 30).save(work / "sparse.plan")
    np.save(work / "x.npy", x.numpy())
    with torch.no_grad():
        return {
            "plan_bytes": (work / "sparse.plan").stat().st_size,
            "onnx_bytes": (work / "dense.onnx").stat().st_size,
            "wanted": {
                "plan": sparse.eval()(x).flatten().tolist(),
                "onnxruntime": dense.eval()(x).flatten().tolist(),
            },
        }


def turns(name: str, work: Path, quick: bool) -> dict[str, Any]:
    """Least seconds of each part of a start, in turns.

    Raises :class:`ArgumentError` where a process fails, or answers something else.
    """
    work.mkdir(parents=True, exist_ok=True)
    found = files(name, work, quick)
    wanted = found.pop("wanted")
    ours, theirs, x = (str(work / n) for n in ("sparse.plan", "dense.onnx", "x.npy"))
    commands = {
        "first": ["-c", _OURS + _TOLD, ours, x, "first"],
        "plan": ["-c", _OURS + _TOLD, ours, x, "kept"],
        "onnxruntime": ["-c", _THEIRS + _TOLD, theirs, x],
    }
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    env |= {"PYTHONPYCACHEPREFIX": str(work / "bytecode"), "OMP_NUM_THREADS": "1"}
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in commands}
    for number in range(2 if quick else 16):
        for way, command in commands.items():
            done = subprocess.run(
                [sys.executable, *command], capture_output=True, text=True, env=env
            )
            if done.returncode:
                raise ArgumentError(f"{name}, {way}: {done.stderr[-300:]}")
            row = json.loads(done.stdout)
            answer, right = (np.array(v) for v in (row.pop("y"), wanted.get(way, wanted["plan"])))
            off = float(np.abs(answer - right).max() / np.abs(right).max())
            if not off <= 1e-4 or row.pop("torch"):
                raise ArgumentError(f"{name}, {way}: differs by {off:.2g}, or needs torch")
            if number:
                rows[way].append(row)
    kept = work.glob("sparse.*.ready")
    return found | {
        "name": name,
        "ready_bytes": sum(p.stat().st_size for p in kept),
        "seconds": {
            way: {part: min(row[part] for row in some) for part in some[0]}
            for way, some in rows.items()
        },
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for row in raw["networks"]:
        seconds = row["seconds"]
        claims.append(
            Claim(
                "inference.cold",
                f"{row['name']}, from file to first answer in Python, both sides' imports counted: "
                "part of the dense network's time in onnxruntime",
                seconds["plan"]["whole"] / seconds["onnxruntime"]["whole"],
                "<=",
                _PART,
            )
        )
    return claims


@experiment("inference-cold-start", seeds=(0,), judge=_judge)
def cold_start(context: Context) -> dict[str, Any]:
    """Inference, cold: files on disk to the first answer in Python, against onnxruntime."""
    work, quick = context.work, context.quick
    rows = context.alone(turns, [(name, work / name, quick) for name in NETWORKS])
    for row in rows:
        told = ", ".join(f"{way} {1e3 * s['whole']:.1f}" for way, s in row["seconds"].items())
        context.say(f"{row['name']}: milliseconds {told}")
    return {"networks": rows}
