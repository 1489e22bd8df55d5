"""One worker of ``gossamer bench exchange``, a process of its own.

``python -m gossamer.distribute.bench.worker JOB``, a JSON object; rank 0 prints all ranks' figures
as one JSON line. The backward pass hands out the same random gradients every time, so that a step
is its exchange and the copying of gradients into buckets; ``local`` is the latter alone.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gossamer.distribute import Key, TernGrad
from gossamer.distribute.bench.hooks import Close, register
from gossamer.distribute.bench.links import counters

__all__ = ["Job", "main"]


@dataclass(frozen=True)
class Job:
    """What one worker does.

    Attributes:
        hook: of :data:`gossamer.distribute.bench.hooks.HOOKS`; or "forms": bytes of one large
            tensor; or "costs": seconds of what an exchange computes.
        address: of the rendezvous, ``file://path``.
        shapes: of the parameters.
        warm, steps: steps before and while measuring.
        timeout: seconds a collective may take.
    """

    hook: str
    rank: int
    workers: int
    address: str
    interface: str
    shapes: tuple[tuple[int, ...], ...]
    warm: int
    steps: int
    timeout: float

    def dump(self) -> str:
        """As the command line takes it."""
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: str) -> Job:
        """The inverse of :meth:`dump`."""
        given = json.loads(text)
        return Job(**{**given, "shapes": tuple(tuple(s) for s in given["shapes"])})


class _Fixed(torch.autograd.Function):
    """A loss whose gradients are given."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        # aliases, which DDP copies into its buckets; of the tensors themselves autograd would make
        # copies first, as no network's backward pass does
        return (None, *(g.detach() for g in ctx.gradients))


class _Parameters(nn.Module):
    def __init__(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.p = nn.ParameterList([nn.Parameter(torch.zeros(s)) for s in shapes])

    def forward(self, gradients: list[Tensor]) -> Tensor:
        out: Tensor = _Fixed.apply(gradients, *self.p)
        return out


def _timed(job: Job, function: Callable[[], object]) -> dict[str, list[float]]:
    """Wall and processor seconds, bytes sent and received of each measured call."""
    rows: dict[str, list[float]] = {"seconds": [], "cpu": [], "sent": [], "received": []}
    for turn in range(job.warm + job.steps):
        dist.barrier()
        sent, received = counters(job.interface)
        cpu, start = time.process_time(), time.perf_counter()
        function()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        # a barrier first: what another rank still sends belongs to this call
        dist.barrier()
        after = counters(job.interface)
        if turn >= job.warm:
            rows["seconds"].append(seconds)
            rows["cpu"].append(cpu)
            rows["sent"].append(after[0] - sent)
            rows["received"].append(after[1] - received)
    return rows


def _steps(job: Job) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1 + job.rank)
    gradients = [torch.randn(s, generator=draw).mul_(1e-3) for s in job.shapes]
    model = _Parameters(job.shapes)
    # PowerSGD issues collectives in callbacks, which hang with more than one bucket on gloo
    cap = 4096 if job.hook.startswith("powersgd") else 25

    def ddp(hook: str) -> tuple[Callable[[], None], Close]:
        wrapped = DistributedDataParallel(
            model, gradient_as_bucket_view=True, bucket_cap_mb=cap, init_sync=False
        )
        close = register(hook, wrapped, model)

        def step() -> None:
            for p in model.parameters():
                p.grad = None
            wrapped(gradients).backward()

        return step, close

    step, close = ddp(job.hook)
    rows: dict[str, Any] = _timed(job, step)
    rows["checksum"] = [
        float(p.grad.double().sum()) for p in model.parameters() if p.grad is not None
    ]
    close()
    step, _ = ddp("local")
    rows["local"] = min(_timed(replace(job, steps=3), step)["seconds"])
    return rows


# renamed in torch 2.13, which warns of the older name
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _link(job: Job) -> dict[str, float]:
    """Bytes a second of large messages, some at a time, and seconds of the smallest."""
    each, at_once = 1 << 23, 4
    mine = torch.full((each,), job.rank, dtype=torch.uint8)
    outs = [torch.empty(each * job.workers, dtype=torch.uint8) for _ in range(at_once)]

    def several() -> None:
        for work in [_all_gather(out, mine, async_op=True) for out in outs]:
            work.wait()

    brief = replace(job, warm=1, steps=3)
    large = _timed(brief, several)["seconds"]
    small = _timed(brief, partial(_all_gather, torch.empty(8 * job.workers), torch.zeros(8)))
    return {
        "bandwidth": at_once * each * (job.workers - 1) / min(large),
        "latency": min(small["seconds"]) / (job.workers - 1),
    }


def _forms(job: Job) -> dict[str, Any]:
    """Bytes of a large ternary gradient in each of its forms, and as floats."""
    draw = torch.Generator().manual_seed(1 + job.rank)
    g, codec = torch.randn(1 << 24, generator=draw), TernGrad()
    key = Key(0, 0, job.rank, 0)
    found: dict[str, Any] = {}
    payloads: dict[str, Tensor] = {"float32": g.view(torch.uint8)}
    payloads |= {f: codec.encode(g, codec.scale(g), key, form=f) for f in codec.forms}
    for form, payload in payloads.items():
        # sparse payloads differ in length
        longest = torch.tensor(payload.numel())
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        mine = torch.zeros(int(longest), dtype=torch.uint8)
        mine[: payload.numel()] = payload
        out = torch.empty(mine.numel() * job.workers, dtype=torch.uint8)
        rows = _timed(job, partial(_all_gather, out, mine))
        found[form] = {"payload": mine.numel(), "sent": min(rows["sent"])}
    return {"elements": g.numel(), "forms": found}


def _costs(job: Job) -> dict[str, float]:
    """Seconds an element of the parts of a ternary exchange, all ranks at work at once."""
    elements, four = max(math.prod(shape) for shape in job.shapes), 4
    g = torch.randn(elements, generator=torch.Generator().manual_seed(1 + job.rank))
    codec, key, out = TernGrad(), Key(0, 0, job.rank, 0), torch.empty_like(g)
    scale, bits = codec.scale(g), codec.sum_bits(four)
    payloads = [codec.encode(g, scale, key, form="sparse")] * four
    sums = codec.sum_codes(payloads, elements, forms="sparse")
    packed = codec.pack_sums(sums, bits, form="sparse")
    parts: dict[str, tuple[Callable[[], object], int]] = {
        "encode": (lambda: codec.encode(g, codec.scale(g), key, form="sparse"), 1),
        "decode": (
            lambda: codec.decode_mean(payloads, [scale] * four, out, four, forms="sparse"), four,
        ),
        "add": (lambda: torch.add(g, out, out=out), 1),
        "sum": (lambda: codec.sum_codes(payloads, elements, forms="sparse"), four),
        "pack": (lambda: codec.pack_sums(sums, bits, form="sparse"), 1),
        "unpack": (
            lambda: codec.decode_sums(packed, scale, elements, bits, four, out, form="sparse"), 1,
        ),
    }  # fmt: skip
    return {
        name: min(_timed(job, part)["seconds"]) / elements / times
        for name, (part, times) in parts.items()
    }


_OTHER: dict[str, Callable[[Job], dict[str, Any]]] = {"forms": _forms, "costs": _costs}


def main(text: str) -> None:
    """Run a job; print every rank's figures from rank 0."""
    job = Job.load(text)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = job.interface
    dist.init_process_group(
        "gloo",
        init_method=job.address,
        rank=job.rank,
        world_size=job.workers,
        timeout=timedelta(seconds=job.timeout),
    )
    other = _OTHER.get(job.hook)
    rows = {**_link(job), **_steps(job)} if other is None else other(job)
    everyone: list[Any] = [None] * job.workers
    dist.all_gather_object(everyone, rows)
    if job.rank == 0:
        print(json.dumps(everyone), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    # gloo's threads now and then abort an interpreter that is being torn down
    os._exit(0)
