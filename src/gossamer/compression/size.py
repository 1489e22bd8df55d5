"""The size that a run's file is to have: what it would be now, and prices found for it.

A stage that sets the price of bits is told the size of the whole file. What it changes is seen
through to the end: the stages after it are tried on a copy, and the copy is packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gossamer.compression.packing import packed
from gossamer.compression.progress import Reporter
from gossamer.compression.stage import Stage
from gossamer.compression.state import State
from gossamer.core.masks import Masks
from gossamer.core.plain import copied

__all__ = ["NEAR", "Size", "priced", "verdict"]

NEAR = 0.98
"""A file of so much of what it may have is near enough."""
_FIRST, _FAR = 4.0, 1e6  # the first factor between two prices; the farthest from the first price


@dataclass(frozen=True)
class Size:
    """What a file may have, and how it will be made.

    Attributes:
        most: bytes.
        later: the stages that are still to come; they rewrite, and train nothing.
        profile: of the pack.
    """

    most: int
    later: tuple[Stage, ...]
    profile: str

    def of(self, state: State, model: nn.Module | None = None) -> int:
        """Bytes of the file, were the later stages run now; ``model``: in place of the state's."""
        twin = replace(
            state,
            model=copied(state.model if model is None else model),
            masks=Masks({n: m.clone() for n, m in state.masks.items()}),
            fixed=set(state.fixed),
            seeds=dict(state.seeds),
            notes={},
            floor=None,
            progress=Reporter(),
        )
        for number, stage in enumerate(self.later, state.number + 1):
            twin.number, twin.name = number, f"{number}-{stage.stage}"
            stage.run(twin)
        twin.forget_seeds()
        return packed(twin, self.profile)


def verdict(most: int, bytes_: int) -> dict[str, Any]:
    """What run.json says of it.

    >>> verdict(3000, 2970)["kept"], verdict(3000, 3001)["kept"]
    (True, False)
    """
    return {"most": most, "bytes": bytes_, "kept": bytes_ <= most}


def priced(
    most: int, first: float, measured: Callable[[float], int], *, tries: int = 14
) -> tuple[float, int]:
    """The lowest price of bits found whose file has at most ``most`` bytes, and its bytes.

    ``measured``: the bytes at a price; they fall with it, roughly. Prices are ``first`` times
    powers of four, until the target lies between two, then between those, by the logarithms of
    sizes; the search ends at a file of at least ``NEAR`` of the target. Where no price is high
    enough, the smallest file's.
    """
    tried: dict[float, int] = {}
    price = first
    while len(tried) < tries:
        tried[price] = measured(price)
        low = max((p for p, size in tried.items() if size > most), default=None)
        high = min((p for p, size in tried.items() if size <= most and p > (low or 0)),
                   default=None)  # fmt: skip
        if high is not None and (
            tried[high] >= NEAR * most or (low is None and high < first / _FAR)
        ):
            break
        if high is None:
            price = max(tried) * _FIRST
            if price > first * _FAR:
                break
        elif low is None:
            price = min(tried) / _FIRST
        else:
            part = math.log(tried[low] / most) / math.log(tried[low] / tried[high])
            part = min(max(part, 0.1), 0.9)
            price = low * (high / low) ** part
            if not low < price < high:
                break
    fits = {p: size for p, size in tried.items() if size <= most}
    best = min(fits, key=lambda p: (-fits[p], p)) if fits else min(tried, key=lambda p: tried[p])
    return best, tried[best]
