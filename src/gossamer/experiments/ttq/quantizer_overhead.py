"""What few-bit weights cost in training: a step over the float step, ResNet-20, batch 128.

One thread, one process. Each quantizer is compared with the float network under the same
optimizer, in blocks of four steps on the same batch: float, quantized, quantized, float, so that
a slow drift of the machine cancels. A block's ratio is of the processor time of this process,
which other processes do not enter; the figure is the median over blocks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer import nets
from gossamer.experiments import Claim, Context, experiment
from gossamer.quantize import (
    LSQ,
    TTQ,
    FixedWeights,
    LossAware,
    Projected,
    fixed_activations_,
    loss_aware,
)

__all__ = ["QUANTIZERS", "claims", "overhead", "ratios"]

NET = "resnet-20"
Attach = Callable[[nn.Module, torch.optim.Optimizer], Any]

# All layers but the first and the last, fixed point all; alternations always run to their number.
QUANTIZERS: dict[str, Attach] = {
    "ttq": lambda m, o: TTQ(threshold=0.05, start="ones", weight_decay=None, every=100).attach(
        m, o
    ),
    "lab": lambda m, o: LossAware("lab", beta=None, clip=1.0).attach(m, o),
    "lat, exact": lambda m, o: LossAware("lat", beta=None, clip=1.0).attach(m, o),
    "laq-3, 10 alternations": lambda m, o: LossAware(
        partial(loss_aware.linear, bits=3, iterations=10, tolerance=0.0), beta=None, clip=1.0
    ).attach(m, o),
    "fixed point, 8 bits": lambda m, o: FixedWeights(8, every=100).attach(m, o),
    "twn": lambda m, o: Projected("twn", clip=None).attach(m, o),
    "bwn": lambda m, o: Projected("bwn", clip=None).attach(m, o),
    "dorefa-4": lambda m, o: Projected("dorefa-4", clip=None).attach(m, o),
    "lsq, 4 bits": lambda m, o: LSQ(bits=4, weight_decay=None).attach(m, o),
}
BOUNDS = {
    "ttq": ("ttq", 1.15),
    "lab": ("loss-aware", 1.15),
    "laq-3, 10 alternations": ("loss-aware", 1.3),
    "fixed point, 8 bits": ("fixed-point", 1.15),
}


class _Run:
    """A network in training, float or quantized."""

    def __init__(self, net: str, name: str | None, adam: bool, x: Tensor) -> None:
        self.model = nets.build(net, seed=0)
        if name is not None and name.startswith("fixed"):  # activations too
            self.model = fixed_activations_(self.model, 8, [x])
        if adam:
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
                self.model.parameters(), 1e-3, fused=True
            )
        else:
            self.optimizer = torch.optim.SGD(
                self.model.parameters(), 0.01, momentum=0.9, weight_decay=2e-4, fused=True
            )
        if name is not None:
            QUANTIZERS[name](self.model, self.optimizer)

    def step(self, x: Tensor, y: Tensor) -> float:
        """Seconds of processor time that a step takes."""
        began = time.process_time()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        return time.process_time() - began


def ratios(net: str, batch: int, blocks: int, only: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Ratio, its quartiles and milliseconds of a step, for each quantizer named."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        g = torch.Generator().manual_seed(0)
        shape = (1, 28, 28) if net.startswith("lenet") else (3, 32, 32)
        x = torch.randn(batch, *shape, generator=g)
        y = torch.randint(0, 10, (batch,), generator=g)
        # the loss-aware ones read Adam's moments
        adam = {name: name.startswith("la") for name in only}
        floats = {kind: _Run(net, None, kind, x) for kind in set(adam.values())}
        runs = {name: _Run(net, name, adam[name], x) for name in only}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in only}
        for block in range(blocks + 1):
            for name, run in runs.items():
                base = floats[adam[name]]
                first = base.step(x, y)
                quantized = run.step(x, y) + run.step(x, y)
                if block:  # the first warms up
                    seconds[name].append((quantized / 2, (first + base.step(x, y)) / 2))
    finally:
        torch.set_num_threads(threads)
    rows = {}
    for name, pairs in seconds.items():
        found = sorted(a / b for a, b in pairs)
        rows[name] = {
            "ratio": statistics.median(found),
            "quartiles": [found[len(found) // 4], found[-1 - len(found) // 4]],
            "optimizer": "adam" if adam[name] else "sgd",
            "step_ms": 1e3 * statistics.median(a for a, _ in pairs),
            "float_step_ms": 1e3 * statistics.median(b for _, b in pairs),
        }
    return rows


def claims(net: str, rows: Mapping[str, Mapping[str, Any]]) -> list[Claim]:
    """The bounded ones among :func:`ratios`."""
    return [
        Claim(f"{page}.beyond", f"{name}: training step over the float step, {net}",
              rows[name]["ratio"], "<=", bound)
        for name, (page, bound) in BOUNDS.items()
        if name in rows
    ]  # fmt: skip


@experiment("quantizer-overhead", seeds=(0,), judge=lambda raw: claims(NET, raw["ratios"]))
def overhead(context: Context) -> dict[str, Any]:
    """Few-bit weights: a training step over the float step, ResNet-20, batch 128, one thread."""
    batch, blocks = (2, 2) if context.quick else (128, 15)
    (rows,) = context.map(ratios, [(NET, batch, blocks, list(QUANTIZERS))])
    for name, row in rows.items():
        context.say(f"{name:28} {row['ratio']:.3f}x  {row['step_ms']:.1f} ms a step")
    return {"ratios": rows, "blocks": blocks, "batch": batch}
