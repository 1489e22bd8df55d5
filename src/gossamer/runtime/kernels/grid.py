"""Weights that lie on a grid of few steps, as codes without an error.

Quantized training leaves each value at a whole number of steps, and folding a norm multiplies a
row's step. Codes that are those numbers lose nothing and take fewer bits of a file than the nearest
ones of 127.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["row_step"]

_OFF = 1e-3  # of a step: what folding in float32 may move a value by
_LEAST = 8  # steps that the least value of a row may be


def row_step(row: NDArray[np.float32], most: int) -> float | None:
    """The step of which all values are whole multiples, at most ``most`` in magnitude.

    >>> row_step(np.float32([0.5, 0, -0.75]), 127)
    0.25

    None where there is none, or no value but zero.
    """
    live = np.abs(row[row != 0].astype(np.float64))
    if not live.size:
        return None
    least = live.min()
    for parts in range(1, _LEAST + 1):
        step = least / parts
        numbers = np.rint(live / step)
        if numbers.max() > most:
            return None
        if np.abs(live / step - numbers).max() <= _OFF:
            # the step that is nearest for all, where the least value alone was rounded
            return float(live @ numbers / (numbers @ numbers))
    return None
