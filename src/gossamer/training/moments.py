"""Sums over a weight's inputs: what a layer's error on real inputs is measured with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.training.layer_inputs import Layout, Pick, Use, inputs_of

__all__ = ["WIDE", "Gathers", "Means", "Moments", "Part", "blocks", "gathered", "moments", "same"]


WIDE = 4096
"""Columns up to which a Hessian is one matrix: its memory grows with their square, the time with
their cube. Beyond, blocks of columns are taken for independent of each other."""


def blocks(columns: int) -> list[slice]:
    """Even parts of columns, of at most :data:`WIDE`.

    >>> blocks(5000)
    [slice(0, 2500, None), slice(2500, 5000, None)]
    """
    count = -(-columns // WIDE)
    ends = [columns * i // max(1, count) for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


class Gathers(Protocol):
    """What takes a weight's inputs, use by use: :class:`Moments`, or a sample of them."""

    def add(self, now: Use, before: Use | None, rows: int, *, held: bool = False) -> None:
        """As :meth:`Moments.add`."""


@dataclass
class Means:
    """Sums of inputs, (columns,): of the network as it is, and of the original."""

    now: Tensor
    before: Tensor
    count: int


@dataclass
class Part:
    """Rows of a weight's matrix that meet the same inputs.

    Attributes:
        rows, columns: of the matrix; of more than :data:`WIDE` columns a part has some.
        hessian: Y Y^T (columns, columns), float64, over the inputs Y that the rows have now.
        cross: X Y^T, X their inputs in the original network.
        means: sums of the inputs, of all columns; of the held-back ones in ``held``.
    """

    rows: slice
    columns: slice
    hessian: Tensor
    cross: Tensor
    means: Means
    held: Means | None = None


@dataclass
class _Sums:
    """Of one range of rows: of each block of columns (groups, columns, columns); and (groups,
    columns). ``cross`` is None where it is the Hessian.
    """

    now: Tensor
    before: Tensor
    count: int = 0
    hessian: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] | None = None


@dataclass
class Moments:
    """Sums over a weight's inputs.

    Attributes:
        layout: how the weight is read; None: it is not used.
        counts: of a table: how often each row is looked up, (rows,); None: it is no table.
        mixed: it is read in two ways, of which only the first is measured.
        paired: the inputs of the two networks could be compared; else those of the network as it
            is count for both.
        feedback: its inputs are taken as they are now for both networks: those of a weight that
            one pass uses again hang on the weight itself, and making up for what became of them
            would change them once more.
    """

    layout: Layout | None = None
    counts: Tensor | None = None
    mixed: bool = False
    paired: bool = True
    feedback: bool = False
    _sums: dict[tuple[int, int], _Sums] = field(default_factory=dict)
    _held: dict[tuple[int, int], _Sums] = field(default_factory=dict)

    def add(self, now: Use, before: Use | None, rows: int, *, held: bool = False) -> None:
        """One use in the network as it is, with its inputs in the original (None: unpaired).

        Args:
            rows: of a table.
            held: these inputs are held back from all but :attr:`Part.held`.
        """
        if now.ids is not None:
            if not held:
                counted = now.ids.bincount(minlength=rows).double()
                self.counts = counted if self.counts is None else self.counts + counted
            self.layout = self.layout or now.layout
            return
        # of a matrix, both are the same
        self.layout = self.layout or now.layout
        if self.layout != now.layout:
            self.mixed = True
            return
        other = now if before is None or self.feedback else before
        total, mean = _total(now), _total(other)
        if not torch.isfinite(total).all():
            raise ArgumentError("calibration inputs lead to NaN or infinity inside the network")
        self.paired &= before is not None
        into = self._held if held else self._sums
        known = into.setdefault(now.rows, _Sums(torch.zeros_like(total), torch.zeros_like(mean)))
        known.now += total
        known.before += mean
        known.count += len(now.inputs[0]) if now.patches is None else now.patches.count
        if held:
            return
        if other is not now and known.cross is None:  # until now, none or unpaired ones
            known.cross = [m.clone() for m in known.hessian]
        known.hessian = _summed(known.hessian, now, now)
        if known.cross is not None:
            known.cross = _summed(known.cross, now, other)

    def parts(self, rows: int) -> list[Part]:
        """Rows that meet the same inputs, in order, of all that were seen.

        Args:
            rows: of the weight's matrix.
        """
        cuts = {0, rows}
        for (begin, end), sums in self._sums.items():
            step = (end - begin) // len(sums.now)
            cuts |= set(range(begin, end + 1, step))
        ordered, found = sorted(cuts), []
        for begin, end in pairwise(ordered):
            mine = _over(self._sums, begin, end)
            if mine is None:
                continue
            apart = _over(self._held, begin, end)
            means = Means(mine.now, mine.before, mine.count)
            held = None if apart is None else Means(apart.now, apart.before, apart.count)
            found += [
                Part(slice(begin, end), columns, hessian, cross, means, held)
                for columns, hessian, cross in zip(
                    blocks(len(mine.now)), mine.hessian, mine.cross or mine.hessian, strict=True
                )
            ]
        return found

    def clear(self) -> None:
        """Let go of the sums: those of a wide layer are large."""
        self._sums.clear()
        self._held.clear()


def _total(use: Use) -> Tensor:
    """(groups, columns), float64."""
    if use.patches is not None:
        return use.patches.sums()
    return torch.stack([i.float().sum(0).double() for i in use.inputs])


def _summed(sums: list[Tensor], now: Use, before: Use) -> list[Tensor]:
    """Sums of each block of columns, (groups, columns, columns), with X^T Y added in place.

    X are the inputs before. A batch is summed in float32: its rounding is far below the damping,
    and takes half the time.
    """
    cuts = blocks(now.inputs[0].shape[1] if now.patches is None else now.patches.columns)
    if now.patches is not None and before.patches is not None:
        for number, c in enumerate(cuts):
            product = now.patches.gram(before.patches, c)
            if len(sums) == number:
                sums.append(product.double())
            else:
                _add(sums[number], product)
        return sums
    pairs = [(x.float(), y.float()) for x, y in zip(before.inputs, now.inputs, strict=True)]
    if not sums:
        sizes = [c.stop - c.start for c in cuts]
        sums = [pairs[0][0].new_zeros((len(pairs), s, s), dtype=torch.float64) for s in sizes]
    for total, c in zip(sums, cuts, strict=True):
        for group, (x, y) in enumerate(pairs):
            _add(total[group], x[:, c].mT @ y[:, c])
    return sums


def _add(total: Tensor, product: Tensor) -> None:
    """In place, some rows at a time: another type is copied whole before it is added."""
    for to, of in zip(total.split(256, -2), product.split(256, -2), strict=True):
        to += of


def _over(sums: dict[tuple[int, int], _Sums], begin: int, end: int) -> _Sums | None:
    """Of all ranges that hold these rows; None where there is none."""
    mine: list[tuple[_Sums, int]] = []
    for (first, last), found in sums.items():
        if first <= begin and end <= last:
            mine.append((found, (begin - first) // ((last - first) // len(found.now))))
    if not mine:
        return None
    paired = any(found.cross is not None for found, _ in mine)
    hessian, cross = (
        [sum(rest, first) for first, *rest in zip(*each, strict=True)]
        for each in (
            [[m[group] for m in found.hessian] for found, group in mine],
            [[m[group] for m in found.cross or found.hessian] for found, group in mine],
        )
    )
    now, before = (
        sum(rest, first)
        for first, *rest in (
            [found.now[group] for found, group in mine],
            [found.before[group] for found, group in mine],
        )
    )
    count = sum(found.count for found, _ in mine)
    return _Sums(now, before, count, hessian, cross if paired else None)


def same(now: Use, before: Use | None) -> Use | None:
    """The same use in the original network; None where it is another one."""
    return before if before is not None and now.like(before) else None


def moments(
    model: nn.Module,
    original: nn.Module,
    batches: Iterable[Any],
    name: str,
    uses: Sequence[int],
    *,
    held: int = 0,
) -> Moments:
    """The moments of one weight's inputs over all batches.

    Args:
        model, original: as it is now, and as it was; the same modules.
        batches: as :func:`~gossamer.training.layer_inputs.inputs_of` takes them.
        name: clean name of the weight.
        uses: of the weight by each batch (:func:`~gossamer.training.layer_inputs.readers`).
        held: how many of the last batches are held back.

    Raises :class:`ArgumentError` where inputs are not finite, or no batch reaches the weight.
    """
    found = Moments(feedback=max(uses, default=0) > 1)
    gathered(found, model, original, batches, name, uses, held=held)
    if found.layout is None:
        raise ArgumentError(f"no batch reaches {name}; give calibration inputs")
    return found


def gathered(
    found: Gathers,
    model: nn.Module,
    original: nn.Module,
    batches: Iterable[Any],
    name: str,
    uses: Sequence[int],
    *,
    held: int = 0,
    picks: Callable[[int], Pick] | None = None,
) -> None:
    """Give ``found`` one weight's inputs of all batches; arguments as :func:`moments`.

    ``picks``: number of a batch -> which rows of its inputs are looked at; None: all.
    """
    given = list(batches)
    own, now = names.parameters(original)[name], names.parameters(model)[name]
    for number, (batch, count) in enumerate(zip(given, uses, strict=True)):
        if not count:
            continue
        before: list[Use] = []

        def keep(use: Use, before: list[Use] = before) -> None:
            before.append(use.copied())

        pick = None if picks is None else picks(number)
        inputs_of(original, batch, {name: own}, keep, uses=count, pick=pick)
        left = iter(before)

        def add(
            use: Use, left: Iterator[Use] = left, apart: bool = number >= len(given) - held
        ) -> None:
            pair = next(left, None)
            found.add(use, same(use, pair), len(own), held=apart)

        inputs_of(model, batch, {name: now}, add, uses=count, pick=pick)
