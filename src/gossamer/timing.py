"""How time is taken: in one process, interleaved, the least of several runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gossamer.errors import ArgumentError

__all__ = ["best_of"]


def best_of(
    functions: Sequence[Callable[[], Any]],
    rounds: int,
    *,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Least seconds of each function, their runs interleaved so that noise hits all alike.

    ``device``: waited for after each run, where it is a CUDA device. ``clock``: such as
    ``time.thread_time``, for work of one thread that others must not interrupt. Raises
    :class:`ArgumentError` for no rounds.
    """
    if rounds < 1:
        raise ArgumentError(f"rounds={rounds} must be at least 1")
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = clock()
            function()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            best[i] = min(best[i], clock() - start)
    return best
