"""What few-bit weights cost in training: a step over the float step, ResNet-20, batch 128.

    python benchmarks/quantizers.py [--blocks 15] [--steps 3] [--json quantizer-overhead.json]

One thread, one process. A float network and one for each quantizer take turns: in each block every
one makes the same number of steps on the same batch, in a fresh order. A ratio is the median over
blocks of the block's time over the float time of the same block, with the same optimizer.
"""

import argparse
import random
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from record import record
from torch.nn import functional as F

from gossamer import nets
from gossamer.quantize import LSQ, TTQ, LossAware, Projected, loss_aware
from gossamer.reproduce import Claim

# all layers but the first and the last; alternations always run to their number of iterations
QUANTIZERS = {
    "ttq": lambda: TTQ(threshold=0.05, start="ones", weight_decay=None, every=100),
    "lab": lambda: LossAware("lab", beta=None, clip=1.0),
    "lat, exact": lambda: LossAware("lat", beta=None, clip=1.0),
    "laq-3, 10 alternations": lambda: LossAware(
        partial(loss_aware.linear, bits=3, iterations=10, tolerance=0.0), beta=None, clip=1.0
    ),
    "twn": lambda: Projected("twn", clip=None),
    "bwn": lambda: Projected("bwn", clip=None),
    "dorefa-4": lambda: Projected("dorefa-4", clip=None),
    "lsq, 4 bits": lambda: LSQ(bits=4, weight_decay=None),
}
PAGES = {"ttq": ("ttq", 1.15), "lab": ("loss-aware", 1.15)}
PAGES["laq-3, 10 alternations"] = ("loss-aware", 1.3)


def prepared(net, make, optimizer):
    model = nets.build(net, seed=0)
    if optimizer == "adam":
        made = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    else:
        made = torch.optim.SGD(
            model.parameters(), 0.01, momentum=0.9, weight_decay=2e-4, fused=True
        )
    if make is not None:
        make().attach(model, made)
    return model, made


def steps(run, x, y, count):
    model, optimizer = run
    began = time.perf_counter()
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--net", default="resnet-20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--only", nargs="*", choices=list(QUANTIZERS), default=list(QUANTIZERS))
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    began = time.time()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 28, 28) if options.net.startswith("lenet") else (3, 32, 32)
    x = torch.randn(options.batch, *shape, generator=generator)
    y = torch.randint(0, 10, (options.batch,), generator=generator)
    # the loss-aware ones read Adam's moments; each is compared with its own optimizer's float step
    kind = {name: "adam" if name.startswith("la") else "sgd" for name in options.only}
    runs = {name: prepared(options.net, QUANTIZERS[name], kind[name]) for name in options.only}
    floats = {f"float, {k}": prepared(options.net, None, k) for k in sorted(set(kind.values()))}
    runs |= floats
    seconds = {name: [] for name in runs}
    for block in range(options.blocks + 1):
        for name in random.sample(list(runs), len(runs)):
            taken = steps(runs[name], x, y, options.steps)
            if block:  # the first warms up
                seconds[name].append(taken)
    rows, claims = {}, []
    for name in options.only:
        base = seconds[f"float, {kind[name]}"]
        ratios = sorted(a / b for a, b in zip(seconds[name], base, strict=True))
        rows[name] = {
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "optimizer": kind[name],
            "step_ms": 1e3 * statistics.median(seconds[name]) / options.steps,
            "float_step_ms": 1e3 * statistics.median(base) / options.steps,
        }
        print(f"{name:28} {rows[name]['ratio']:.3f}x  {rows[name]['step_ms']:.1f} ms a step")
        if name in PAGES:
            page, bound = PAGES[name]
            what = f"{name}: training step over the float step, {options.net}"
            claims.append(Claim(f"{page}.beyond", what, rows[name]["ratio"], "<=", bound))
    record(
        "quantizer-overhead",
        f"Few-bit weights: training step over the float step, {options.net}, "
        f"batch {options.batch}, one thread",
        began,
        claims,
        {"ratios": rows, "blocks": options.blocks, "steps": options.steps},
        options.json,
    )


if __name__ == "__main__":
    main()
