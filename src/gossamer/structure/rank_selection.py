"""How many components each layer keeps, under one budget.

Zhang et al. (arXiv:1505.06798), section 3.2.4: maximise the product over layers of the energy kept
(the sum of the leading eigenvalues of its responses), with the sum of costs under a budget. Their
greedy way drops, again and again, the component with the least relative loss of energy for the
cost that it saves. A cost is a table here, by rank, so that multiply-adds, bytes and measured
milliseconds are one thing.

Deviation: a layer begins as it is, in one piece, and a factorization of high rank costs more than
that; and measured time does not fall with every component. So the step that is compared is, for
each layer, the one to whichever deeper rank loses least for what it saves. The last step may save
more than was needed: ranks are raised again while the budget allows, and as long as it keeps more
energy, one layer is moved a rank and the others follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gossamer.core.errors import ArgumentError

__all__ = ["Ladder", "choose_ranks"]


@dataclass(frozen=True)
class Ladder:
    """What a layer may become.

    Attributes:
        name: the layer's.
        energies: part of the energy kept, in [0, 1], by level: the first is the lowest rank.
        costs: of each level, in whatever the budget counts.
        whole: the cost of the layer as it is, which keeps all.
    """

    name: str
    energies: Sequence[float]
    costs: Sequence[float]
    whole: float

    def __post_init__(self) -> None:
        """Refuse tables that do not fit each other."""
        if len(self.energies) != len(self.costs) or not self.energies:
            raise ArgumentError(
                f"{self.name}: {len(self.energies)} energies and {len(self.costs)} costs; give "
                "one of each by level"
            )
        numbers = [*self.energies, *self.costs, self.whole]
        if not all(math.isfinite(v) and v >= 0 for v in numbers):
            raise ArgumentError(f"{self.name}: energies and costs must be finite, none below 0")

    def cost(self, level: int | None) -> float:
        """Of a level; None: of the layer as it is."""
        return self.whole if level is None else self.costs[level]

    def loss(self, level: int | None) -> float:
        """Minus the logarithm of the energy kept."""
        if level is None:
            return 0.0
        return math.inf if self.energies[level] <= 0 else -math.log(min(1.0, self.energies[level]))


def choose_ranks(
    ladders: Sequence[Ladder], budget: float, *, fixed: float = 0.0
) -> dict[str, int | None]:
    """The level of each layer (None: as it is) with a large product of energies.

    Args:
        budget: what all may cost, ``fixed`` included.
        fixed: the cost of what cannot be changed.

    Raises :class:`ArgumentError` for a budget below what the lowest levels cost.

    >>> ladder = Ladder("conv", [0.5, 0.9, 1.0], [1.0, 2.0, 3.0], whole=2.5)
    >>> choose_ranks([ladder], 2.2), choose_ranks([ladder], 2.5)
    ({'conv': 1}, {'conv': None})
    """
    least = fixed + sum(min(ladder.whole, *ladder.costs) for ladder in ladders)
    if not budget >= least:
        raise ArgumentError(
            f"budget={budget:.6g} is below {least:.6g}, what the network costs at the lowest "
            "ranks; give a smaller speedup, or more milliseconds"
        )
    at = _within(ladders, [None] * len(ladders), budget - fixed)
    assert at is not None  # the least fits
    better: list[int | None] | None = at
    while better is not None:
        at, better = better, None
        for trial in _neighbours(ladders, at):
            number = next(i for i, level in enumerate(trial) if level != at[i])
            found = _within(ladders, trial, budget - fixed, kept=number)
            if found is not None and _lost(ladders, found) < _lost(ladders, better or at) - 1e-12:
                better = found
    return {ladder.name: level for ladder, level in zip(ladders, at, strict=True)}


def _lost(ladders: Sequence[Ladder], at: Sequence[int | None]) -> float:
    return sum(ladder.loss(level) for ladder, level in zip(ladders, at, strict=True))


def _neighbours(ladders: Sequence[Ladder], at: Sequence[int | None]) -> Iterator[list[int | None]]:
    """One layer a level lower or higher, or as it is."""
    for number, ladder in enumerate(ladders):
        level, top = at[number], len(ladder.costs) - 1
        near = {top} if level is None else {max(0, level - 1), min(top, level + 1), None}
        for other in near - {level}:
            yield [*at[:number], other, *at[number + 1 :]]


def _within(
    ladders: Sequence[Ladder], at: Sequence[int | None], budget: float, kept: int | None = None
) -> list[int | None] | None:
    """Lower levels until the budget is met, then raise what still fits; ``kept``: a layer that is
    not lowered. None where there is no way.
    """
    now = list(at)
    cost = sum(ladder.cost(level) for ladder, level in zip(ladders, now, strict=True))
    while cost > budget:
        steps = [
            step
            for i, ladder in enumerate(ladders)
            if i != kept and (step := _down(ladder, now[i], i)) is not None
        ]
        if not steps:
            return None
        _, saved, number, level = min(steps)
        now[number] = level
        cost += saved
    for number, raised in _ups(ladders, now, budget - cost):
        now[number] = raised
    return now


def _down(ladder: Ladder, at: int | None, number: int) -> tuple[float, float, int, int] | None:
    """(loss for what is saved, minus what is saved, layer, level): the best deeper level."""
    now, best = ladder.cost(at), None
    for level in range(len(ladder.costs) if at is None else at):
        saved = now - ladder.costs[level]
        if saved > 0:
            rate = (ladder.loss(level) - ladder.loss(at)) / saved
            step = (rate, -saved, number, level)
            best = step if best is None or step < best else best
    return best


def _ups(
    ladders: Sequence[Ladder], at: Sequence[int | None], left: float
) -> list[tuple[int, int | None]]:
    """Levels that fit into what is left of the budget, those that gain most for it first."""
    now = list(at)
    done: list[tuple[int, int | None]] = []
    while True:
        steps = []
        for number, ladder in enumerate(ladders):
            if now[number] is None:
                continue
            here = ladder.cost(now[number])
            higher = [*range(int(now[number] or 0) + 1, len(ladder.costs)), None]
            for level in higher:
                extra = ladder.cost(level) - here
                gain = ladder.loss(now[number]) - ladder.loss(level)
                if extra <= left and gain > 0:
                    order = len(ladder.costs) if level is None else level
                    steps.append((-gain / max(extra, 1e-12), number, order))
        if not steps:
            return done
        _, number, order = min(steps)
        level = None if order == len(ladders[number].costs) else order
        left -= ladders[number].cost(level) - ladders[number].cost(now[number])
        now[number] = level
        done.append((number, level))
