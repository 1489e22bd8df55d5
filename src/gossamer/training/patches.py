"""What the kernel of a convolution lies on, and sums of its products without copying all of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Patches"]

_AT_ONCE = 1 << 24  # entries of rows that are copied at once


@dataclass(frozen=True)
class Patches:
    """The inputs of a convolution: one row for each place of its output map.

    Attributes:
        x: (N, C, *sizes), the map.
        kernel, stride, dilation: along each axis.
        before, after: zeros at the ends of each axis; may be negative.
        groups: of channels; each has rows of its own.
        turned: the kernel is turned, as that of a transposed convolution is.
    """

    x: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    groups: int = 1
    turned: bool = False

    @property
    def columns(self) -> int:
        """Of a row: channels of a group times places of the kernel."""
        return self.x.shape[1] // self.groups * math.prod(self.kernel)

    def copied(self) -> Patches:
        """With a map of its own, float32."""
        return replace(self, x=self.x.float().clone())

    def rows(self) -> list[Tensor]:
        """(n, columns) of each group, by image and place; transposed in memory, so that what is
        copied are runs as long as a row of the map.
        """
        found, axes = self._view(), len(self.kernel)
        found = found.movedim(tuple(range(1 + axes)), tuple(range(-1 - axes, 0)))
        return list(found.reshape(self.groups, self.columns, -1).mT.unbind())

    def some(self, at: Tensor) -> list[Tensor]:
        """Of these rows only, (n,) integers."""
        found = self._view()
        places = found.shape[: 1 + len(self.kernel)]
        found = found[torch.unravel_index(at.to(self.x.device), places)]
        return list(found.reshape(-1, self.groups, self.columns).unbind(1))

    @property
    def count(self) -> int:
        """Rows."""
        sizes = zip(
            self.x.shape[2:], self.before, self.after, self.kernel, self.dilation, self.stride,
            strict=True,
        )  # fmt: skip
        return len(self.x) * math.prod(
            (n + before + after - d * (k - 1) - 1) // s + 1 for n, before, after, k, d, s in sizes
        )

    def sums(self) -> Tensor:
        """Of all rows, (groups, columns), float64; not finite where a value is not."""
        small = replace(self, x=self.x.float().sum(0, keepdim=True).double())
        return torch.stack([r.sum(0) for r in small.rows()])

    def gram(self, other: Patches, columns: slice | None = None) -> Tensor:
        """The other's rows, transposed, times these: (groups, columns, columns), float32.

        Args:
            other: of the same shapes; may be ``self``.
            columns: these alone, start and stop given; None: all.

        Rows of the map that two places of the kernel meet are multiplied once for all pairs of
        places that are as far apart, and where the windows end for each pair alone: of a kernel of
        three rows a third of the products, of two different maps five ninths.
        """
        if columns is not None and (columns.start, columns.stop) != (0, self.columns):
            return self._gram_of(other, columns)
        if len(self.kernel) != 2 or self.stride[0] != 1 or self.turned:
            return _products(self, other)
        (high, wide), step = self.kernel, self.dilation[0]
        edge = step * (high - 1)
        mine = self._along()
        theirs = mine if other is self else other._along()
        length = mine.shape[2] - edge
        if high < 2 or length < 2 * edge:
            return _products(self, other)
        groups, width = len(mine), mine.shape[1]
        found = self.x.new_zeros((groups, high, high, width, width), dtype=torch.float32)
        for apart in range(0 if other is self else 1 - high, high):
            pairs = [(a, a + apart) for a in range(high) if 0 <= a + apart < high]

            def part(begin: int, end: int, shift: int = step * apart) -> Tensor | float:
                """Products of these rows of the map with those ``shift`` below."""
                if begin >= end:
                    return 0.0
                low = mine[:, :, begin:end].flatten(2)
                return theirs[:, :, begin + shift : end + shift].flatten(2) @ low.mT

            first, last = step * pairs[0][0], step * pairs[-1][0]
            # rows of the map that all of these windows have
            core = part(last, first + length)
            for a, b in pairs:
                ends = part(step * a, last) + part(first + length, step * a + length)
                found[:, b, a] = core + ends
                if other is self and apart:
                    found[:, a, b] = found[:, b, a].mT
        # (groups, rows' place, rows' place, channel and column, channel and column)
        channels = width // wide
        found = found.view(groups, high, high, channels, wide, channels, wide)
        return found.permute(0, 3, 1, 4, 5, 2, 6).reshape(groups, self.columns, self.columns)

    def _gram_of(self, other: Patches, columns: slice) -> Tensor:
        """:meth:`gram` of some columns: of the channels that they are of, and no others."""
        size, each = math.prod(self.kernel), self.x.shape[1] // self.groups
        first, last = columns.start // size, -(-columns.stop // size)
        picked = torch.arange(self.groups)[:, None] * each + torch.arange(first, last)
        picked = picked.flatten().to(self.x.device)
        mine = replace(self, x=self.x[:, picked])
        theirs = mine if other is self else replace(other, x=other.x[:, picked])
        inside = slice(columns.start - first * size, columns.stop - first * size)
        return mine.gram(theirs)[:, inside, inside]

    def split(self) -> Iterator[Patches]:
        """Some images at a time, so that rows take little memory."""
        entries = self.count * self.columns * self.groups
        step = max(1, len(self.x) * _AT_ONCE // max(1, entries))
        for x in self.x.split(step):
            yield replace(self, x=x)

    def _padded(self) -> Tensor:
        pads = [
            p
            for pair in zip(reversed(self.before), reversed(self.after), strict=True)
            for p in pair
        ]
        return F.pad(self.x, pads)

    def _view(self) -> Tensor:
        """(N, *places, C, *kernel), a view of the padded map."""
        x, axes = self._padded(), len(self.kernel)
        for axis, k in enumerate(self.kernel):
            d = self.dilation[axis]
            x = x.unfold(2 + axis, d * (k - 1) + 1, self.stride[axis])[..., ::d]
        x = x.permute(0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
        return x.flip(tuple(range(2 + axes, 2 + 2 * axes))) if self.turned else x

    def _along(self) -> Tensor:
        """(groups, channels and the kernel's columns, height, N and places along the width)."""
        x, k, d = self._padded().float(), self.kernel[1], self.dilation[1]
        x = x.unfold(3, d * (k - 1) + 1, self.stride[1])[..., ::d]
        n, c, h, w, _ = x.shape
        return x.permute(1, 4, 2, 0, 3).reshape(self.groups, c // self.groups * k, h, n * w)


def _products(one: Patches, other: Patches) -> Tensor:
    found: Tensor | None = None
    for mine, theirs in zip(one.split(), other.split(), strict=True):
        rows = [r.float() for r in mine.rows()]
        others = rows if other is one else [r.float() for r in theirs.rows()]
        part = torch.stack([x.mT @ y for x, y in zip(others, rows, strict=True)])
        found = part if found is None else found.add_(part)
    assert found is not None  # there is an image
    return found
