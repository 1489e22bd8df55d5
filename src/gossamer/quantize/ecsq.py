"""Entropy-constrained scalar quantization (Chou, Lookabaugh, Gray 1989), in one dimension.

Minimises ``sum_i importance_i (w_i - c_i)^2 + lam * sum_i bits(c_i)``, with
``bits(c) = -log2(share of c)``, by turns: assignments given levels and rates, then levels and
rates given assignments. In one dimension the best assignment is the lower envelope of parabolas,
so a turn costs a few operations a level on prefix sums over a histogram. The zero level is one of
the symbols, so the method prunes as well: the dead zone comes out of zero's low rate. On a grid
the levels are ``k * step`` and only assignments and rates are found, as in DeepCABAC's
rate-distortion quantization (Wiedemann et al. 2020), whose weighting by a diagonal of the Hessian
or Fisher matrix is ``importance``.

Deviation: weights are put in 16 classes of similar importance, each standing for its mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError
from gossamer.quantize.scalar import (
    MOST_CODES,
    Floats,
    Values,
    assign,
    from_codes,
    grid_values,
    importance_of,
    points_of,
    values_of,
)

__all__ = ["ecsq", "entropy", "envelope"]

_CLASSES = 16
_SEARCH = 40  # halvings of the interval of lam for a target


def ecsq(
    tensor: Tensor,
    lam: float | None = None,
    *,
    target_bits: float | None = None,
    max_levels: int = 256,
    grid: float | None = None,
    importance: Tensor | None = None,
    zeros: Literal["free", "fixed"] = "free",
    iterations: int = 100,
    threads: int | None = None,
    name: str = "tensor",
) -> Quantized:
    """Quantize to least ``error + lam * bits``; zero is one of the levels.

    Args:
        tensor: any shape; float32, float64, float16 or bfloat16. Its zeros stay zero.
        lam: price of a bit, in squared weight (times importance).
        target_bits: in place of ``lam``: bits a coded weight; the smallest ``lam`` is found
            whose entropy is no larger.
        max_levels: entries of the code book, zero included.
        grid: a step: the levels are its multiples, ``float32(k) * float32(step)``, and stay.
        importance: of the tensor's shape, not negative; how much a squared error costs.
        zeros: "free" counts the weights that are zero already as uses of the zero symbol (dense
            coding); "fixed" leaves them out of the statistics (their positions are stored
            separately, and a new zero costs what it is rare).
        iterations: most turns.
        threads, name: as for :func:`gossamer.quantize.share`.

    >>> q = ecsq(torch.tensor([0.0, 0.1, 1.0, 1.02, 0.98, -0.05]), 0.01)
    >>> [round(v, 3) for v in q.dequantize().tolist()]
    [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]

    Raises :class:`ArgumentError` for NaN or infinite values, settings outside what is allowed,
    an importance of another shape or below zero, and a grid that needs too many levels.
    """
    if (lam is None) == (target_bits is None):
        raise ArgumentError(f"lam={lam}, target_bits={target_bits}: give one of the two")
    for key, value in (("lam", lam), ("target_bits", target_bits)):
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ArgumentError(f"{key}={value} must be at least 0")
    if grid is not None and not (float(np.float32(grid)) > 0 and math.isfinite(grid)):
        raise ArgumentError(f"grid={grid} must be a positive step in single precision")
    if zeros not in ("free", "fixed"):
        raise ArgumentError(f"zeros {zeros!r} is not one of 'free', 'fixed'")
    if not 2 <= max_levels <= MOST_CODES:
        raise ArgumentError(f"max_levels={max_levels} is outside 2 to {MOST_CODES}")
    if iterations < 1:
        raise ArgumentError(f"iterations={iterations} must be at least 1")
    values = values_of(tensor, name, threads)
    classes = _classes(values, importance, name)
    coder = _Coder(
        classes,
        len(values.flat) - values.nonzero if zeros == "free" else 0,
        _grid(values, grid, max_levels, name),
        max_levels,
        iterations,
    )
    if not classes:
        return from_codes(values, np.zeros(len(values.flat), np.uint8), torch.zeros(1), np.zeros(1))
    if lam is None:
        lam = coder.search(target_bits or 0.0)
    return _applied(values, classes, coder.solve(lam), lam, free=grid is None)


def entropy(quantized: Quantized) -> float:
    """Bits a weight of the codes' own distribution, zero among them (Shannon's bound).

    >>> entropy(Quantized(torch.tensor([0, 0, 1, 2]), torch.tensor([0.0, 1.0, 2.0])))
    1.5
    """
    codes = quantized.codes.reshape(-1).long()
    share = torch.bincount(codes).double() / max(1, codes.numel())
    share = share[share > 0]
    return float((share * -torch.log2(share)).sum())


def envelope(
    levels: NDArray[np.float64], penalty: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Where ``(x - level)^2 + penalty`` is least: levels in use, and thresholds between them.

    Levels ascend; a level of infinite penalty is never used. At a threshold both are equal.

    >>> used, at = envelope(np.array([0.0, 1.0, 2.0]), np.array([0.0, 9.0, 0.0]))
    >>> used.tolist(), at.tolist()
    ([0, 2], [1.0])
    """
    used: list[int] = []
    begin: list[float] = []
    height = (levels * levels + penalty).tolist()
    place = levels.tolist()
    for j, h in enumerate(height):
        if not math.isfinite(h):
            continue
        start = -math.inf
        while used:
            i = used[-1]
            run = place[j] - place[i]
            if run > 0:
                start = (h - height[i]) / (2 * run)
            else:
                start = begin[-1] if h < height[i] else math.inf
            if start > begin[-1]:
                break
            used.pop()
            begin.pop()
            start = -math.inf
        if start < math.inf:
            used.append(j)
            begin.append(start)
    return np.array(used, np.int64), np.array(begin[1:], np.float64)


@dataclass(frozen=True, eq=False)
class _Class:
    """Non-zero weights of one importance. Prefix sums over sorted points."""

    where: NDArray[np.int64] | None  # places in the tensor; None: everywhere
    flat: Floats
    importance: float
    position: NDArray[np.float64]
    count: NDArray[np.float64]
    first: NDArray[np.float64]
    second: NDArray[np.float64]

    @classmethod
    def of(
        cls, flat: Floats, importance: float, where: NDArray[np.int64] | None, values: Values
    ) -> _Class:
        points = points_of(flat, values.low, values.high, values.threads)
        x, n = points.position, points.count

        def prefix(terms: Floats) -> NDArray[np.float64]:
            return np.concatenate([np.zeros(1), np.cumsum(terms, dtype=np.float64)])

        return cls(where, flat, importance, x, prefix(n), prefix(n * x), prefix(n * x * x))


def _classes(values: Values, importance: Tensor | None, name: str) -> list[_Class]:
    if importance is None:
        return [_Class.of(values.flat, 1.0, None, values)] if values.nonzero else []
    weight = importance_of(values, importance, name)
    live = np.flatnonzero(values.flat)
    order = live[np.argsort(weight[live], kind="stable")]
    parts = [p for p in np.array_split(order, _CLASSES) if len(p)]
    return [_Class.of(values.flat[p], float(weight[p].mean()), p, values) for p in parts]


def _grid(
    values: Values, step: float | None, max_levels: int, name: str
) -> NDArray[np.float64] | None:
    if step is None or not values.nonzero:
        return None
    low, high = (round(v / float(np.float32(step))) for v in (values.low, values.high))
    low, high = min(low, 0), max(high, 0)
    if high - low >= max_levels:
        raise ArgumentError(
            f"grid={step} needs {high - low + 1} levels for {name}, max_levels is {max_levels}; "
            "take a coarser grid or raise max_levels"
        )
    return grid_values(torch.arange(low, high + 1), step, values.dtype).double().numpy()


@dataclass(frozen=True, eq=False)
class _Solution:
    levels: NDArray[np.float64]
    bits: NDArray[np.float64]  # of each level; infinite: not in use
    mean_bits: float  # a coded weight


@dataclass(frozen=True, eq=False)
class _Coder:
    classes: list[_Class]
    zeros: int  # uses of the zero symbol that are given
    grid: NDArray[np.float64] | None
    max_levels: int
    iterations: int

    def solve(self, lam: float) -> _Solution:
        levels = self._start(lam) if self.grid is None else self.grid
        bits = np.zeros(len(levels))  # the first turn takes the nearest level
        cost = math.inf
        mean_bits = 0.0
        for _ in range(self.iterations):
            count, first, weight, error = self._turn(levels, bits, lam)
            uses = count + self.zeros * (levels == 0)
            with np.errstate(divide="ignore"):
                bits = -np.log2(uses / uses.sum())
            live = uses > 0
            spent = float((uses[live] * bits[live]).sum())
            mean_bits = spent / float(uses.sum())
            if self.grid is None:
                free = (weight > 0) & (levels != 0)
                levels = np.where(free, first / np.where(weight > 0, weight, 1), levels)
                levels, bits = levels[live], bits[live]
                order = np.argsort(levels, kind="stable")
                levels, bits = levels[order], bits[order]
            before, cost = cost, error + lam * spent
            if math.isfinite(before) and before - cost <= 1e-7 * before:
                break
        return _Solution(levels, bits, mean_bits)

    def search(self, target: float) -> float:
        """The smallest price whose rate does not exceed ``target``, to a part in 10^4."""
        scale = max(c.importance for c in self.classes) or 1.0
        extent = max(float(np.abs(c.position).max()) for c in self.classes)
        low, high = scale * extent**2 * 1e-14, scale * extent**2 * 1e3
        if self.solve(low).mean_bits <= target:
            return low
        for _ in range(_SEARCH):
            middle = math.sqrt(low * high)
            if self.solve(middle).mean_bits > target:
                low = middle
            else:
                high = middle
            if high < low * 1.0001:
                break
        return high

    def _start(self, lam: float) -> NDArray[np.float64]:
        """Multiples of the step that is best at high rate: lam = step^2 ln(2) / 6."""
        low = min(0.0, *(float(c.position[0]) for c in self.classes))
        high = max(0.0, *(float(c.position[-1]) for c in self.classes))
        uses = sum(c.count[-1] for c in self.classes)
        mean = sum(c.importance * c.count[-1] for c in self.classes) / uses
        step = max(
            math.sqrt(6 * lam / math.log(2) / mean) if mean else 0.0,
            (high - low) / (self.max_levels - 1),
        )
        # floor, not round: at most max_levels multiples fit the range
        multiples = np.arange(-math.floor(-low / step), math.floor(high / step) + 1)
        return multiples.astype(np.float64) * step

    def _turn(
        self, levels: NDArray[np.float64], bits: NDArray[np.float64], lam: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]:
        count, first, weight = (np.zeros(len(levels)) for _ in range(3))
        error = 0.0
        for c in self.classes:
            used, thresholds = envelope(levels, _price(lam, c.importance, bits, levels))
            at = np.concatenate([[0], np.searchsorted(c.position, thresholds), [len(c.position)]])
            n, s, q = (np.diff(p[at]) for p in (c.count, c.first, c.second))
            count[used] += n
            first[used] += c.importance * s
            weight[used] += c.importance * n
            x = levels[used]
            error += c.importance * float((q - 2 * x * s + x * x * n).sum())
        return count, first, weight, error


def _price(
    lam: float, importance: float, bits: NDArray[np.float64], levels: NDArray[np.float64]
) -> NDArray[np.float64]:
    if importance == 0:  # weights that do not matter become zero
        return np.where(levels == 0, 0, np.inf)
    live = np.isfinite(bits)  # 0 * inf would be NaN
    return np.where(live, lam / importance * np.where(live, bits, 0), np.inf)


def _applied(
    values: Values, classes: list[_Class], found: _Solution, lam: float, *, free: bool
) -> Quantized:
    codes = np.zeros(len(values.flat), np.int32)
    k = len(found.levels)
    counts, first, weight = np.zeros(k, np.int64), np.zeros(k), np.zeros(k)
    for c in classes:
        used, at = envelope(found.levels, _price(lam, c.importance, found.bits, found.levels))
        middle = np.ascontiguousarray(at, values.flat.dtype)
        own, n, s = assign(c.flat, middle, used + 1, values.threads)
        if c.where is None:
            codes = own
        else:
            codes[c.where] = own
        counts[used] += n
        first[used] += c.importance * s
        weight[used] += c.importance * n
    levels = found.levels
    if free:  # the means of the values themselves, where a histogram had stood for them
        own_mean = (weight > 0) & (levels != 0)
        levels = np.where(own_mean, first / np.where(weight > 0, weight, 1), levels)
    return from_codes(values, codes, torch.from_numpy(levels), counts)
