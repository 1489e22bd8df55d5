"""Single weights in CSR beside rows and columns taken out, by thread count.

Wen et al., NIPS 2016, the figure of speed-ups by platform: AlexNet's lowered products at the
published sparsities of two networks of one error, l1 and SSL (:mod:`.speed`), on one thread and on
two. Each is timed against the dense product of as many threads, all three one right after the
other in every round. Seconds are by the clock on the wall, since no thread's own clock knows what
waiting for the other costs; speed-ups are of the least seconds, since on a busy machine two
threads mostly wait. Medians of the rounds' ratios, and intervals that hold these with 95 %, stand
beside them: where the two are far apart, the machine was busy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gossamer.core.timing import compared, interleaved, threads
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.structured_sparsity.speed import LAYERS, products

__all__ = ["COUNTS", "by_threads", "row"]

COUNTS = (1, 2)


@torch.no_grad()
def row(name: str, count: int, rounds: int, small: int) -> dict[str, Any]:
    """One layer's products on so many threads."""
    made = products(name, small)
    with threads(count):
        whole, csr, short = interleaved(
            (made.dense, made.csr, made.structured), rounds=rounds, seconds=20.0
        )
    rows: dict[str, Any] = {"name": name, "threads": count, "rounds": len(whole)}
    for key, times in (("l1", csr), ("ssl", short)):
        seen = compared(whole, times)
        rows[key] = {"speed_up": min(whole) / min(times), "ms": 1e3 * min(times),
                     "median": seen.ratio,
                     "interval": seen.interval and list(seen.interval)}  # fmt: skip
    rows["dense_ms"] = 1e3 * min(whole)
    return rows


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    """Figures: a page of the paper, of which nothing is asked."""
    return []


@experiment("ssl-threads", seeds=(0,), judge=_judge)
def by_threads(context: Context) -> dict[str, Any]:
    """Structured sparsity: l1 in CSR against SSL's shrunk products, by thread count."""
    rounds, small = (3, 8) if context.quick else (300, 1)
    rows = context.alone(row, [(name, n, rounds, small) for n in COUNTS for name in LAYERS])
    for found in rows:
        context.say(
            f"{found['name']}, {found['threads']} threads: l1 {found['l1']['speed_up']:.2f}x, "
            f"SSL {found['ssl']['speed_up']:.2f}x"
        )
    return {"rows": rows}
