"""Weight sharing by one-dimensional k-means: Deep Compression (Han, Mao, Dally, ICLR 2016), sec. 3.

The non-zero weights of a tensor are clustered to least within-cluster sum of squares (eq. 2) and
zero keeps a code of its own. Starting points as in the paper: Forgy (random weights), density
(equal spacing of the distribution function) and linear (equal spacing of [min, max], the paper's
choice), each followed by Lloyd's iteration, which sorted values and their prefix sums make exact
and cheap. ``init="optimal"`` is the global optimum instead: dynamic programming with divide and
conquer (Wang and Song 2011; Gronlund et al. 2017) over the distinct values when they are few,
else over a histogram of 2^16 bins, polished by Lloyd's iteration on the values themselves.

With ``importance`` the sum of squares is weighted, so that weights which the loss feels get the
finer values: by the diagonal of the Fisher matrix (Kim et al., SqueezeLLM, arXiv 2306.07629) or of
the Hessian (Choi et al., arXiv 1612.01543).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError
from gossamer.quantize.scalar import (
    MOST_CODES,
    Floats,
    Points,
    Values,
    assign,
    from_levels,
    grid_step,
    grid_values,
    importance_of,
    native,
    points_of,
    values_of,
    weighted_points,
)

__all__ = ["INITS", "rate", "share", "share_model"]

INITS = ("linear", "density", "forgy", "optimal", "uniform")

_MOST_OPTIMAL = 4096  # clusters; the table of the dynamic program grows with them
_TABLE = 1 << 26  # its largest size in entries
_POLISH = 1  # passes over unsorted values after the histogram's optimum: exact means


def share(
    tensor: Tensor,
    *,
    bits: int | None = None,
    clusters: int | None = None,
    init: str = "linear",
    iterations: int = 300,
    generator: torch.Generator | None = None,
    importance: Tensor | None = None,
    threads: int | None = None,
    name: str = "tensor",
) -> Quantized:
    """Cluster the non-zero weights; zero keeps code 0.

    Args:
        tensor: any shape; float32, float64, float16 or bfloat16. The code book has its dtype.
        bits: 2^bits code-book entries, zero included: 2^bits - 1 clusters.
        clusters: give this or ``bits``. At most 65535 ("optimal": 4096).
        init: "linear", "density", "forgy" (needs ``generator``), "optimal", or "uniform": the
            multiples of one step, without iteration.
        iterations: most Lloyd iterations.
        importance: of the tensor's shape, not negative; how much a squared error costs. Weights
            of importance 0 take the nearest value, and have no say in it while others have.
        threads: of the compiled kernel; None: torch's number. Does not change the result.
        name: what errors call the tensor.

    Returns codes (uint8, or int32 above 256 entries) and the code book: zero, then the centroids
    ascending. Clusters that end empty are left out; with no more distinct values than clusters
    the code book is the distinct values.

    >>> q = share(torch.tensor([0.0, 1.0, 1.2, 5.0, -2.0]), clusters=3)
    >>> q.codes.tolist(), [round(v, 3) for v in q.codebook.tolist()]
    ([0, 2, 2, 3, 1], [0.0, -2.0, 1.1, 5.0])

    Raises :class:`ArgumentError` for NaN or infinite weights (with their number), for settings
    outside what is allowed, for "forgy" without a generator, and for an importance of another
    shape, that is negative, or not finite.
    """
    k = _clusters(bits, clusters, init)
    if iterations < 0:
        raise ArgumentError(f"iterations={iterations} must be at least 0")
    if init == "forgy" and generator is None:
        raise ArgumentError("init='forgy' draws weights at random and needs a generator")
    values = values_of(tensor, name, threads)
    costs = None if importance is None else importance_of(values, importance, name)
    distinct = _few_distinct(values, k)
    if distinct is not None:
        return from_levels(values, distinct)
    if init == "uniform":
        step = grid_step(values.low, values.high, k)
        first, last = np.rint(values.low / step), np.rint(values.high / step)
        levels = torch.arange(int(min(first, 0)), int(max(last, 0)) + 1)
        return from_levels(values, grid_values(levels, step, values.dtype).double().numpy())
    if init == "optimal":
        return from_levels(values, _optimal(values, k, iterations, costs))
    each: Floats | None = None
    if costs is None:
        ordered = np.sort(values.kept())
    else:
        ordered, each = _sorted(values, costs)
    start = _start(ordered, k, init, generator)
    return from_levels(values, _lloyd(ordered, start, iterations, each))


def share_model(
    model: nn.Module,
    *,
    bits: int | Mapping[str, int],
    init: str = "linear",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    iterations: int = 300,
    generator: torch.Generator | None = None,
    threads: int | None = None,
) -> dict[str, Quantized]:
    """:func:`share` for each compressible weight; the model is not changed.

    ``bits``: one number, or a number for each pattern as in :func:`gossamer.core.names.select` (a
    later pattern wins; weights that none matches are left out).

    Raises :class:`ArgumentError` as :func:`share` does, and for a pattern that matches nothing.
    """
    chosen = names.weights(model, include=include, exclude=exclude)
    widths: dict[str, int] = {}
    for pattern, width in bits.items() if isinstance(bits, Mapping) else [("*", bits)]:
        widths.update(dict.fromkeys(names.select(chosen, pattern), width))
    return {
        n: share(
            p,
            bits=widths[n],
            init=init,
            iterations=iterations,
            generator=generator,
            threads=threads,
            name=n,
        )
        for n, p in chosen.items()
        if n in widths
    }


def rate(weights: int, clusters: int, bits: int = 32) -> float:
    """Deep Compression's rate (eq. 1): bits before over bits after, code book included.

    >>> rate(16, 4)  # the paper's example: sixteen weights, four shared values
    3.2
    """
    return weights * bits / (weights * np.log2(clusters) + clusters * bits).item()


def _clusters(bits: int | None, clusters: int | None, init: str) -> int:
    if init not in INITS:
        raise ArgumentError(f"init {init!r} is not one of {', '.join(INITS)}")
    if (bits is None) == (clusters is None):
        raise ArgumentError(f"bits={bits}, clusters={clusters}: give one of the two")
    if bits is not None and not 1 <= bits <= 16:
        raise ArgumentError(f"bits={bits} is outside 1 to 16")
    k = clusters if clusters is not None else (1 << (bits or 0)) - 1
    most = _MOST_OPTIMAL if init == "optimal" else MOST_CODES - 1
    if not 1 <= k <= most:
        advice = "; init='density' takes more" if init == "optimal" else ""
        raise ArgumentError(f"{k} clusters are outside 1 to {most} for init={init!r}{advice}")
    return k


def _few_distinct(values: Values, k: int) -> Floats | None:
    """The distinct non-zero values if there are at most ``k``."""
    if values.nonzero > k:
        # A sample settles it nearly always: a tensor of few values shows few anywhere.
        sample = values.flat[: max(4 * k, 1 << 12)]
        if len(np.unique(sample)) > k + 1:
            return None
    distinct = np.unique(values.kept())
    return distinct if len(distinct) <= k else None


def _start(ordered: Floats, k: int, init: str, generator: torch.Generator | None) -> Floats:
    n = len(ordered)
    if init == "linear":
        return np.linspace(ordered[0], ordered[-1], k, dtype=np.float64)
    if init == "density":
        return ordered[((np.arange(k) + 0.5) * (n / k)).astype(np.int64)].astype(np.float64)
    if n <= 1 << 22:
        drawn = torch.randperm(n, generator=generator)[:k]
    else:  # drawing one weight twice is as rare as it is harmless
        drawn = torch.randint(n, (k,), generator=generator)
    return np.sort(ordered[drawn.numpy()]).astype(np.float64)


def _sorted(values: Values, costs: Floats) -> tuple[Floats, Floats]:
    """The non-zero values ascending, and the importance of each."""
    live = np.flatnonzero(values.flat)
    order = live[np.argsort(values.flat[live], kind="stable")]
    return values.flat[order], costs[order]


def _lloyd(
    ordered: Floats, levels: Floats, iterations: int, costs: Floats | None = None
) -> NDArray[np.float64]:
    """Lloyd's iteration to its fixed point; clusters that lose all values keep their place."""
    each = ordered if costs is None else ordered * costs
    prefix = np.concatenate([[0.0], np.cumsum(each, dtype=np.float64)])
    weight = None if costs is None else np.concatenate([[0.0], np.cumsum(costs)])
    levels = np.asarray(levels, np.float64)
    previous = None
    for _ in range(iterations):
        middle = ((levels[1:] + levels[:-1]) / 2).astype(ordered.dtype)
        bounds = np.concatenate([[0], np.searchsorted(ordered, middle), [len(ordered)]])
        if previous is not None and np.array_equal(bounds, previous):
            break
        previous = bounds
        mass = np.diff(bounds) if weight is None else np.diff(weight[bounds])
        means = np.diff(prefix[bounds]) / np.where(mass > 0, mass, 1)
        levels = np.where(mass > 0, means, levels)
    return levels


def _optimal(values: Values, k: int, iterations: int, costs: Floats | None) -> NDArray[np.float64]:
    each: Floats | None = None
    if costs is not None:
        ordered, each = _sorted(values, costs)
        points = weighted_points(ordered, each)
    else:
        points = points_of(values.flat, values.low, values.high, values.threads)
        if points.ordered is None and k > 1024:  # fewer bins than 64 a cluster: sort instead
            points = points_of(values.flat, values.low, values.high, values.threads, ordered=True)
    if len(points.position) * k > _TABLE:
        points = _thinned(points, max(_TABLE // k, k))
    bounds = partition(points.count, points.position, k, values.threads)
    prefix = np.concatenate([[0.0], np.cumsum(points.count * points.position)])
    weight = np.concatenate([[0.0], np.cumsum(points.count)])
    levels = np.diff(prefix[bounds]) / np.diff(weight[bounds])
    if points.exact:
        return levels
    if points.ordered is not None:
        return _lloyd(points.ordered, levels, iterations, each)
    labels = np.arange(1, k + 1)
    for _ in range(min(_POLISH, iterations)):
        middle = ((levels[1:] + levels[:-1]) / 2).astype(values.flat.dtype)
        _, count, total = assign(values.flat, middle, labels, values.threads, codes=False)
        levels = np.where(count > 0, total / np.maximum(count, 1), levels)
    return levels


def _thinned(points: Points, most: int) -> Points:
    """Neighbouring points merged, so that at most ``most`` remain."""
    starts = np.unique(np.linspace(0, len(points.position), most + 1)[:-1].astype(np.int64))
    count = np.add.reduceat(points.count, starts)
    position = np.add.reduceat(points.count * points.position, starts) / count
    return Points(position, count, points.ordered, False)


def partition(
    weight: NDArray[np.float64], position: NDArray[np.float64], k: int, threads: int
) -> NDArray[np.int64]:
    """Bounds (k + 1) of the k clusters of least weighted sum of squares; positions ascend.

    Divide and conquer on the monotone first index of the last cluster: O(k n log n).
    """
    # Around the mean, S^2 / W loses no digits to a common offset.
    centred = position - (weight * position).sum() / weight.sum()
    kernel = native()
    if kernel is not None:
        bounds = np.empty(k + 1, np.int64)
        kernel.partition(weight, centred, bounds, threads)
        return bounds
    n = len(weight)
    w = np.concatenate([[0.0], np.cumsum(weight)])
    s = np.concatenate([[0.0], np.cumsum(weight * centred)])
    best = np.zeros(n + 1)
    best[1:] = s[1:] ** 2 / w[1:]
    starts = []
    for c in range(2, k + 1):
        best, start = _layer(w, s, best, c, n - (k - c))
        starts.append(start)
    bounds = np.empty(k + 1, np.int64)
    bounds[k], bounds[0] = n, 0
    for c in range(k, 1, -1):
        bounds[c - 1] = starts[c - 2][bounds[c]]
    return bounds


def _layer(
    w: NDArray[np.float64], s: NDArray[np.float64], before: NDArray[np.float64], c: int, last: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """One more cluster: all ends of one depth of the recursion at a time."""
    best, start = np.zeros(len(w)), np.zeros(len(w), np.int64)
    ranges = np.array([[c, last, c - 1, last - 1]])  # ends [lo, hi], starts in [first, final]
    while len(ranges):
        lo, hi, first, final = ranges.T
        end = (lo + hi) // 2
        size = np.minimum(end - 1, final) - first + 1
        offset = np.concatenate([[0], np.cumsum(size)[:-1]])
        at = np.arange(size.sum()) - np.repeat(offset - first, size)
        ends = np.repeat(end, size)
        value = before[at] + (s[ends] - s[at]) ** 2 / (w[ends] - w[at])
        top = np.maximum.reduceat(value, offset)
        hits = np.flatnonzero(value == np.repeat(top, size))
        chosen = at[hits[np.searchsorted(hits, offset)]]
        best[end], start[end] = top, chosen
        ranges = np.concatenate(
            [
                np.stack([lo, end - 1, first, chosen], 1),
                np.stack([end + 1, hi, chosen, final], 1),
            ]
        )
        ranges = ranges[ranges[:, 0] <= ranges[:, 1]]
    return best, start
