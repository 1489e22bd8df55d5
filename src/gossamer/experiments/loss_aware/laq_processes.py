"""Loss-aware training by processes, against the one process that plays them all, and its bytes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from gossamer import nets
from gossamer.core import names
from gossamer.distribute import SQm
from gossamer.distribute.exchange.server import LossAwareLoop, Rule
from gossamer.experiments import Claim, Context, experiment
from gossamer.quantize.loss_aware import linear

__all__ = ["processes"]

PAGE = "loss-aware"
BITS = (2, 3, 4)
NET = "mlp-64-100-10"
BATCH = 16


def _setup(bits: int, workers: int | dist.ProcessGroup, seed: int) -> LossAwareLoop:
    model = nets.build(NET, seed=seed)
    weights = list(names.weights(model))
    return LossAwareLoop(
        names.parameters(model),
        codec=SQm(bits, clip=3.0, scaler="sigma"),
        coded=weights,
        projections=dict.fromkeys(weights, partial(linear, bits=3)),
        rule=Rule(beta=0.9, momentum=None, eps=1e-8, clip=1.0),
        workers=workers,
        seed=seed,
    )


def _gradients(weights: dict[str, Tensor], step: int, rank: int) -> dict[str, Tensor]:
    """Of a rank's own random examples; what they are does not matter here."""
    g = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(BATCH, 64, generator=g)
    y = torch.randint(0, 10, (BATCH,), generator=g)
    leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
    out = torch.func.functional_call(nets.build(NET, seed=0), leaves, (x,))
    found = torch.autograd.grad(nn.functional.cross_entropy(out, y), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def _rank(rank: int, workers: int, bits: int, steps: int, seed: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", workers),
        rank=rank,
        world_size=workers,
        timeout=timedelta(seconds=300),
    )
    assert dist.group.WORLD is not None
    loop = _setup(bits, dist.group.WORLD, seed)
    for t in range(steps):
        loop.step([_gradients(loop.weights, t, rank)], 0.003 / math.sqrt(t + 1))
    torch.save({"weights": loop.weights, "sent": list(loop.sent)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def compare(bits: int, workers: int, steps: int, seed: int) -> dict[str, Any]:
    """Elements that differ anywhere between processes and simulation, and bytes a step."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (workers, bits, steps, seed, folder), nprocs=workers)
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(workers)]
    loop = _setup(bits, workers, seed)
    for t in range(steps):
        grads = [_gradients(loop.weights, t, rank) for rank in range(workers)]
        loop.step(grads, 0.003 / math.sqrt(t + 1))
    differ = sum(
        int((rank["weights"][n].view(torch.int32) != w.view(torch.int32)).sum())
        for rank in found
        for n, w in loop.weights.items()
    )
    coded = [w.numel() for n, w in loop.weights.items() if n in loop.coded]
    exact = 4 * sum(w.numel() for n, w in loop.weights.items() if n not in loop.coded)
    up, down = found[-1]["sent"]
    return {
        "bits": bits,
        "workers": workers,
        "steps": steps,
        "differ": differ,
        "up": up,
        "down": down,
        # a scale of 4 bytes each, biases as floats
        "coded_part": (up - exact - 4 * len(coded)) / (4 * sum(coded)),
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    rows = raw["runs"]
    steps = rows[0]["steps"]
    return [
        Claim(
            f"{PAGE}.6",
            f"processes of 2 to 4 workers against the simulation, {steps} steps: weights that "
            "differ in a bit",
            sum(r["differ"] for r in rows),
            "==",
            0,
        ),
        Claim(
            f"{PAGE}.6",
            "bytes sent beside scales over float32's, less m/32: largest",
            max(abs(r["coded_part"] - r["bits"] / 32) for r in rows),
            "<=",
            1e-3,
        ),
    ]


@experiment("laq-processes", seeds=(0,), judge=_judge)
def processes(context: Context) -> dict[str, Any]:
    """Loss-aware gradients 6: processes equal the simulation bit for bit; bytes are m/32."""
    steps = 3 if context.quick else 100
    grid = [(2, 2)] if context.quick else [(m, n) for m in BITS for n in (2, 3, 4)]
    rows = [compare(m, n, steps, context.seeds[0]) for m, n in grid]
    return {"runs": rows}
