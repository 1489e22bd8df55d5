"""What fewer filters give in onnxruntime, and ResNet-20 in every engine at hand.

A convolution with a half and a quarter of its filters does that part of the multiplications: the
theoretical speed-up is 2 and 4. Measured against the whole layer in the same engine, batch 1, one
thread, in one run. Beside it ResNet-20 with a half and a quarter of the channels of every layer,
in every engine that is installed, batch 1 and 32: figures, without a claim. Weights are random: the
time of a dense kernel does not depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gossamer import nets
from gossamer.experiments import Claim, Context, experiment
from gossamer.runtime.bench import Bench, bench
from gossamer.runtime.engines import Subject

__all__ = ["layer", "shrink_speed", "survey"]

# name -> inputs, filters, side of the input, of the kernel
LAYERS: dict[str, tuple[int, int, int, int]] = {
    "alexnet.conv2": (96, 256, 27, 5),
    "alexnet.conv3": (256, 384, 13, 3),
    "resnet18.layer1": (64, 64, 56, 3),
    "resnet18.layer2": (128, 128, 28, 3),
    "resnet18.layer3": (256, 256, 14, 3),
}
PARTS = (2, 4)  # a half, a quarter


def layer(inputs: int, filters: int, side: int, kernel: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a layer whole, halved and quartered, and the speed-ups over theory."""
    x = torch.randn(1, inputs, side, side, generator=torch.Generator().manual_seed(0))

    def made(part: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(inputs, filters // part, kernel, padding=kernel // 2), nn.ReLU()
        )

    subjects = [Subject(f"1/{part}", made(part), x) for part in (1, *PARTS)]
    found = bench(subjects, engines=["onnxruntime"], rounds=rounds)
    whole, *rest = found.timings
    # the least of each: a slice of time that another process takes hits the longer call more often
    gain = {t.network: whole.least_ms / t.least_ms for t in rest}
    return {
        "ms": {t.network: t.least_ms for t in found.timings},
        "speed_up": gain,
        "of_theory": {f"1/{part}": gain[f"1/{part}"] / part for part in PARTS},
        "notes": list(found.notes),
    }


def survey(batch: int, rounds: int, seconds: float) -> dict[str, Any]:
    """ResNet-20 at the whole, a half and a quarter of its channels in every engine installed."""
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    subjects = [
        Subject(f"width 1/{part}", nets.build("resnet-20", width=1 / part, seed=0), x)
        for part in (1, *PARTS)
    ]
    found: Bench = bench(subjects, batches=[batch], rounds=rounds, seconds=seconds)
    return found.as_dict()


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    shares = [s for row in raw["layers"].values() for s in row["of_theory"].values()]
    what = "least part of the theoretical speed-up, 1/2 and 1/4 of the filters, onnxruntime"
    return [Claim("inference.7", what, min(shares), ">=", 0.85)]


@experiment("structured-shrink-speed", seeds=(0,), judge=_judge)
def shrink_speed(context: Context) -> dict[str, Any]:
    """Inference 7: a half and a quarter of a layer's filters through onnxruntime."""
    small, rounds = (8, 5) if context.quick else (1, 100)
    jobs = [(i // small, f // small, side, k, rounds) for i, f, side, k in LAYERS.values()]
    found = dict(zip(LAYERS, context.alone(layer, jobs), strict=True))
    for name, row in found.items():
        context.say(f"{name}: " + ", ".join(f"{p} {v:.2f}x" for p, v in row["speed_up"].items()))
    batches = (1,) if context.quick else (1, 32)
    surveys = context.alone(survey, [(b, rounds, 2.0 if context.quick else 60.0) for b in batches])
    for one in surveys:
        for line in one["verdicts"]:
            context.say(line)
    return {"layers": found, "resnet20": dict(zip(map(str, batches), surveys, strict=True))}
