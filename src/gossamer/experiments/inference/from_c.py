"""A plan's file from C: from the file on disk to the first answer, and each answer after it.

The published ResNet-20 with 15 % of its weights (single weights by magnitude: times depend on how
many there are), saved as a plan, in a C program without Python; beside it the dense network's ONNX
file in an onnxruntime session of one thread. Each in processes of their own, in turns. What counts
is the time inside a process that runs already: loading and the first answer, no imports. The C
library checks the file's digest and its example in that time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer import nets
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.experiments import Claim, Context, experiment
from gossamer.prune import magnitude
from gossamer.runtime import include
from gossamer.runtime.export import export
from gossamer.runtime.plan.door import compile_network

__all__ = ["files", "from_c", "program", "turns"]

_KEPT = 0.15
_C = r"""
#include "gossamer.h"
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

int main(int count, char **words) {  // plan, input, output, entries, answers
  float *x = (float *)malloc(4 * atol(words[4])), y[10];
  FILE *f = fopen(words[2], "rb");
  if (count < 6 || !x || !f || fread(x, 4, atol(words[4]), f) != (size_t)atol(words[4])) return 90;
  const void *in[] = {x};
  void *out[] = {y};
  char message[GOSSAMER_MESSAGE] = "";
  gossamer_network *net;
  double begun = now(), least = 1e9;
  int status = gossamer_load(words[1], &net, message);
  if (!status) status = gossamer_run(net, 1, in, out, 1, message);
  double first = now() - begun;
  if (status) return fprintf(stderr, "%s\n", message), status;
  for (int i = atoi(words[5]); i--;) {
    double one = now();
    gossamer_run(net, 1, in, out, 1, message);
    if ((one = now() - one) < least) least = one;
  }
  if (!(f = fopen(words[3], "wb")) || fwrite(y, 4, 10, f) != 10 || fclose(f)) return 91;
  printf("{\"first\": %.9f, \"least\": %.9f}\n", first, least);
  return 0;
}
"""
_SESSION = """
import json, sys, time
import numpy as np, onnxruntime as o
x = np.fromfile(sys.argv[2], np.float32).reshape(1, 3, 32, 32)
options = o.SessionOptions()
options.intra_op_num_threads = 1
begun = time.perf_counter()
session = o.InferenceSession(sys.argv[1], options)
feed = {session.get_inputs()[0].name: x}
session.run(None, feed)
first, least = time.perf_counter() - begun, 1e9
for _ in range(int(sys.argv[3])):
    one = time.perf_counter()
    session.run(None, feed)
    least = min(least, time.perf_counter() - one)
print(json.dumps({"first": first, "least": least}))
"""


def files(work: Path) -> dict[str, Any]:
    """The plan, the dense ONNX file, an input, and what the plan answers."""
    net = nets.build("resnet-20", pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    export(net, x, work / "dense.onnx")
    convolutions = {n: w for n, w in names.weights(net).items() if w.ndim == 4}
    magnitude.prune(net, _KEPT, include=list(convolutions)).apply_(net)
    plan = compile_network(net, x, engine="plan")
    plan.save(work / "sparse.plan")
    x.numpy().tofile(work / "input.f32")
    return {
        "plan_bytes": (work / "sparse.plan").stat().st_size,
        "onnx_bytes": (work / "dense.onnx").stat().st_size,
        "wanted": plan(x.numpy()).reshape(-1).tolist(),
    }


def program(work: Path, quick: bool) -> Path:
    """The C program, with the library in it."""
    source, made = work / "timed.cpp", work / "timed"
    source.write_text(_C)
    fast = ["-O0", "-DGOSSAMER_PORTABLE"] if quick else ["-O3"]
    command = ["c++", "-std=c++17", *fast, "-ffp-contract=off", "-pthread", f"-I{include()}"]
    command += [str(source), str(include() / "gossamer.cpp"), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ArgumentError(f"the C library does not compile: {done.stderr[-500:]}")
    return made


def turns(work: Path, quick: bool) -> dict[str, Any]:
    """Both from their files, in turns."""
    work.mkdir(parents=True, exist_ok=True)
    found, made, more = files(work), program(work, quick), "3" if quick else "300"
    given = str(work / "input.f32")
    ways = {
        "c": [str(made), str(work / "sparse.plan"), given, str(work / "output.f32"), "3072", more],
        "onnxruntime": [sys.executable, "-c", _SESSION, str(work / "dense.onnx"), given, more],
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(2 if quick else 15):
        for name, command in ways.items():
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ArgumentError(f"{name} ended with {done.returncode}: {done.stderr[-300:]}")
            rows[name].append(json.loads(done.stdout))
    answers = np.fromfile(work / "output.f32", np.float32)
    wanted = np.array(found["wanted"], np.float32)
    found["difference"] = float(np.abs(answers - wanted).max() / np.abs(wanted).max())
    return found | {"rows": rows}


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    rows = raw["run"]["rows"]
    first = {n: statistics.median(row["first"] for row in some) for n, some in rows.items()}
    least = {n: min(row["least"] for row in some) for n, some in rows.items()}
    page, what = "inference.c", "ResNet-20, 15 % of its weights, from C"
    return [
        Claim(
            page, f"{what}: from file to first answer, part of a dense onnxruntime session's",
            first["c"] / first["onnxruntime"], "<=", 0.5,
        ),
        Claim(
            page, f"{what}: times as fast as the dense network in onnxruntime, one thread",
            least["onnxruntime"] / least["c"], ">", 1.0,
        ),
        Claim(
            page, f"{what}: answers from Python's, relative", raw["run"]["difference"], "<=", 1e-5
        ),
    ]  # fmt: skip


@experiment("inference-from-c", seeds=(0,), judge=_judge)
def from_c(context: Context) -> dict[str, Any]:
    """Inference, from C: a plan's file to its first answer, against an onnxruntime session."""
    (run,) = context.alone(turns, [(context.work / "files", context.quick)])
    return {"run": run}
