"""Gradient exchange, what must be exact: ranks, simulation, replay, NaN, and a rank that dies.

A net of five layers on digits, every batch shared by N processes over gloo on this machine, DDP
with the hook and several buckets. The simulation trains one net in one process on N gradients a
step. Faults: three processes exchange without end until one is killed or stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gossamer import datasets
from gossamer.core.errors import ExchangeError, GossamerError
from gossamer.distribute import GradientExchange, by_name, exchange, simulate
from gossamer.experiments import Claim, Context, experiment

__all__ = ["exact"]

THRESHOLD = 100  # biases stay exact, all weights are coded
TIMEOUT = 5.0  # of the fault runs, seconds
FAULTS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


def net(seed: int) -> nn.Module:
    """64-128-128-128-128-10, the same in every process."""
    torch.manual_seed(seed)
    sizes = [64, 128, 128, 128, 128]
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(128, 10))


def batches(seed: int, size: int, steps: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """One share a rank, step by step."""
    split = datasets.load("digits").train
    for step in range(steps):
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randperm(len(split), generator=g)[: 16 * size]
        yield [split.batch(index[rank::size]) for rank in range(size)]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """As TernGrad trains LeNet."""
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def digest(model: nn.Module) -> str:
    """Of every bit of every parameter."""
    parts = [p.detach().numpy().tobytes() for p in model.parameters()]
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def hooked(model: nn.Module, codec: str, seed: int) -> tuple[nn.Module, GradientExchange]:
    """The net in DDP, buckets of some two layers."""
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.1)
    state = GradientExchange(model, by_name(codec), threshold=THRESHOLD, seed=seed, timeout=60)
    ddp.register_comm_hook(state, GradientExchange.hook)
    return ddp, state


def steps_of(
    model: nn.Module, ddp: nn.Module, optimizer: torch.optim.Optimizer, rank: int, shares: Any
) -> list[str]:
    """Train; the digest after every 100 steps and the last."""
    seen = []
    for step, share in enumerate(shares):
        x, y = share[rank]
        optimizer.zero_grad()
        cross_entropy(ddp(x), y).backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            seen.append(digest(model))
    return [*seen, digest(model)]


def train(rank: int, size: int, codec: str, seed: int, steps: int) -> dict[str, Any]:
    """One rank's digests, whole and replayed from its middle in new buckets."""
    model = net(seed)
    ddp, state = hooked(model, codec, seed)
    optimizer = optimizer_of(model)
    shares = list(batches(seed, size, steps))
    half = steps // 2
    steps_of(model, ddp, optimizer, rank, shares[:half])
    saved = {
        "model": {n: t.clone() for n, t in model.state_dict().items()},
        "optimizer": optimizer.state_dict()["state"],
        "exchange": state.state_dict(),
    }
    saved["optimizer"] = {
        i: {n: t.clone() for n, t in s.items()} for i, s in saved["optimizer"].items()
    }
    whole = steps_of(model, ddp, optimizer, rank, shares[half:])
    buckets = len(state._layouts)
    state.close()
    again = net(seed + 1)
    again.load_state_dict(saved["model"])
    ddp, state = hooked(again, codec, seed)
    state.load_state_dict(saved["exchange"])
    other = optimizer_of(again)
    other.load_state_dict({**other.state_dict(), "state": saved["optimizer"]})
    replayed = steps_of(again, ddp, other, rank, shares[half:])
    state.close()
    return {"whole": whole, "replayed": replayed, "layouts": buckets}


def simulated(size: int, codec: str, seed: int, steps: int) -> list[str]:
    """The same training in this process."""
    model = net(seed)
    optimizer = optimizer_of(model)
    half, seen = steps // 2, []
    for step, shares in enumerate(batches(seed, size, steps)):
        every = []
        for x, y in shares:
            model.zero_grad()
            cross_entropy(model(x), y).backward()
            every.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        mean = simulate(every, by_name(codec), step=step, seed=seed, threshold=THRESHOLD)
        for name, p in model.named_parameters():
            p.grad = mean[name]
        optimizer.step()
        if step >= half and (step + 1 - half) % 100 == 0:
            seen.append(digest(model))
    return [*seen, digest(model)]


def usage(rank: int, size: int) -> dict[str, Any]:
    """NaN and infinity on one rank; and the hook beside plain DDP where gradients are unusual."""
    found: dict[str, Any] = {"not_seen": 0, "scaler_wrong": 0, "error": 0.0}
    for topology in ("all_gather", "two_phase", "server"):
        for bad in (float("nan"), float("inf")):
            own = {"w": torch.randn(2000), "b": torch.randn(9), "empty": torch.zeros(0)}
            if rank == size - 1:
                own["w"][7] = own["b"][3] = bad
            exchange(own, by_name("terngrad"), step=0, topology=topology)
            found["not_seen"] += int(not own["w"].isnan().all() or bool(own["b"].isfinite().all()))
    model = net(0)
    ddp, state = hooked(model, "terngrad", 0)
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, shares in enumerate(batches(0, size, 3)):
        x, y = shares[rank]
        before = digest(model)
        optimizer.zero_grad()
        overflow = float("inf") if step == 1 and rank == size - 1 else 1.0
        scaler.scale(cross_entropy(ddp(x), y) * overflow).backward()
        scaler.step(optimizer)
        scaler.update()
        found["scaler_wrong"] += int((digest(model) == before) != (step == 1))
    found["scaler_wrong"] += int(scaler.get_scale() != 512.0)
    state.close()
    for case in (accumulated, joined, mixed):
        plain, coded = case(rank, size, None), case(rank, size, "sq8")
        for name, grad in plain.items():
            if grad.numel():
                # SQ8 is within its largest gradient / 127, halves within their own rounding
                room = size * grad.abs().max() / 127 + grad.abs() * torch.finfo(grad.dtype).eps
                worst = float(((coded[name] - grad).abs() / (room + 1e-12)).max())
                found["error"] = max(found["error"], worst)
    return found


def _wrap(model: nn.Module, codec: str | None, **options: Any) -> Any:
    if codec is None:
        return DistributedDataParallel(model, **options)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.1, **options)
    state = GradientExchange(model, by_name(codec), threshold=THRESHOLD, timeout=60)
    ddp.register_comm_hook(state, GradientExchange.hook)
    return ddp


def _gradients(ddp: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in ddp.module.named_parameters() if p.grad is not None}


def accumulated(rank: int, size: int, codec: str | None) -> dict[str, Tensor]:
    """Two batches into one gradient, the first under ``no_sync``."""
    ddp = _wrap(net(0), codec)
    one, two = batches(1, size, 2)
    with ddp.no_sync():
        cross_entropy(ddp(one[rank][0]), one[rank][1]).backward()
    cross_entropy(ddp(two[rank][0]), two[rank][1]).backward()
    return _gradients(ddp)


def joined(rank: int, size: int, codec: str | None) -> dict[str, Tensor]:
    """Rank 0 has a batch more than the others."""
    ddp, last = _wrap(net(0), codec), {}
    with ddp.join():
        for shares in batches(2, size, 2 + (rank == 0)):
            ddp.zero_grad()
            cross_entropy(ddp(shares[rank][0]), shares[rank][1]).backward()
            last = _gradients(ddp)
    return last if rank == 0 else {}


class Mixed(nn.Module):
    """bfloat16 beside float32, an arm for each kind of rank, a parameter of no elements."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.narrow = nn.Linear(64, 64), nn.Linear(64, 64, dtype=torch.bfloat16)
        self.arms = nn.ModuleList(nn.Linear(64, 10) for _ in range(3))
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: Tensor, arm: int) -> Tensor:
        """Logits by one arm; the third is never used."""
        hidden = torch.relu(self.wide(x.flatten(1)))
        out: Tensor = self.arms[arm](torch.relu(self.narrow(hidden.bfloat16())).float())
        return out


def mixed(rank: int, size: int, codec: str | None) -> dict[str, Tensor]:
    """Unused and zero-size parameters, two dtypes."""
    ddp = _wrap(Mixed(), codec, find_unused_parameters=True)
    for shares in batches(3, size, 2):
        ddp.zero_grad()
        cross_entropy(ddp(shares[rank][0], rank % 2), shares[rank][1]).backward()
    return _gradients(ddp)


def fault(rank: int, size: int, signum: int) -> dict[str, Any]:
    """Exchange until it fails: who was named, and after how many seconds."""
    own, step, began = {"w": torch.randn(4000)}, 0, time.monotonic()
    while True:
        if step == 20 and rank == size - 1:
            os.kill(os.getpid(), signum)
        began = time.monotonic()
        try:
            exchange(own, by_name("terngrad"), step=step, timeout=TIMEOUT)
        except ExchangeError as e:
            seconds = time.monotonic() - began
            return {"seconds": seconds, "named": f"rank {size - 1} of {size}" in str(e)}
        step += 1


def _rank(function: str, rank: int, size: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=300),
    )
    found = globals()[function](rank, size, *arguments)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    if function != "fault":
        dist.barrier()
        dist.destroy_process_group()


def ranks(function: Callable[..., Any], size: int, *arguments: Any, lost: int = 0) -> list[Any]:
    """What ``function(rank, size, *arguments)`` returns in processes of their own.

    The last ``lost`` are not waited for.
    """
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            spawn.Process(target=_rank, args=(function.__name__, rank, size, folder, arguments))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes[: size - lost]:
            process.join()
        codes = [process.exitcode for process in processes[: size - lost]]
        for process in processes:
            process.kill()
            process.join()
        if any(codes):
            raise GossamerError(f"{function.__name__} over {size} ranks ended with {codes}")
        found = [Path(folder, f"{rank}.json") for rank in range(size - lost)]
        return [json.loads(path.read_text()) for path in found]


def compared(codec: str, size: int, seed: int, steps: int) -> dict[str, Any]:
    """How many digests differ: between ranks, from the simulation, after a replay."""
    found = ranks(train, size, codec, seed, steps)
    whole, expected = [row["whole"] for row in found], simulated(size, codec, seed, steps)
    return {
        "codec": codec,
        "ranks": size,
        "seed": seed,
        "steps": steps,
        "layouts": min(row["layouts"] for row in found),
        "ranks_differ": sum(row != whole[0] for row in whole),
        "simulation_differs": sum(row != expected for row in whole),
        "replay_differs": sum(row["replayed"] != row["whole"] for row in found),
    }


def failed(kind: str) -> list[Any]:
    """What two ranks say of a third that is killed or stopped."""
    return ranks(fault, 3, int(FAULTS[kind]), lost=1)


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    runs, unusual, faults = raw["runs"], raw["unusual"], raw["faults"]
    steps = runs[0]["steps"]
    tern = [run for run in runs if run["codec"] == "terngrad"]
    rest = [run for run in runs if run["codec"] != "terngrad"]

    def count(chosen: list[dict[str, Any]], key: str) -> float:
        return float(sum(run[key] for run in chosen))

    return [
        Claim("exchange.6", "ranks whose parameters differ", count(runs, "ranks_differ"), "==", 0),
        Claim(
            "exchange.6",
            "ranks that differ from the one-process simulation",
            count(runs, "simulation_differs"),
            "==",
            0,
        ),
        Claim("exchange.6", "kinds of bucket, at least", min(r["layouts"] for r in runs), ">=", 3),
        Claim("exchange.8", "replays that differ", count(runs, "replay_differs"), "==", 0),
        Claim("exchange.9", "NaN or Inf unseen on a rank", count(unusual, "not_seen"), "==", 0),
        Claim("exchange.9", "GradScaler steps gone wrong", count(unusual, "scaler_wrong"), "==", 0),
        Claim(
            "exchange.9",
            "accumulation, join, unused, empty, mixed dtypes: largest deviation from plain DDP, "
            "in units of what the codec allows",
            max(row["error"] for row in unusual),
            "<=",
            1.0,
        ),
        *(
            Claim(
                "exchange.10",
                f"{name} rank: seconds to the error on the others (timeout {TIMEOUT:g})",
                max(row["seconds"] for row in rows),
                "<=",
                TIMEOUT + 10,
            )
            for name, rows in faults.items()
        ),
        Claim(
            "exchange.10",
            "errors that do not name the rank",
            float(sum(not row["named"] for rows in faults.values() for row in rows)),
            "==",
            0,
        ),
        Claim(
            "terngrad.4",
            f"copies that differ after {steps} steps, from each other or the simulation",
            count(tern, "ranks_differ") + count(tern, "simulation_differs"),
            "==",
            0,
        ),
        Claim(
            "loss-aware.6",
            "SQ3: ranks that differ from the simulation",
            count(rest, "simulation_differs"),
            "==",
            0,
        ),
    ]


@experiment("exchange-exact", seeds=(0,), judge=_judge)
def exact(context: Context) -> dict[str, Any]:
    """Exchange 6, 8, 9, 10, TernGrad 4, loss-aware 6: bits over ranks, replay, NaN, faults."""
    quick, steps = context.quick, 20 if context.quick else 1000
    jobs = [("terngrad", n) for n in ((2, 4) if quick else (2, 3, 4, 5))]
    jobs += [("sq3", n) for n in ((2,) if quick else (2, 4))]
    kinds = list(FAULTS)[: 1 if quick else 2]
    runs = [(codec, size, seed, steps) for seed in context.seeds for codec, size in jobs]
    unusual = context.alone(ranks, [(usage, size) for size in (2, 4)])
    faults = context.alone(failed, [(kind,) for kind in kinds])
    return {
        "runs": context.alone(compared, runs),
        "unusual": [row for rows in unusual for row in rows],
        "faults": dict(zip(kinds, faults, strict=True)),
    }
