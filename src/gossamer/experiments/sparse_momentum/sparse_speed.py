"""Deep Compression's layer timings: pruned fully-connected layers in CSR against dense.

Han, Mao, Dally, ICLR 2016, section 6.3 and table 8: batch 1, fully-connected layers of AlexNet
and VGG-16 at the published densities, stored as CSR and not quantized; 3x on average on the
paper's CPU, and a loss at batch 64.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from gossamer.core.timing import best_of
from gossamer.experiments import Claim, Context, experiment

__all__ = ["layer_times", "sparse_speed"]

# name -> (out, in, density kept) as published
LAYERS: dict[str, tuple[int, int, float]] = {
    "alexnet.fc6": (4096, 9216, 0.09),
    "alexnet.fc7": (4096, 4096, 0.09),
    "alexnet.fc8": (1000, 4096, 0.25),
    "vgg16.fc6": (4096, 25088, 0.04),
    "vgg16.fc7": (4096, 4096, 0.04),
    "vgg16.fc8": (1000, 4096, 0.23),
}


def layer_times(
    out: int, inputs: int, density: float, batch: int, seed: int, rounds: int
) -> dict[str, Any]:
    """Dense and CSR milliseconds of one layer, and their ratio, in one run.

    The weights are random with a random mask: the time of CSR depends on the count and spread
    of the non-zeros, not on their values. Raises ``RuntimeError`` when the two disagree.
    """
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=g)
    weight *= torch.rand(out, inputs, generator=g) < density
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR support beta
        csr = weight.to_sparse_csr()
    # a vector, not a matrix of one column: that is the matrix-vector kernel of both
    x = torch.randn(inputs, batch, generator=g) if batch > 1 else torch.randn(inputs, generator=g)
    dense_out, sparse_out = weight @ x, csr @ x
    if not torch.allclose(dense_out, sparse_out, rtol=1e-3, atol=1e-3 * inputs**0.5):
        raise RuntimeError(f"CSR and dense products differ for {out}x{inputs}")
    dense, sparse = best_of((lambda: weight @ x, lambda: csr @ x), rounds)
    return {"dense_ms": dense * 1e3, "csr_ms": sparse * 1e3, "speed_up": dense / sparse}


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    # Batch 64 is measured, not judged: the paper's CPU lost there, today's libraries need not.
    what = "batch-1 CSR speed-up over dense, mean of six layers"
    return [Claim("deep-compression.6", what, raw["mean_speed_up"]["1"], ">", 1.0)]


@experiment("deep-compression-speed", seeds=(0,), judge=_judge)
def sparse_speed(context: Context) -> dict[str, Any]:
    """Deep Compression 6: pruned fully-connected layers in CSR, batch 1 and batch 64."""
    small, rounds = (16, 3) if context.quick else (1, 15)
    table: dict[str, dict[str, Any]] = {}
    for name, (out, inputs, density) in LAYERS.items():
        jobs = [
            (out // small, inputs // small, density, batch, context.seeds[0], rounds)
            for batch in (1, 64)
        ]
        one, many = context.alone(layer_times, jobs)
        table[name] = {"batch_1": one, "batch_64": many}
        context.say(f"{name}: batch 1 {one['speed_up']:.2f}x, batch 64 {many['speed_up']:.2f}x")
    mean = {
        b: sum(row[f"batch_{b}"]["speed_up"] for row in table.values()) / len(table)
        for b in (1, 64)
    }
    return {"layers": table, "mean_speed_up": {str(b): v for b, v in mean.items()}, "threads": 1}
