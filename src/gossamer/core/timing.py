"""How time is taken: in one process, interleaved; the least of several runs, or paired ratios."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from gossamer.core.errors import ArgumentError

__all__ = [
    "Paired",
    "best_of",
    "compared",
    "interleaved",
    "median_interval",
    "one_thread",
    "paired",
    "threads",
]


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


@dataclass(frozen=True)
class Paired:
    """Two functions timed side by side.

    Attributes:
        first, second: median seconds of each.
        ratio: median over the pairs of first over second.
        interval: of that median, at 95 % or a little more; None for fewer than six pairs, of
            which no two are far enough apart to say so much.
        pairs: how many.
    """

    first: float
    second: float
    ratio: float
    interval: tuple[float, float] | None
    pairs: int


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The narrowest interval of order statistics that holds the median with 95 % at least.

    Nothing is assumed of the distribution: the number of values below the median is binomial
    (Hollander and Wolfe, Nonparametric Statistical Methods, 3.6). None for fewer than six values.

    >>> median_interval([3, 1, 2, 6, 5, 4])  # 1 - 2 / 2**6 = 96.9 %
    (1, 6)
    >>> median_interval([1, 2, 3, 4, 5]) is None
    True
    """
    ordered, n = sorted(values), len(values)
    below, outside = 0, 1 / 2**n  # chance that no more than ``below`` of them lie below the median
    if 2 * outside > 0.05:
        return None
    while 2 * (more := outside + math.comb(n, below + 1) / 2**n) <= 0.05:
        below, outside = below + 1, more
    return ordered[below], ordered[n - 1 - below]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch on so many threads inside, on as many as before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> contextlib.AbstractContextManager[None]:
    """torch on one thread inside, on as many as before outside."""
    return threads(1)


def interleaved(
    functions: Sequence[Callable[[], Any]],
    *,
    rounds: int,
    seconds: float,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each function in each round, one right after the other.

    What slows the machine down for a while hits all of a round; their order turns from round to
    round. The first round warms up and is not counted.

    Args:
        rounds: how many at most.
        seconds: after which no other round is begun.
        device: waited for after each run, where it is a CUDA device.

    Raises :class:`ArgumentError` for no rounds.
    """
    if rounds < 1:
        raise ArgumentError(f"rounds={rounds} must be at least 1")
    taken: list[list[float]] = [[] for _ in functions]
    wait = device is not None and device.type == "cuda"
    order = range(len(functions))
    begun = clock()
    for number in range(rounds + 1):
        for i in order if number % 2 else reversed(order):
            start = clock()
            functions[i]()
            if wait:
                torch.cuda.synchronize(device)
            taken[i].append(clock() - start)
        if clock() - begun > seconds:
            break
    # so slow that time was up after the first round: that round
    return [times[1:] or times for times in taken]


def compared(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Two functions' seconds in the same rounds."""
    ratios = [x / max(y, 1e-12) for x, y in zip(first, second, strict=True)]
    return Paired(
        median(first), median(second), median(ratios), median_interval(ratios), len(ratios)
    )


def paired(
    first: Callable[[], Any],
    second: Callable[[], Any],
    *,
    pairs: int,
    seconds: float,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Paired:
    """Time two functions in pairs (:func:`interleaved`), on one thread of torch.

    Raises :class:`ArgumentError` for no pairs.
    """
    if pairs < 1:
        raise ArgumentError(f"pairs={pairs} must be at least 1")
    with one_thread():
        return compared(
            *interleaved((first, second), rounds=pairs, seconds=seconds, device=device, clock=clock)
        )
