"""One layer after training: pruned, rounded or coded by the inputs that it meets.

What :mod:`gossamer.core.obs` solves, for a weight as a network has it: any layout, rows that meet
inputs of their own (the groups of a convolution, query and key of an attention, experts), tables
of an embedding, half precision; and its bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.core.obs import Choice, Kept, factor, solve, start_from
from gossamer.pack import pack_bytes
from gossamer.pack.format.values import to_bits
from gossamer.pack.write.encode import context_bytes
from gossamer.quantize.obs import (
    Coded,
    Prices,
    Pruned,
    Rounded,
    Sparsity,
    Stored,
    Within,
    inputs_together,
    scale_of,
    step_for,
)
from gossamer.training.layer_inputs import Layout
from gossamer.training.moments import Means, Moments, Part, blocks

__all__ = ["Treatment", "treat"]

_PASSES = 3  # over a rate-coded layer: the first prices codes as rounding to nearest has them
_WIDER = (1.25, 1.6, 2.0)  # grids that are tried where carried errors are cut off
_CODED = 1 << 18  # weights up to which prices are those of the real coder's bytes
_MOST = 1 << 20  # codes of a rate-coded layer, on each side: as fine as float32
_BIAS_BELOW = 1e-12  # of the mean square of the bias: smaller shifts are rounding


@dataclass(frozen=True)
class Treatment:
    """What becomes of a weight; the attributes are those of the stage ``obs``."""

    density: float | None = None
    bits: int | None = None
    rate: float | None = None
    sparsity: Sparsity = "unstructured"
    group: Literal["tensor", "channel"] | int = "channel"
    damp: float = 0.01


@torch.no_grad()
def treat(
    weight: Tensor,
    seen: Moments | None,
    how: Treatment,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> dict[str, Any]:
    """Set one weight in place, and its bias where that helps on the inputs held back.

    Args:
        weight: of two or more dimensions.
        seen: its inputs, used up: their sums are scaled, and let go of; None: they are taken for
            independent, which is rounding to nearest.
        how: what becomes of it.
        mask: of its shape, True where something may stay.
        bias: (outputs,), that is added to its products.

    Returns ``density``, ``error`` (that of the outputs on the inputs, as a part of their power),
    ``bias``: whether the bias was corrected, ``unseen``: rows that no input reached, and ``left``:
    why it was not pruned though a density was given, else "".
    """
    layout = Layout() if seen is None or seen.layout is None else seen.layout
    matrix = layout.matrix(weight.detach()).double()
    if not torch.count_nonzero(matrix):
        return {"density": 0.0, "error": 0.0, "bias": False, "unseen": 0, "left": ""}
    parts, of_rows, unseen = _metric(matrix, seen)
    if seen is not None:
        seen.clear()
    together, left = inputs_together(how.sparsity), ""
    plain, before = layout, matrix
    places = math.prod(weight.shape[2:]) if layout.kind in ("filters", "transposed") else 1
    if how.density is not None and how.sparsity == "1x4" and places > 1:
        left = _unlike(matrix.shape[1] // places, 4 * places, parts)
        if not left:
            layout = _ByTaps(layout.kind, layout.groups, places)
            matrix = layout.matrix(weight.detach()).double()
            _by_taps(parts, places)
    elif how.density is not None and any(len(p.hessian) % together for p in parts):
        left = f"not pruned: {matrix.shape[1]} inputs are no multiple of {together}"
    if left:
        how = replace(how, density=None)
    within = None if mask is None else layout.matrix(mask.to(weight.device))
    shape = weight.shape

    def taken(codes: Tensor, step: float) -> int:
        """Bytes of such a tensor in the smallest file, its frame left out."""
        values = layout.weight(codes * step, shape).float()
        dtype, bits = to_bits("codes", values)
        coded = context_bytes(bits, dtype, tuple(shape))
        if coded is None:
            coded = len(pack_bytes({"": values}, profile="smallest")) - _empty()
        return coded

    row: dict[str, Any] = {"left": left}
    if how.density is how.bits is how.rate is None:
        kept = float(torch.count_nonzero(weight)) / weight.numel()
        return {**row, "density": kept, "error": 0.0, "bias": False, "unseen": unseen}
    found = _solved(matrix, parts, how, within, of_rows, weight.dtype, taken, row)
    error = 0.0
    for part in parts:
        off = matrix[part.rows, part.columns] - found[part.rows, part.columns]
        each = (off @ part.hessian * off).sum(1)
        error += float((each if of_rows is None else each * of_rows).sum())
    weight.copy_(layout.weight(found, weight.shape).to(weight.dtype))
    corrected = bias is not None and len(bias) == len(matrix) and _correct(
        bias, before, plain.matrix(weight.detach()).double(), parts
    )  # fmt: skip
    density = float(torch.count_nonzero(weight)) / weight.numel()
    return {**row, "density": density, "error": error, "bias": corrected, "unseen": unseen}


@dataclass(frozen=True)
class _ByTaps(Layout):
    """A convolution's layout with four channels of a tap side by side: a block of the kernels'."""

    places: int = 1

    def matrix(self, weight: Tensor) -> Tensor:
        """Columns (channel / 4, place, channel % 4), of (channel, place)."""
        plain = super().matrix(weight)
        return plain[:, _taps(plain.shape[1], self.places)]

    def weight(self, matrix: Tensor, shape: Iterable[int]) -> Tensor:
        """The inverse."""
        back = torch.argsort(_taps(matrix.shape[1], self.places))
        return super().weight(matrix[:, back], shape)


def _taps(columns: int, places: int) -> Tensor:
    return torch.arange(columns).reshape(-1, 4, places).transpose(1, 2).reshape(-1)


def _by_taps(parts: list[Part], places: int) -> None:
    """Sums over inputs in the order of :class:`_ByTaps`; parts may share them."""
    done: dict[int, Tensor] = {}

    def turned(sums: Tensor) -> Tensor:
        if sums.data_ptr() not in done:
            order = _taps(len(sums), places)
            done[sums.data_ptr()] = sums[order][:, order]
        return done[sums.data_ptr()]

    for p in parts:
        p.hessian, p.cross = turned(p.hessian), turned(p.cross)


def _unlike(channels: int, block: int, parts: list[Part]) -> str:
    """Why four channels of a tap cannot go together; "" where they can."""
    if channels % 4:
        return f"not pruned: {channels} input channels are no multiple of 4"
    if any(len(p.hessian) % block for p in parts):
        return "not pruned: its inputs come in parts that cut blocks of four channels"
    return ""


@cache
def _empty() -> int:
    return len(pack_bytes({"": torch.zeros(0)}, profile="smallest"))


def _prices(codes: Tensor, most: int, step: float, taken: Callable[[Tensor, float], int]) -> Prices:
    """Of codes (rows, columns), as the smallest file of such codes has them."""
    prices = Prices.fitted(codes, most)
    if codes.numel() > _CODED:
        return prices
    return prices * (8 * taken(codes, step) / max(1.0, float(prices.of(codes).sum())))


def _metric(matrix: Tensor, seen: Moments | None) -> tuple[list[Part], Tensor | None, int]:
    """The parts of all rows, such that the outputs' power is 1; factors (rows,) on their errors.

    The third is how many rows no input reached: they count as the mean of the others.
    """
    rows = len(matrix)
    parts = [] if seen is None else seen.parts(rows)
    power = _power(matrix, parts)
    if not power > 0:
        parts = []
    _divide(parts, power)
    squares = matrix.square().sum(1)
    if seen is not None and seen.counts is not None:
        counts = seen.counts
        if not parts:
            # a row that these inputs never look up is looked up by others
            of_rows = (counts + counts.mean()) / (2 * counts.mean())
            scale = 1 / float((of_rows * squares).sum())
            return _alone(matrix, 0, rows, scale), of_rows, 0
        # one tensor, read as a table and as a layer (tied): each use counts by its own power
        for p in parts:
            table = _eye(matrix, p.columns, 1 / float(squares.sum()))
            p.hessian, p.cross = p.hessian + table, p.cross + table
    reached = torch.zeros(rows, dtype=torch.bool)
    for part in parts:
        reached[part.rows] = True
    unseen = int((~reached).sum())
    if unseen:
        mean = 1.0
        if parts:
            mean = sum(float(p.hessian.diagonal().mean()) for p in parts) / len(parts)
        parts += [p for a, b in _gaps(reached) for p in _alone(matrix, a, b, mean)]
    _divide(parts, _power(matrix, parts))
    return sorted(parts, key=lambda p: int(p.rows.start)), None, unseen


def _divide(parts: list[Part], by: float) -> None:
    """In place: the sums of a wide layer are large. Parts may share them."""
    every = [sums for p in parts for sums in (p.hessian, p.cross)]
    for sums in {m.data_ptr(): m for m in every}.values():
        sums /= by


def _power(matrix: Tensor, parts: list[Part]) -> float:
    """Of the outputs on the inputs."""
    mine = [(matrix[p.rows, p.columns], p.hessian) for p in parts]
    return sum(float((m @ hessian * m).sum()) for m, hessian in mine)


def _eye(matrix: Tensor, columns: slice, scale: float) -> Tensor:
    size = columns.stop - columns.start
    return scale * torch.eye(size, dtype=torch.float64, device=matrix.device)


def _alone(matrix: Tensor, begin: int, end: int, scale: float) -> list[Part]:
    """Rows whose inputs are taken for independent and alike."""
    nothing = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    found = []
    for columns in blocks(matrix.shape[1]):
        eye = _eye(matrix, columns, scale)
        found.append(Part(slice(begin, end), columns, eye, eye, Means(nothing, nothing, 0)))
    return found


def _gaps(reached: Tensor) -> list[tuple[int, int]]:
    """The runs of False."""
    edges = torch.diff(torch.cat([reached, torch.ones(1, dtype=torch.bool)]).int(),
                       prepend=torch.ones(1, dtype=torch.int))  # fmt: skip
    begins, ends = (edges == -1).nonzero()[:, 0].tolist(), (edges == 1).nonzero()[:, 0].tolist()
    return list(zip(begins, ends, strict=True))


def _solved(
    matrix: Tensor,
    parts: list[Part],
    how: Treatment,
    within: Tensor | None,
    of_rows: Tensor | None,
    dtype: torch.dtype,
    taken: Callable[[Tensor, float], int],
    row: dict[str, Any],
) -> Tensor:
    """What the matrix becomes; ``row`` is told the price of a rate-coded one, in bits."""
    start, uppers = matrix.clone(), []
    for part in parts:
        here = part.rows, part.columns
        if part.cross.data_ptr() != part.hessian.data_ptr():
            start[here] = start_from(matrix[here], part.hessian, part.cross, how.damp)
            part.cross = part.hessian  # no more needed, and large
        uppers.append(factor(part.hessian, how.damp))

    def solved(make: Callable[[Part], Choice]) -> Tensor:
        found = torch.empty_like(matrix)
        for part, upper in zip(parts, uppers, strict=True):
            choice = make(part)
            if dtype not in (torch.float32, torch.float64):
                choice = Stored(dtype, choice)
            if how.density is not None and how.density < 1:
                choice = Pruned(how.density, how.sparsity, choice)
            if within is not None:
                choice = Within(within[part.rows, part.columns], choice)
            here = part.rows, part.columns
            found[here] = solve(start[here], upper, choice).weight
        return found

    if how.rate is not None:
        price = how.rate / 1000
        step = step_for(torch.cat([u.diagonal() for u in uppers]), price)
        # errors that are carried may push a weight past the largest
        largest = 2 * float(torch.maximum(start.abs().max(), matrix.abs().max()))
        step = max(step, largest / (_MOST - 1))
        most = math.ceil(largest / step) + 1
        found = start
        for _ in range(_PASSES):
            prices = _prices((found / step).round(), most, step, taken)

            def coded(part: Part, prices: Prices = prices) -> Choice:
                return Coded(step, price, prices[part.rows, part.columns], of_rows)

            found = solved(coded)
        row["bits"] = float(prices.of((found / step).round()).sum())
        return found
    if how.bits is not None:
        group = how.group if isinstance(how.group, int) else None
        fixed = None
        if how.group == "tensor":
            metric = torch.empty_like(matrix)
            for p, u in zip(parts, uppers, strict=True):
                metric[p.rows, p.columns] = u.diagonal().square().reciprocal()
            fixed = float(scale_of(start.reshape(1, -1), how.bits, metric.reshape(-1)))
        bits = how.bits
        found = solved(lambda _: Rounded(bits, group, fixed))
        if how.group == "channel" and how.density in (None, 1) and within is None:
            return _best_rows(
                start,
                parts,
                bits,
                dtype,
                found,
                lambda wider: solved(lambda _: Rounded(bits, wider=wider)),
            )
        return found
    return solved(lambda _: Kept())


def _best_rows(
    start: Tensor,
    parts: list[Part],
    bits: int,
    dtype: torch.dtype,
    found: Tensor,
    again: Callable[[float], Tensor],
) -> Tensor:
    """Row by row, what leaves least of what was found, of wider grids, and of the nearest values.

    What is carried is cut off where the grid ends: where inputs nearly determine each other it is
    much, and a wider grid does better, or carrying nothing.
    """

    def off(values: Tensor) -> Tensor:
        """The error of each row."""
        total = torch.zeros(len(start), dtype=torch.float64, device=start.device)
        for p in parts:
            d = start[p.rows, p.columns] - values[p.rows, p.columns]
            total[p.rows] += (d @ p.hessian * d).sum(1)
        return total

    step = scale_of(start, bits)[:, None]
    top = (1 << (bits - 1)) - 1
    nearest = (start / step).round().clamp(-top, top) * step + 0.0
    nearest = nearest.to(dtype).double()  # as it is stored
    least = off(found)
    for values in (nearest, *map(again, _WIDER)):
        each = off(values)
        better = each < least
        found, least = values.where(better[:, None], found), each.where(better, least)
    return found


def _correct(bias: Tensor, before: Tensor, now: Tensor, parts: list[Part]) -> bool:
    """Add the mean of what the outputs lost, where inputs that were held back say so as well."""
    shift, gain = torch.zeros(len(before), dtype=torch.float64, device=before.device), 0.0
    for part in parts:
        if part.held is None:
            return False
        if part.columns.start:
            continue  # the means are of all columns
        lost, apart = (
            (before[part.rows] @ m.before - now[part.rows] @ m.now) / m.count
            for m in (part.means, part.held)
        )
        shift[part.rows] = lost
        # E|e - shift|^2 is smaller than E|e|^2 by
        gain += float((2 * lost * apart - lost.square()).sum())
    if not gain > _BIAS_BELOW * float(bias.double().square().sum()):
        return False
    bias.add_(shift.to(bias.dtype))
    return True
