"""What the scalar quantizers share: values as arrays, points of a histogram, thresholds to codes.

The compiled kernel is used where it is installed; everything works through numpy without it, and
``GOSSAMER_NATIVE=0`` in the environment turns it off.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError

__all__ = [
    "MOST_CODES",
    "Points",
    "Values",
    "assign",
    "codes_dtype",
    "find_step",
    "from_codes",
    "from_levels",
    "grid_step",
    "grid_values",
    "importance_of",
    "native",
    "points_of",
    "values_of",
    "weighted_points",
]

MOST_CODES = 65536
"""Entries of the largest code book, zero included."""

_BINS = 1 << 16
_SORTED = 1 << 20  # up to here the values are sorted, which gives every answer exactly
_CHUNK = 1 << 20

Floats = NDArray[Any]  # float32 or float64
Integers = NDArray[Any]


def native() -> Any:
    """The compiled kernel, or None."""
    if os.environ.get("GOSSAMER_NATIVE") == "0":
        return None
    try:
        return importlib.import_module("gossamer._native.kmeans")
    except ImportError:
        return None


@dataclass(frozen=True, eq=False)
class Values:
    """A tensor's values, ready to quantize.

    Attributes:
        flat: all of them, float32 (float64 for float64 tensors), contiguous.
        shape, dtype, device: the tensor's own.
        nonzero: how many are not zero.
        low, high: the extremes of the non-zero values; meaningless without any.
    """

    flat: Floats
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    nonzero: int
    low: float
    high: float
    threads: int

    def kept(self) -> Floats:
        """The non-zero values."""
        return self.flat if self.nonzero == len(self.flat) else self.flat[self.flat != 0]

    def quantized(self, codes: Integers, book: Floats | Tensor) -> Quantized:
        """Codes and book (zero first) as the tensor's own shape, dtype and device."""
        entries = torch.as_tensor(book).to(self.device, self.dtype)
        return Quantized(torch.from_numpy(codes).reshape(self.shape).to(self.device), entries)


def values_of(tensor: Tensor, name: str, threads: int | None) -> Values:
    """Check and convert; raises :class:`ArgumentError` for what is no finite floating point."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ArgumentError(f"{name} must be a floating-point tensor, got {kind}")
    if threads is None:
        threads = torch.get_num_threads()
    elif threads < 1:
        raise ArgumentError(f"threads={threads} must be at least 1")
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1).numpy()
    kernel = native()
    if kernel is not None:
        bad, nonzero, low, high = kernel.scan(flat, threads)
    else:
        good = np.isfinite(flat)
        bad, nonzero = int(flat.size - good.sum()), int(np.count_nonzero(flat))
        some = flat[flat != 0] if nonzero and not bad else np.zeros(1, flat.dtype)
        low, high = float(some.min()), float(some.max())
    if bad:
        raise ArgumentError(
            f"{name} holds {bad} NaN or infinite values of {flat.size}; "
            "repair the weights before quantizing them"
        )
    return Values(flat, tensor.shape, tensor.dtype, tensor.device, nonzero, low, high, threads)


@dataclass(frozen=True, eq=False)
class Points:
    """Values in few places: ascending positions and how many values stand at each.

    ``ordered`` holds the values themselves, sorted, where that was cheap or needed; ``exact``
    says that every distinct value is a point of its own.
    """

    position: Floats
    count: Floats
    ordered: Floats | None
    exact: bool

    def ordered_or(self, values: Values) -> Floats:
        """The sorted values, sorting ``values`` if that has not been done."""
        return np.sort(values.kept()) if self.ordered is None else self.ordered


def points_of(
    flat: Floats, low: float, high: float, threads: int, *, ordered: bool = False
) -> Points:
    """The non-zero values as at most 2^17 points: a histogram, or the distinct values.

    Args:
        flat: values; zeros are left out.
        low, high: extremes of the non-zero values.
        ordered: take the sorted path whatever the size; it resolves any distribution.
    """
    kernel = native()
    if not ordered and kernel is not None and flat.size > _SORTED and high > low:
        counts = np.zeros(_BINS, np.int64)
        kernel.histogram(flat, low, high, counts, threads)
        held = np.flatnonzero(counts)
        width = (high - low) / _BINS
        position = low + (held + 0.5) * width
        count = counts[held].astype(np.float64)
        total = count.sum()
        spread = (count * (position - (count * position).sum() / total) ** 2).sum() / total
        # Wider bins are too coarse for 256 levels: an outlier stretched the range.
        if width < 0.001 * spread**0.5:
            return Points(position, count, None, False)
    values = np.sort(flat[flat != 0])
    fresh = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    exact = len(fresh) <= _BINS
    if exact:
        starts = fresh if len(values) else fresh[:0]
    else:
        # Equal widths resolve the tails, equal counts resolve the bulk.
        edges = np.linspace(low, high, _BINS + 1)[:-1].astype(values.dtype)
        shares = values[(np.arange(_BINS // 2) * (len(values) / (_BINS // 2))).astype(np.int64)]
        starts = np.unique(np.searchsorted(values, np.concatenate([edges, shares])))
        starts = np.unique(np.concatenate([[0], starts[starts < len(values)]]))
    count = np.diff(np.concatenate([starts, [len(values)]])).astype(np.float64)
    if exact:
        return Points(values[starts].astype(np.float64), count, values, True)
    sums = np.add.reduceat(values, starts, dtype=np.float64)
    return Points(sums / count, count, values, False)


def importance_of(values: Values, importance: Tensor, name: str) -> Floats:
    """How much each value's squared error costs, float64, in the order of ``values.flat``.

    Raises :class:`ArgumentError` for another shape than the tensor's, and for costs that are
    negative or not finite.
    """
    if importance.shape != values.shape:
        raise ArgumentError(
            f"importance of {name} has shape {tuple(importance.shape)}, the tensor "
            f"{tuple(values.shape)}"
        )
    costs: Floats = importance.detach().to("cpu", torch.float64).reshape(-1).numpy()
    if not np.isfinite(costs).all() or (len(costs) and costs.min() < 0):
        raise ArgumentError(f"importance of {name} must be finite and at least 0 everywhere")
    return costs


def weighted_points(ordered: Floats, costs: Floats) -> Points:
    """Ascending values of some importance as points, whose ``count`` is their importance.

    Values of importance 0 are no points; where none has any, all count the same.
    """
    costs = costs if costs.any() else np.ones_like(costs)
    # below this part of the mean a point has no say, and would only cost digits
    live = costs > 1e-12 * costs.mean()
    values, each = ordered[live], costs[live]
    fresh = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    exact = len(fresh) <= _BINS
    if not exact:
        # equal counts resolve the bulk, equal importance what matters
        total = np.cumsum(each)
        shares = np.searchsorted(total, np.linspace(0, total[-1], _BINS // 2, endpoint=False))
        fresh = np.unique(np.concatenate([np.linspace(0, len(values) - 1, _BINS // 2), shares]))
        fresh = fresh.astype(np.int64)
        fresh = np.unique(np.minimum(fresh, len(values) - 1))
    count = np.add.reduceat(each, fresh)
    position = np.add.reduceat(each * values, fresh) / count
    return Points(position, count, None if exact else ordered, exact)


def codes_dtype(entries: int) -> np.dtype[Any]:
    """The element type of codes into a book of so many entries: uint8 or int32."""
    return np.dtype(np.uint8 if entries <= 256 else np.int32)


def assign(
    flat: Floats, thresholds: Floats, labels: Integers, threads: int, *, codes: bool = True
) -> tuple[Integers, NDArray[np.int64], NDArray[np.float64]]:
    """``labels[number of thresholds <= value]`` for each value, 0 for zeros.

    Args:
        flat: values of the thresholds' dtype.
        thresholds: ascending, one less than labels.
        labels: codes, below 65536.
        codes: False computes only the counts and sums; the codes are empty then.

    Returns codes, and per label position the count and sum of its non-zero values.
    """
    dtype = codes_dtype(int(labels.max()) + 1)
    count, total = np.zeros(len(labels), np.int64), np.zeros(len(labels), np.float64)
    out = np.empty(len(flat) if codes else 0, dtype)
    kernel = native()
    if kernel is not None:
        kernel.assign(
            flat,
            thresholds,
            labels.astype(np.int32),
            out if codes else None,
            count,
            total,
            threads,
        )
        return out, count, total
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        rank = np.searchsorted(thresholds, part, side="right")
        live = part != 0
        count += np.bincount(rank[live], minlength=len(labels))
        total += np.bincount(rank[live], weights=part[live], minlength=len(labels))
        if codes:
            out[start : start + _CHUNK] = np.where(live, labels[rank], 0)
    return out, count, total


def from_levels(values: Values, levels: Floats, thresholds: Floats | None = None) -> Quantized:
    """Quantize the non-zero values to ascending levels; unused levels leave the book.

    ``thresholds``: between neighbouring levels; None: the midpoints of the levels as they are
    after rounding to the tensor's dtype. A level of exactly zero becomes code 0.
    """
    rounded = torch.from_numpy(np.asarray(levels, np.float64)).to(values.dtype)
    if thresholds is None:
        rounded = torch.unique(rounded)
        middle = rounded.to(torch.float64).numpy()
        thresholds = (middle[1:] + middle[:-1]) / 2
    thresholds = np.ascontiguousarray(thresholds, values.flat.dtype)
    labels = np.arange(1, max(1, len(rounded)) + 1)
    codes, counts, _ = assign(values.flat, thresholds, labels, values.threads)
    if not len(rounded):
        return values.quantized(codes, rounded.new_zeros(1))
    return from_codes(values, codes, rounded, counts)


def from_codes(values: Values, codes: Integers, levels: Tensor, counts: Integers) -> Quantized:
    """Codes 1, 2, ... of ascending ``levels`` as a code book of distinct, used, non-zero entries.

    ``counts``: uses of each level. Levels that are equal or zero in the tensor's dtype merge.
    """
    rounded = levels.to(values.dtype)
    book, place = torch.unique(rounded, return_inverse=True)
    used = np.bincount(place.numpy(), weights=counts, minlength=len(book)) > 0
    kept = torch.from_numpy(used) & (book != 0)
    entries = torch.cat([book.new_zeros(1), book[kept]])
    new = (torch.cumsum(kept, 0) * kept)[place].numpy()
    if not np.array_equal(new, np.arange(1, len(levels) + 1)):
        table = np.concatenate([[0], new]).astype(codes_dtype(len(entries)))
        codes = table[codes]
    return values.quantized(codes, entries)


def grid_values(levels: Tensor | Sequence[int], step: float, dtype: torch.dtype) -> Tensor:
    """``levels * step`` rounded once to ``dtype``: the form that packs as an affine grid.

    In float32 this is ``float32(level) * float32(step)``; the other types round the product of
    the level and the same single-precision step (float64: of the step as it is).
    """
    k = torch.as_tensor(levels)
    if dtype == torch.float64:
        return k.to(torch.float64) * step
    if dtype == torch.float16:  # torch would round twice, through float32
        product = k.cpu().numpy().astype(np.float64) * float(np.float32(step))
        return torch.from_numpy(product.astype(np.float16)).to(k.device)
    return (k.to(torch.float32) * float(np.float32(step))).to(dtype)


def grid_step(low: float, high: float, levels: int) -> float:
    """A single-precision step whose multiples over [low, high], zero aside, are at most ``levels``.

    The range includes zero. The smallest such step but for a fraction of a level.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    for spare in (0.0, 0.5, 1.0):
        step = np.float32((high - low) / max(levels - spare, 0.5))
        if np.rint(high / float(step)) - np.rint(low / float(step)) <= levels:
            return float(step)
    return float(np.float32(2 * (high - low) / max(1, levels)))


def find_step(codebook: Tensor) -> tuple[Tensor, float] | None:
    """Integer levels (K,) and the step whose multiples the code book is, bit for bit; else None."""
    values = codebook.detach().cpu().to(torch.float64)
    sizes = torch.unique(values.abs())
    if len(sizes) < 2 or sizes[0] != 0:
        return None
    # A book without neighbours on the grid: the gap is a multiple. In half precision the gap is
    # rounded more than the smallest value.
    gaps = [float(sizes.diff().min()) / parts for parts in range(1, 7)]
    for gap in [*gaps, *(float(sizes[1]) / parts for parts in range(1, 4))]:
        levels = torch.round(values / gap)
        if float(levels.abs().max()) >= 1 << 24:
            continue
        # The rounding of the gap grows with the level; least squares averages it away, twice.
        for _ in range(2):
            step = float((values * levels).sum() / (levels * levels).sum())
            levels = torch.round(values / step)
        near = np.float32(step)
        for guess in (near, np.nextafter(near, np.float32(0)), np.nextafter(near, 2 * near)):
            exact = step if codebook.dtype == torch.float64 else float(guess)
            for trial in {exact, float(guess)}:
                k = levels.to(torch.int64)
                if torch.equal(grid_values(k, trial, codebook.dtype), codebook.detach().cpu()):
                    return k, trial
    return None
