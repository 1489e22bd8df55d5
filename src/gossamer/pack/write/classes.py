"""Column classes: columns of like density coded together, each class with its own statistics.

The first layer of an image network has inputs that are always dark, whose weights are pruned
first; a few classes of columns capture most of what a position-by-position model would.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["column_classes"]

_BINS = 48
_TABLE_BITS = 8 * 24  # a stream's own tables and lengths, roughly


def column_classes(
    kept: NDArray[np.int64], rows: int, most: int = 8
) -> tuple[NDArray[np.uint8], float] | None:
    """Split columns by density so that positions cost least.

    Args:
        kept: non-zero entries of each column, ``(cols,)``.
        rows: entries of each column.
        most: at most this many classes.

    Returns:
        The class of each column (lowest density first) and the bytes saved, by entropy; ``None``
        when one class is best.
    """
    values, index = np.unique(kept, return_inverse=True)
    if len(values) < 2:
        return None
    columns = np.bincount(index)
    ones = values * columns
    if len(values) > _BINS:  # equal shares of the columns, keeping neighbours together
        share = (np.cumsum(columns) - columns / 2) * _BINS / len(kept)
        bin_of = np.minimum(share.astype(np.int64), _BINS - 1)
        columns = np.bincount(bin_of, columns, _BINS)
        ones = np.bincount(bin_of, ones, _BINS)
        used = columns > 0
        place = np.cumsum(used) - 1
        index = place[bin_of[index]]
        columns, ones = columns[used], ones[used]
    starts = np.concatenate([[0.0], np.cumsum(columns)])
    hits = np.concatenate([[0.0], np.cumsum(ones)])
    n = len(columns)
    cells = (starts[None, :] - starts[:, None]) * rows
    cost = _entropy_bits(cells, hits[None, :] - hits[:, None])  # [from, to)

    best = cost[0].copy()  # cost of the first j bins in the classes so far
    cuts: list[NDArray[np.int64]] = []
    winner: tuple[float, list[int]] | None = None
    for count in range(2, min(most, n) + 1):
        upper = np.where(np.arange(n + 1)[:, None] < np.arange(n + 1), best[:, None] + cost, np.inf)
        cuts.append(upper.argmin(axis=0))
        best = upper.min(axis=0)
        edges, at = [n], n
        for cut in reversed(cuts):
            at = int(cut[at])
            edges.append(at)
        edges = [0, *edges[::-1]] if edges[-1] else edges[::-1]
        sizes = np.diff(starts[edges])
        sizes = sizes[sizes > 0]
        total = float(best[n]) + float((sizes * np.log2(len(kept) / sizes)).sum())
        total += _TABLE_BITS * count
        if winner is None or total < winner[0]:
            winner = total, edges
    if winner is None:
        return None
    saved = float(cost[0, n]) + _TABLE_BITS - winner[0]
    classes = np.searchsorted(np.array(winner[1][1:-1]), index, side="right").astype(np.uint8)
    return (classes, saved / 8) if saved > 0 and classes.any() else None


def _entropy_bits(cells: NDArray[np.float64], hits: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.clip(hits / cells, 0.0, 1.0)
        bits = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
        return np.where((p > 0) & (p < 1), np.nan_to_num(bits) * cells, 0.0)
