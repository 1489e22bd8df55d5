"""What Optimal Brain Surgeon makes of a layer's columns: zeros, a grid, or cheap codes.

See :mod:`gossamer.core.obs` for the solver and its sources. The rate term is that of
entropy-constrained quantization (Chou, Lookabaugh, Gray 1989) in the metric of the layer's
output: q = argmin err^2 + lambda * bits(q), with the lengths of codes from those of the pass
before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gossamer.core.errors import ArgumentError, one_of
from gossamer.core.obs import Choice, Kept

__all__ = [
    "Coded",
    "Prices",
    "Pruned",
    "Rounded",
    "Sparsity",
    "Stored",
    "Within",
    "inputs_together",
    "scale_of",
    "step_for",
]

Sparsity = Literal["unstructured", "2:4", "4:8", "1x4"]
"""Which weights go together: none; n of m neighbours along the inputs; four along the inputs."""


def inputs_together(sparsity: Sparsity) -> int:
    """How many neighbours along the inputs a type takes at once.

    >>> [inputs_together(s) for s in ("unstructured", "2:4", "4:8", "1x4")]
    [1, 4, 8, 4]
    """
    return {"unstructured": 1, "2:4": 4, "4:8": 8, "1x4": 4}[sparsity]


_SHRINK = tuple(1 - 0.02 * i for i in range(26))  # of the largest magnitude, tried as grid's end


@dataclass
class Pruned(Choice):
    """Remove the weights that cost least, then let another choice take the others.

    Args:
        density: the fraction kept, in (0, 1]; exact over the layer, to the nearest weight or block.
        sparsity: the type; ``2:4`` and ``4:8`` fix the density at .5.
        then: what becomes of the weights that are kept.
    """

    density: float
    sparsity: Sparsity = "unstructured"
    then: Choice = field(default_factory=Kept)

    def __post_init__(self) -> None:
        one_of("sparsity", self.sparsity, ("unstructured", "2:4", "4:8", "1x4"))
        if not 0 < self.density <= 1:
            raise ArgumentError(f"density={self.density} is outside (0, 1] (the fraction kept)")
        if ":" in self.sparsity and self.density != 0.5:
            raise ArgumentError(f"sparsity {self.sparsity!r} keeps half; give density 0.5")
        self._group = {"unstructured": 1, "1x4": 4}.get(self.sparsity, 0)

    def begin(self, weight: Tensor, diagonal: Tensor) -> None:
        """Nothing is removed yet."""
        rows, columns = weight.shape
        m = inputs_together(self.sparsity)
        if columns % m:
            raise ArgumentError(
                f"sparsity {self.sparsity!r} takes {m} inputs at once, and the layer has {columns}"
            )
        self._gone = torch.zeros(rows, columns, dtype=torch.bool, device=weight.device)
        self._removed = 0
        self.then.begin(weight, diagonal)

    def block(self, start: int, weight: Tensor, diagonal: Tensor) -> None:
        """Unstructured and blocks: choose within these columns, so many that the sum is right."""
        self.then.block(start, weight, diagonal)
        if not self._group:
            return
        rows, width = weight.shape
        cost = (weight / diagonal).square()
        cost = cost.reshape(rows, width // self._group, self._group).sum(2)
        stop = start + width
        wanted = int((1 - self.density) * rows * stop / self._group + 0.5) - self._removed
        wanted = max(0, min(wanted, cost.numel()))
        gone = torch.zeros(cost.numel(), dtype=torch.bool, device=cost.device)
        gone[torch.argsort(cost.reshape(-1), stable=True)[:wanted]] = True
        self._removed += wanted
        gone = gone.view(cost.shape).repeat_interleave(self._group, 1)
        self._gone[:, start:stop] = gone

    def column(self, number: int, weight: Tensor, diagonal: Tensor) -> Tensor:
        """Zero where removed, else the other choice's value."""
        if not self._group:
            m = int(self.sparsity[-1])
            if number % m == 0:
                cost = (weight[:, :m] / diagonal[:m]).square()
                least = torch.argsort(cost, dim=1, stable=True)[:, : m // 2]
                self._gone[:, number : number + m].scatter_(1, least, True)
        value = self.then.column(number, weight, diagonal)
        return value.masked_fill(self._gone[:, number], 0.0)


def scale_of(weight: Tensor, bits: int, metric: Tensor | None = None) -> Tensor:
    """The step of a symmetric grid of 2^bits - 1 values for each row, of least squared error.

    Args:
        weight: (rows, columns), float64.
        bits: 2 or more.
        metric: (columns,), the weight of each column's error; None: all alike.

    Returns (rows,), of eight significant bits, fine beside candidates two per cent apart: products
    are exact in float32, and a file holds the step in few bytes.
    """
    top = (1 << (bits - 1)) - 1
    most = weight.abs().amax(1)
    best = torch.full_like(most, math.inf)
    found = torch.ones_like(most)
    for shrink in _SHRINK:
        step = (most * shrink / top).bfloat16().double()
        step = step.masked_fill(step == 0, 1.0)
        rounded = (weight / step[:, None]).round().clamp(-top, top) * step[:, None]
        error = (weight - rounded).square()
        total = (error if metric is None else error * metric).sum(1)
        better = total < best
        best, found = total.where(better, best), step.where(better, found)
    return found


class Rounded(Choice):
    """The nearest value of a symmetric grid; code 0 is zero.

    Args:
        bits: values are -n..n times the step, n = 2^(bits - 1) - 1.
        group: columns that share a step in each row; None: all of a row.
        step: one for the tensor, in place of those that are found.
        wider: than those of least squared error, by this factor: room for what is carried.
    """

    def __init__(
        self, bits: int, group: int | None = None, step: float | None = None, wider: float = 1.0
    ) -> None:
        if not 2 <= bits <= 16:
            raise ArgumentError(f"bits={bits} is outside 2 to 16")
        if group is not None and group < 1:
            raise ArgumentError(f"group={group} must be positive, or None (a row)")
        self.bits, self.group, self._given, self._wider = bits, group, step, wider
        self.top = (1 << (bits - 1)) - 1

    def begin(self, weight: Tensor, diagonal: Tensor) -> None:
        """The step of a row is that of the weights as they were."""
        if self._given is not None:
            self._step = weight.new_full((len(weight),), self._given)
        elif self.group is None:
            self._step = scale_of(weight, self.bits, diagonal.square().reciprocal())
            self._step = (self._wider * self._step).bfloat16().double()
        self._whole = weight

    def block(self, start: int, weight: Tensor, diagonal: Tensor) -> None:
        """The weights with the errors carried so far, which groups take their steps from."""
        self._start, self._part = start, weight

    def column(self, number: int, weight: Tensor, diagonal: Tensor) -> Tensor:
        """The nearest."""
        if self.group and self._given is None and number % self.group == 0:
            ahead = self._part[:, number - self._start : number - self._start + self.group]
            if ahead.shape[1] < self.group:  # a group that reaches into the next block
                rest = self._whole[:, self._start + self._part.shape[1] : number + self.group]
                ahead = torch.cat([ahead, rest], 1)
            self._step = scale_of(ahead, self.bits)
        codes = (weight[:, 0] / self._step).round().clamp(-self.top, self.top)
        return codes * self._step + 0.0


def step_for(diagonal: Tensor, rate: float) -> float:
    """The step of a uniform grid at which a bit more costs what it gains, at many bits.

    A cell of width s leaves s^2 / 12, a bit halves it twice: d/dR of the cost is 2 ln 2 times it.

    Args:
        diagonal: of U, for a Hessian in which err^2 is the cost.
        rate: cost of a bit.
    """
    mean = float(diagonal.square().reciprocal().mean())
    step = math.sqrt(6 * rate / (math.log(2) * mean))
    return float(torch.tensor(step, dtype=torch.float32))


@dataclass(frozen=True)
class Prices:
    """Bits of codes where they stand, as a coder charges that learns rows, columns and sizes.

    Attributes:
        zero: (rows, columns), of a zero.
        other: (rows, columns), of not being zero.
        size: (most + 1,), of a magnitude that is not zero, its sign included; size[0] is 0.
    """

    zero: Tensor
    other: Tensor
    size: Tensor

    def __getitem__(self, where: slice | tuple[slice, slice]) -> Prices:
        """Of some rows, or of some rows and columns."""
        return Prices(self.zero[where], self.other[where], self.size)

    def __mul__(self, factor: float) -> Prices:
        """All of them, times a factor."""
        return Prices(self.zero * factor, self.other * factor, self.size * factor)

    def of(self, codes: Tensor) -> Tensor:
        """Bits of each code (rows, columns)."""
        sizes = self.size[codes.abs().long().clamp(max=len(self.size) - 1)]
        return torch.where(codes == 0, self.zero, self.other + sizes)

    @classmethod
    def even(cls, rows: int, columns: int, most: int) -> Prices:
        """All codes alike."""
        nothing = torch.zeros(rows, columns, dtype=torch.float64)
        return cls(nothing, nothing, nothing.new_zeros(most + 1))

    @classmethod
    def fitted(cls, codes: Tensor, most: int) -> Prices:
        """Ideal lengths for such codes.

        A zero's log odds are those of its row plus those of its column less those of the whole,
        each drawn towards the whole by some twenty entries.

        Args:
            codes: (rows, columns).
            most: largest magnitude that may be asked for.
        """
        zeros = (codes == 0).double()
        rows, columns = zeros.shape
        whole = (zeros.sum() + 0.5) / (zeros.numel() + 1)
        along = (zeros.sum(1) + _PRIOR * whole) / (columns + _PRIOR)
        down = (zeros.sum(0) + _PRIOR * whole) / (rows + _PRIOR)
        odds = along.logit()[:, None] + down.logit() - whole.logit()
        sizes = codes.abs().long().reshape(-1).clamp(max=most)
        counts = sizes.bincount(minlength=most + 1).double()
        counts[0] = 0
        seen = min(most, int(sizes.max()) + 1)  # half a count up to one more than there are
        counts[1 : seen + 1] += 0.5
        size = 1 - (counts / counts.sum()).log2()
        # beyond: twice the logarithm more, as a code of all numbers has it
        far = torch.arange(most - seen, device=codes.device, dtype=torch.float64) + 2
        size[seen + 1 :] = size[seen] + 2 * far.log2()
        size[0] = 0
        bits = 1 / math.log(2)
        return cls(F.softplus(-odds) * bits, F.softplus(odds) * bits, size)


_PRIOR = 20  # entries


class Coded(Choice):
    """Values of a uniform grid, chosen by error and by the length of their codes.

    Args:
        step: of the grid, one for the tensor.
        rate: cost of a bit, in units of err^2.
        prices: of codes, rows and columns as they are chosen.
        weight_of_rows: factors (rows,) on the errors; None: all alike.
    """

    def __init__(
        self, step: float, rate: float, prices: Prices, weight_of_rows: Tensor | None = None
    ) -> None:
        if not (step > 0 and math.isfinite(step)):
            raise ArgumentError(f"step={step} must be positive and finite")
        if not rate >= 0:
            raise ArgumentError(f"rate={rate} must be at least 0")
        self.step, self.rate, self.prices, self._of_rows = step, rate, prices, weight_of_rows
        self._most = len(prices.size) - 1

        self._cheaper: NDArray[np.float64] | None = None  # bits of a zero less those of another

    def column(self, number: int, weight: Tensor, diagonal: Tensor) -> Tensor:
        """Of the two nearest, the next towards zero and zero, what costs least."""
        if weight.device.type == "cpu":
            return torch.from_numpy(self._numpy(number, weight[:, 0].numpy(), float(diagonal[0])))
        return self._torch(number, weight[:, 0], diagonal[0])

    def _torch(self, number: int, weight: Tensor, diagonal: Tensor) -> Tensor:
        place = weight / self.step
        near = place.round()
        inner = near - near.sign()
        other = place.floor() + place.ceil() - near
        tried = torch.stack([near, other, inner, torch.zeros_like(near)], 1).clamp(
            -self._most, self._most
        )
        error = ((place[:, None] - tried) * (self.step / diagonal)).square()
        if self._of_rows is not None:
            error = error * self._of_rows[:, None]
        here = self.prices.zero[:, number, None], self.prices.other[:, number, None]
        bits = torch.where(tried == 0, here[0], here[1] + self.prices.size[tried.abs().long()])
        best = tried.gather(1, (error + self.rate * bits).argmin(1, keepdim=True))[:, 0]
        return best * self.step + 0.0

    def _numpy(self, number: int, weight: NDArray[np.float64], diagonal: float) -> Any:
        # by magnitudes; on a layer's few rows an operation of torch costs more than its work
        if self._cheaper is None:
            self._cheaper = (self.prices.zero - self.prices.other).T.contiguous().numpy()
            self._size = self.prices.size.numpy()
        place = weight / self.step
        size = np.abs(place)
        near = np.rint(size)
        other = np.floor(size) + np.ceil(size) - near
        tried = np.stack([near, other, near - 1, np.zeros_like(near)]).clip(0, self._most)
        error = np.square((size - tried) * (self.step / diagonal))
        if self._of_rows is not None:
            error *= self._of_rows.numpy()
        bits = self._size[tried.astype(np.intp)] + (tried == 0) * self._cheaper[number]
        least = (error + self.rate * bits).argmin(0)
        return np.copysign(tried[least, np.arange(len(near))] * self.step, place) + 0.0


@dataclass
class Stored(Choice):
    """What another choice gives, as a floating type holds it, so that its rounding is carried too.

    Args:
        dtype: that the weight is stored in.
        then: the other choice.
    """

    dtype: torch.dtype
    then: Choice

    def begin(self, weight: Tensor, diagonal: Tensor) -> None:
        """Pass on."""
        self.then.begin(weight, diagonal)

    def block(self, start: int, weight: Tensor, diagonal: Tensor) -> None:
        """Pass on."""
        self.then.block(start, weight, diagonal)

    def column(self, number: int, weight: Tensor, diagonal: Tensor) -> Tensor:
        """The value that the type holds nearest to the other choice's."""
        return self.then.column(number, weight, diagonal).to(self.dtype).double()


@dataclass
class Within(Choice):
    """Weights that an earlier mask has removed stay zero.

    Args:
        mask: (rows, columns), True where another choice may put something.
        then: that choice.
    """

    mask: Tensor
    then: Choice

    def begin(self, weight: Tensor, diagonal: Tensor) -> None:
        """Pass on."""
        self.then.begin(weight, diagonal)

    def block(self, start: int, weight: Tensor, diagonal: Tensor) -> None:
        """Pass on; what is removed costs nothing to remove."""
        kept = self.mask[:, start : start + weight.shape[1]]
        self.then.block(start, weight * kept, diagonal)

    def column(self, number: int, weight: Tensor, diagonal: Tensor) -> Tensor:
        """Zero outside the mask."""
        kept = self.mask[:, number : number + weight.shape[1]]
        value = self.then.column(number, weight * kept, diagonal)
        return value.masked_fill(~kept[:, 0], 0.0)
