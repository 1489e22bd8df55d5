"""Start a process a worker for each hook, one hook after the other, and put figures together."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median
from typing import IO, Any

from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.distribute.bench.hooks import HOOKS
from gossamer.distribute.bench.links import (
    Link,
    bits_a_second,
    loopback,
    namespaces,
    unavailable,
)
from gossamer.distribute.bench.worker import Job

__all__ = ["ALEXNET", "bench", "table"]

Shapes = tuple[tuple[int, ...], ...]

ALEXNET: Shapes = (
    (64, 3, 11, 11), (64,), (192, 64, 5, 5), (192,), (384, 192, 3, 3), (384,),
    (256, 384, 3, 3), (256,), (256, 256, 3, 3), (256,),
    (4096, 9216), (4096,), (4096, 4096), (4096,), (1000, 4096), (1000,),
)  # fmt: skip
"""Of Krizhevsky 2014's AlexNet, as torchvision has it: 61,100,840 parameters."""


def _shapes(divisor: int) -> Shapes:
    """AlexNet's with the outputs of each layer divided, rounded down, at least 1."""
    return tuple((max(1, s[0] // divisor), *s[1:]) for s in ALEXNET)


def _ranks(job: Callable[[int], Job], link: Link, limit: float) -> list[dict[str, Any]]:
    """Run a job in every rank: their figures. One that fails or takes too long ends all."""
    with ExitStack() as stack:
        logs: list[IO[bytes]] = []
        running: list[subprocess.Popen[bytes]] = []
        for rank, prefix in enumerate(link.prefixes):
            out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            logs += [out, err]
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "gossamer.distribute.bench.worker",
                 job(rank).dump()],
                stdout=out,
                stderr=err,
                env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"},  # addresses have no names
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)
            running.append(process)
        end = time.monotonic() + limit
        while any(p.poll() is None for p in running):
            if any(p.poll() for p in running) or time.monotonic() > end:
                break
            time.sleep(0.05)
        codes = [p.poll() for p in running]
        if any(codes):
            rank = next(r for r, code in enumerate(codes) if code)
            logs[2 * rank + 1].seek(0)
            said = logs[2 * rank + 1].read().decode(errors="replace").strip().splitlines()
            raise GossamerError(f"rank {rank} failed: {said[-1] if said else codes[rank]}")
        if None in codes:
            raise GossamerError(f"rank {codes.index(None)} still ran after {limit:.0f} s")
        logs[0].seek(0)
        found: list[dict[str, Any]] = json.loads(logs[0].read().splitlines()[-1])
        return found


def _row(name: str, ranks: list[dict[str, Any]], link: Link, parameters: int) -> dict[str, Any]:
    """A hook's figures: a step ends when its last rank does, bytes are the busiest rank's."""
    steps = [max(r["seconds"][i] for r in ranks) for i in range(len(ranks[0]["seconds"]))]
    each = len(ranks) if link.shared else 1
    sent, received = (
        median(max(r[way][i] for r in ranks) / each for i in range(len(steps)))
        for way in ("sent", "received")
    )
    # the copying of gradients is in both
    cpu = min(sum(r["cpu"][i] for r in ranks) / len(ranks) for i in range(len(steps)))
    return {
        "hook": name,
        "seconds": min(steps),
        "median_seconds": median(steps),
        "all_seconds": steps,
        "sent": sent,
        "received": received,
        "sent_a_parameter": sent / parameters,
        "cpu_seconds": cpu,
        "local_seconds": max(r["local"] for r in ranks),
        "ranks_agree": all(r["checksum"] == ranks[0]["checksum"] for r in ranks),
        "bandwidth": min(r["bandwidth"] for r in ranks),
        "latency": max(r["latency"] for r in ranks),
    }


def bench(
    *,
    workers: int,
    rate: str | None,
    hooks: Sequence[str],
    divisor: int,
    warm: int,
    steps: int,
    rounds: int = 1,
    forms: bool = False,
    costs: bool = False,
    where: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure the exchange of AlexNet's gradients under several hooks, all on one link.

    Args:
        workers: processes, one thread each.
        rate: of every link each way, ``1gbit``; None: as fast as the machine is. Loopback has no
            limit.
        hooks: of :data:`~gossamer.distribute.bench.hooks.HOOKS`.
        divisor: of the outputs of each layer, where memory is short; 1: 61,100,840 parameters.
        warm, steps: steps before and while measuring.
        rounds: times that all hooks have their turn, so that noise hits all alike; a figure is
            the best of all rounds.
        forms: also count the bytes of one large tensor in each form of a ternary payload.
        costs: also time what an exchange computes, in all workers at once: seconds an element of
            the names of :class:`~gossamer.distribute.bench.performance.Constants`.
        where: "namespaces", "loopback", or "auto": the first where it is permitted.
        say: receives progress lines.

    Returns link, parameters and one row a hook; a hook that failed has ``error`` in place of
    figures. Raises :class:`ArgumentError` for arguments out of range, and
    :class:`~gossamer.core.errors.GossamerError` where namespaces are asked for and not permitted.
    """
    unknown = [h for h in hooks if h not in HOOKS]
    if unknown or not hooks:
        raise ArgumentError(f"hooks={list(hooks)}: give some of {', '.join(HOOKS)}")
    for name, value, least in (
        ("workers", workers, 2), ("divisor", divisor, 1), ("steps", steps, 1), ("warm", warm, 3),
        ("rounds", rounds, 1),
    ):  # fmt: skip
        if value < least:
            raise ArgumentError(f"{name}={value} must be at least {least}")
    if where not in ("auto", "namespaces", "loopback"):
        raise ArgumentError(f"where={where!r} is not one of auto, namespaces, loopback")
    limit = None if rate is None else bits_a_second(rate)
    reason = unavailable() if where != "loopback" else None
    if where == "namespaces" and reason:
        raise GossamerError(f"namespaces are not to be had here: {reason}")
    shapes = _shapes(divisor)
    parameters = sum(math.prod(s) for s in shapes)
    # the slowest: floats over the ring, and starting up on a machine that is busy
    budget = 300 + (warm + steps) * (5 + 8 * parameters * 8 / (limit or 10**9)) * workers / 2
    with ExitStack() as stack:
        local = where == "loopback" or reason is not None
        link = loopback(workers) if local else stack.enter_context(namespaces(workers, limit))

        def run(hook: str) -> list[dict[str, Any]]:
            # they meet in a file, which all namespaces see: no port to be free, no bytes to count
            with tempfile.TemporaryDirectory() as folder:
                return _ranks(
                    lambda rank: Job(
                        hook, rank, workers, f"file://{folder}/meet", link.interface, shapes,
                        warm, steps, budget,
                    ),
                    link,
                    budget,
                )  # fmt: skip

        say(f"link: {link.kind}" + (f", no namespaces: {reason}" if reason else ""))
        counted = run("forms") if forms else None
        timed = run("costs") if costs else None
        found: dict[str, list[dict[str, Any]]] = {hook: [] for hook in hooks}
        errors: dict[str, str] = {}
        for hook in list(hooks) * rounds:
            if hook in errors:
                continue
            try:
                row = _row(hook, run(hook), link, parameters)
                found[hook].append(row)
                say(f"{hook}: {row['seconds']:.3f} s a step, {row['sent'] / 1e6:.2f} MB sent")
            except GossamerError as e:
                errors[hook] = str(e)
                say(f"{hook}: {e}")
    rows = [{"hook": h, "error": errors[h]} if h in errors else _best(found[h]) for h in hooks]
    good = [row for row in rows if "error" not in row]
    return {
        "workers": workers,
        "parameters": parameters,
        "link": {
            "kind": link.kind,
            "reason": reason,
            "rate": link.rate,
            # the link's, as its best moment shows them
            "bandwidth": max((r["bandwidth"] for r in good), default=math.nan),
            "latency": min((r["latency"] for r in good), default=math.nan),
        },
        "rows": rows,
        **({"forms": _counted(counted, link)} if counted else {}),
        **({"costs": {k: max(r[k] for r in timed) for k in timed[0]}} if timed else {}),
    }


def _best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several rounds' rows."""
    every = [s for row in rounds for s in row["all_seconds"]]
    return {
        **rounds[0],
        **{key: min(r[key] for r in rounds) for key in ("cpu_seconds", "local_seconds", "latency")},
        "bandwidth": max(row["bandwidth"] for row in rounds),
        "seconds": min(every),
        "median_seconds": median(every),
        "all_seconds": every,
        "ranks_agree": all(row["ranks_agree"] for row in rounds),
    }


def _counted(ranks: list[dict[str, Any]], link: Link) -> dict[str, Any]:
    """Form -> bytes of the payload and on the wire, and how many fewer than float32's."""
    first = ranks[0]["forms"]
    each = len(ranks) if link.shared else 1
    sent = {f: max(r["forms"][f]["sent"] for r in ranks) / each for f in first}
    return {
        form: {
            "payload": row["payload"],
            "sent": sent[form],
            "ratio": sent["float32"] / sent[form],
            "payload_ratio": first["float32"]["payload"] / row["payload"],
        }
        for form, row in first.items()
    }


_STEPS = 4  # of each: by chance alone none of one overlaps the other in 2 of 70 cases


def _speed(plain: dict[str, Any], row: dict[str, Any]) -> str:
    """Plain DDP's seconds over a hook's; ``~`` where steps of the two overlap, or are too few."""
    ours, theirs = row["all_seconds"], plain["all_seconds"]
    apart = max(ours) < min(theirs) or max(theirs) < min(ours)
    enough = min(len(ours), len(theirs)) >= _STEPS
    return f"{plain['seconds'] / row['seconds']:.2f}x" if apart and enough else "~"


def table(found: dict[str, Any]) -> str:
    """The figures of :func:`bench` as text."""
    link = found["link"]
    limit = "no limit" if link["rate"] is None else f"{link['rate'] / 1e6:g} Mbit/s each way"
    lines = [
        f"{found['workers']} workers, {found['parameters']:,} parameters; {link['kind']}, {limit}"
        + (f" (no namespaces: {link['reason']})" if link["reason"] else ""),
        f"{'hook':22}{'s a step':>10}{'MB sent':>10}{'B/parameter':>13}{'CPU s':>8}{'speed':>8}",
    ]
    plain = next((r for r in found["rows"] if r["hook"] == "none" and "error" not in r), None)
    for row in found["rows"]:
        if "error" in row:
            lines.append(f"{row['hook']:22}{row['error']}")
            continue
        ratio = "" if plain is None or plain is row else _speed(plain, row)
        lines.append(
            f"{row['hook']:22}{row['seconds']:10.3f}{row['sent'] / 1e6:10.2f}"
            f"{row['sent_a_parameter']:13.3f}{row['cpu_seconds']:8.3f}{ratio:>8}"
        )
    if link["kind"] == "loopback":
        lines.append("bytes: all traffic of the loopback interface, divided by the workers")
    return "\n".join(lines)
