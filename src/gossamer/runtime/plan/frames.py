"""Maps with a border, and what the windows over them see: views of numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["framed", "taps"]

Array = np.ndarray


def framed(
    x: Array, padding: Sequence[Sequence[int]], fill: float
) -> tuple[Array, Callable[[], object]]:
    """An array with a border around the map, and what copies the map into it."""
    if not any(map(any, padding)):
        return x, lambda: None
    sizes = [s + sum(p) for s, p in zip(x.shape[2:], padding, strict=True)]
    frame = np.full((*x.shape[:2], *sizes), fill, x.dtype)
    inner = tuple(slice(p[0], p[0] + s) for s, p in zip(x.shape[2:], padding, strict=True))
    inside = frame[(slice(None), slice(None), *inner)]
    return frame, lambda: np.copyto(inside, x)


def taps(frame: Array, a: Mapping[str, Any], places: Sequence[int]) -> list[Array]:
    """For each place in the window, what all windows see there: (N, C, *places) each."""
    spread = a.get("dilation", [1] * len(places))
    found = []
    for at in np.ndindex(*a["kernel"]):
        parts = tuple(
            slice(i * d, i * d + (p - 1) * s + 1, s)
            for i, d, p, s in zip(at, spread, places, a["stride"], strict=True)
        )
        found.append(frame[(slice(None), slice(None), *parts)])
    return found
