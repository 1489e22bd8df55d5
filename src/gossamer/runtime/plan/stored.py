"""Constants of a plan's file: decoded when asked for, and packed once.

A sparse kernel asks for what is not zero (:func:`entries`) and packs that; the dense array is made
only where somebody reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np

from gossamer.runtime.kernels.arrays import Packed
from gossamer.runtime.kernels.entries import Entries
from gossamer.runtime.plan.coding import Coded

__all__ = ["Stored", "density", "entries", "once"]

T = TypeVar("T", bound=Packed)


class Stored(Mapping[str, np.ndarray]):
    """Name -> array, decoded at each look.

    Attributes:
        coded: name -> what the file holds.
        packed: node's name -> its packed weight, of those that were packed or are known from
            before (:mod:`gossamer.runtime.plan.ready`).
    """

    def __init__(self, coded: Mapping[str, Coded], packed: Mapping[str, Packed]) -> None:
        self.coded, self.packed = coded, dict(packed)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.coded[name].dense()

    def __contains__(self, name: object) -> bool:
        return name in self.coded

    def __iter__(self) -> Iterator[str]:
        return iter(self.coded)

    def __len__(self) -> int:
        return len(self.coded)


def entries(constants: Mapping[str, np.ndarray], name: str) -> Entries:
    """What is not zero of a constant."""
    if isinstance(constants, Stored):
        return constants.coded[name].entries()
    flat = np.ascontiguousarray(constants[name]).reshape(-1)
    places = np.flatnonzero(flat)
    return Entries(constants[name].shape, places, flat[places])


def density(constants: Mapping[str, np.ndarray], name: str) -> float:
    """The fraction of a constant that is not zero."""
    if isinstance(constants, Stored):
        return constants.coded[name].density
    array = constants[name]
    return float(np.count_nonzero(array)) / max(1, array.size)


def once(constants: Mapping[str, np.ndarray], node: str, kind: type[T], pack: Callable[[], T]) -> T:
    """A node's packed weight: that of before where there is one, else what ``pack`` makes."""
    if not isinstance(constants, Stored):
        return pack()
    known = constants.packed.get(node)
    if not isinstance(known, kind):
        known = constants.packed[node] = pack()
    return known
