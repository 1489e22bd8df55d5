"""Schedules: pure functions of progress in [0, 1], for learning rates, densities and strengths.

Each maker returns ``f(progress) -> value``; progress outside [0, 1] is clamped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gossamer.core.errors import ArgumentError

__all__ = ["SCHEDULES", "Schedule", "constant", "cosine", "cubic", "linear", "make", "step"]

Schedule = Callable[[float], float]


def _clamped(f: Schedule) -> Schedule:
    return lambda t: f(min(1.0, max(0.0, t)))


def constant(start: float, end: float | None = None) -> Schedule:
    """Always ``start``; ``end`` is accepted so that every maker has one signature."""
    return _clamped(lambda t: start)


def linear(start: float, end: float = 0.0) -> Schedule:
    """A straight line.

    >>> linear(1.0, 0.0)(0.25)
    0.75
    """
    return _clamped(lambda t: start + (end - start) * t)


def cosine(start: float, end: float = 0.0) -> Schedule:
    """Half a cosine (SGDR without restarts, Loshchilov and Hutter 2017).

    >>> cosine(1.0)(1.0)
    0.0
    """
    return _clamped(lambda t: end + (start - end) * (1 + math.cos(math.pi * t)) / 2)


def cubic(start: float, end: float = 0.0) -> Schedule:
    """Gradual pruning's cubic ramp (Zhu and Gupta 2017, eq. 1), of densities or of rates.

    >>> round(cubic(1.0, 0.1)(0.5), 6)
    0.2125
    """
    return _clamped(lambda t: end + (start - end) * (1 - t) ** 3)


def step(
    start: float,
    end: float | None = None,
    *,
    at: Sequence[float] = (0.5, 0.75),
    factor: float = 0.1,
) -> Schedule:
    """``start`` times ``factor`` for each point of ``at`` that progress has reached."""
    return _clamped(lambda t: start * factor ** sum(t >= a for a in at))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cubic": cubic,
    "step": step,
}


def make(name: str, start: float, end: float = 0.0) -> Schedule:
    """A schedule by name; raises :class:`ArgumentError` listing the names."""
    if name not in SCHEDULES:
        raise ArgumentError(f"schedule {name!r} is not one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](start, end)
