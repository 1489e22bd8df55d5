"""Arrays where kernels want them, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gossamer.runtime.plan.graph import Node

__all__ = ["LINE", "TOLERANCE", "aligned", "arranged", "difference", "sigmoid"]

LINE = 64
"""Bytes: arrays begin at a cache line."""

TOLERANCE = 1e-4
"""Of the largest result: what float32 in another order may differ by."""


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that is contiguous and begins at a cache line."""
    raw = np.empty(array.nbytes + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    made = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made


def sigmoid(y: np.ndarray) -> np.ndarray:
    """Of each value; never overflows."""
    return 1 / (1 + np.exp(-np.clip(y, -87, 87)))


def arranged(
    node: Node, packed: Sequence[np.ndarray | None], inputs: Sequence[np.ndarray]
) -> list[np.ndarray | None]:
    """A node's inputs at their places: constants, computed arrays (each given once), None."""
    left, seen = list(inputs), dict[str, np.ndarray]()
    given: list[np.ndarray | None] = []
    for name, constant in zip(node.inputs, packed, strict=True):
        if constant is None and name and name not in seen:
            seen[name] = left.pop(0)
        given.append(seen.get(name, constant))
    return given


def difference(wanted: np.ndarray, got: np.ndarray) -> float:
    """Largest difference over the largest magnitude; infinite for another shape or type.

    And where one is not finite and the other is, or where whole numbers differ.
    """
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return float("inf")
    if not wanted.size:
        return 0.0
    if wanted.dtype.kind != "f":
        return 0.0 if np.array_equal(wanted, got) else float("inf")
    fine = np.isfinite(wanted)
    if not np.array_equal(fine, np.isfinite(got)):
        return float("inf")
    a, b = wanted[fine].astype(np.float64), got[fine].astype(np.float64)
    most = float(np.abs(a).max()) if a.size else 0.0
    off = float(np.abs(a - b).max()) if a.size else 0.0
    return off / most if most else off
