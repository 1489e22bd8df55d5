"""Recurrent steps and a small transformer in few bits as plans, in one run with the engines.

A two-layer LSTM of 512 units, one step at batch 1 with its state given and returned; and a
transformer of four layers of 256 on a window of 32 tokens. Dense, ternary by row (the 45 % of
least magnitude zero, one scale a row), and at half the weights on a grid of 15 levels a row, all
random weights: a kernel's time depends on bits and zeros, not on values. Float32 activations, one
thread, the least of that thread's own seconds over interleaved rounds. Engines run the dense
network; torch.compile takes minutes to prepare and is left out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.experiments import Claim, Context, experiment
from gossamer.runtime.bench import bench
from gossamer.runtime.engines import Subject, installed
from gossamer.runtime.plan.door import compile_network

__all__ = ["FORMS", "few_bits", "fewer", "measured"]

NETWORKS = ("lstm", "transformer")
FORMS = ("dense", "ternary", "grid")
ENGINES = ("gossamer", "torch", "onnxruntime", "openvino")
_ZERO = 0.45  # of a ternary row


class _Step(nn.Module):
    """One step of a two-layer LSTM, its state in and out."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(units, units, 2, batch_first=True)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (1, 1, units), h and c (1, layers, units)."""
        y, after = self.rnn(x, tuple(s.transpose(0, 1).contiguous() for s in (h, c)))
        return y, *(s.transpose(0, 1) for s in after)


def fewer(weight: Tensor, form: str) -> Tensor:
    """A matrix (outputs, inputs) in a form of :data:`FORMS`."""
    size = weight.abs()
    if form == "ternary":
        kept = size > size.quantile(_ZERO, dim=1, keepdim=True)
        scale = (size * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
        return weight.sign() * kept * scale
    if form == "grid":
        step = size.amax(1, keepdim=True) / 7
        kept = size > size.median(dim=1, keepdim=True).values
        # at least one step: what is kept is not rounded to zero
        return (weight / step).abs().round().clamp(min=1) * weight.sign() * kept * step
    return weight


def _made(name: str, form: str, quick: bool) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if name == "lstm":
        units = 64 if quick else 512
        net: nn.Module = _Step(units)
        example: Any = (torch.randn(1, 1, units), *torch.randn(2, 1, 2, units))
    else:
        width, layers = (64, 1) if quick else (256, 4)
        net = nets.build(
            "gpt", classes=256, width=width, layers=layers, heads=4, context=32, tied=False, seed=0
        )
        example = torch.randint(256, (1, 32))
    with torch.no_grad():
        for key, p in net.named_parameters():
            if p.ndim == 2 and "embedding" not in key and "position" not in key:
                p.copy_(fewer(p, form))
    return net.eval(), example


def measured(name: str, work: Path, quick: bool) -> dict[str, Any]:
    """Least milliseconds of each form in each engine, and the bytes of its plan's file."""
    work.mkdir(parents=True, exist_ok=True)
    subjects = [Subject(form, *_made(name, form, quick)) for form in FORMS]
    found = bench(
        subjects,
        engines=[engine for engine in ENGINES if installed(engine)],
        rounds=3 if quick else 100,
        seconds=2.0 if quick else 15.0,
        clock=time.thread_time,
    )
    ms: dict[str, dict[str, float]] = {form: {} for form in FORMS}
    for t in found.timings:
        ms[t.network][t.engine] = t.least_ms
    size = {}
    for form in FORMS:
        net, example = _made(name, form, quick)
        file = compile_network(net, example, engine="numpy").save(work / f"{form}.plan")
        size[form] = file.stat().st_size
    return {"name": name, "ms": ms, "bytes": size, "notes": list(found.notes)}


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for row in raw["networks"]:
        name, ms, size = row["name"], row["ms"], row["bytes"]
        best = min(v for e, v in ms["dense"].items() if e != "gossamer")
        for form in ("ternary", "grid"):
            what = f"{name}, {form}: plan's times as fast as the best dense float32 engine"
            claims.append(Claim("inference.few-bits", what, best / ms[form]["gossamer"], ">", 1.0))
        what = f"{name}: bytes of the dense plan's file over the ternary one's"
        less = size["dense"] / size["ternary"]
        claims.append(Claim("inference.few-bits", what, less, ">=", 8.0))
    return claims


@experiment("inference-few-bits", seeds=(0,), judge=_judge)
def few_bits(context: Context) -> dict[str, Any]:
    """An LSTM step and a small transformer, dense, ternary and on a grid, as plans."""
    jobs = [(name, context.work / name, context.quick) for name in NETWORKS]
    rows = context.alone(measured, jobs)
    for row in rows:
        for form, ms in row["ms"].items():
            context.say(
                f"{row['name']} {form}: " + ", ".join(f"{e} {v:.3f}" for e, v in ms.items())
            )
    tokens = next(r for r in rows if r["name"] == "transformer")["ms"]
    return {
        "networks": rows,
        "tokens_per_second": {
            form: {engine: 32_000 / v for engine, v in ms.items()} for form, ms in tokens.items()
        },
    }
