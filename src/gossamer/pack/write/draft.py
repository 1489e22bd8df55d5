"""A section before it is written: its size is known from histograms, nearly to the byte.

Histograms are cheap and streams are not, so that layouts are compared as drafts, and only the
smallest is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import ArgumentError
from gossamer.pack.coders.bits import Symbols
from gossamer.pack.coders.bits import histogram as count
from gossamer.pack.coders.limits import varint
from gossamer.pack.coders.table import CODERS, NAMED, NUMBERED

__all__ = ["SMALL", "Draft", "Stream", "near"]

SMALL = 4096
"""Up to this many symbols or entries, everything is tried instead of estimated."""


def near(size: float) -> float:
    """What a measured size may exceed the smallest by and yet be smaller when written."""
    return 1.002 * size + 64


@dataclass(frozen=True, eq=False)
class Stream:
    """Symbols that one coder is to write after its number and length.

    Attributes:
        histogram: of the symbols; its length is the alphabet.
        symbols: gives them.
        coders: those to choose from, by name.
        slack: the fraction that an estimate is off by at most.
    """

    histogram: NDArray[np.integer]
    symbols: Callable[[], Symbols]
    coders: tuple[str, ...]
    slack: float

    @cached_property
    def sizes(self) -> list[tuple[float, str]]:
        """Bytes and coder; those that cannot be the smallest are left out."""
        costs = sorted((CODERS[c].estimate(self.histogram), c) for c in self.coders)
        small, most = self.histogram.sum() <= SMALL, costs[0][0] * (1 + self.slack)
        tried = [c for cost, c in costs if small or cost <= most]
        return [(CODERS[c].measure(self.histogram) + _name_bytes(c), c) for c in tried]

    @property
    def size(self) -> float:
        """Bytes of the smallest, its number and length included."""
        least, _ = min(self.sizes)
        return least + len(varint(int(least) << 2))

    def __bytes__(self) -> bytes:
        symbols, alphabet = self.symbols(), len(self.histogram)
        small, most = len(symbols) <= SMALL, near(min(self.sizes)[0])
        tried = [c for size, c in self.sizes if small or size <= most]
        encoded = [(CODERS[c].encode(symbols, alphabet), c) for c in tried]
        told = [(len(data) + _name_bytes(c), c not in NUMBERED) for data, c in encoded]
        data, coder = encoded[told.index(min(told))]
        if coder in NUMBERED:
            return varint(len(data) << 2 | NUMBERED.index(coder)) + data
        found = CODERS[coder].decode(data, len(symbols), alphabet)
        if not np.array_equal(found, symbols):  # another package's
            raise ArgumentError(
                f"symbol coder {coder!r} does not give back the {len(symbols)} symbols that it "
                "encoded; repair it, or leave it unregistered"
            )
        return varint(len(data) << 2 | NAMED) + bytes([len(coder)]) + coder.encode() + data


def _name_bytes(coder: str) -> int:
    """What telling the coder takes beside its number."""
    return 0 if coder in NUMBERED else 1 + len(coder)


@dataclass(frozen=True, eq=False)
class Draft:
    """Bytes, and streams in their place among them."""

    coders: tuple[str, ...]
    slack: float
    parts: list[bytes | Stream] = field(default_factory=list)

    def add(self, data: bytes) -> None:
        """Bytes as they are."""
        self.parts.append(data)

    def code(self, symbols: Symbols, alphabet: int) -> None:
        """``symbols``, each below ``alphabet``."""
        self.later(count(symbols, alphabet), lambda: symbols)

    def later(self, histogram: NDArray[np.integer], symbols: Callable[[], Symbols]) -> None:
        """Symbols of this histogram, made only if they are written."""
        self.parts.append(Stream(histogram, symbols, self.coders, self.slack))

    @property
    def size(self) -> float:
        """Bytes when written, about."""
        return sum(len(p) if isinstance(p, bytes) else p.size for p in self.parts)

    def __bytes__(self) -> bytes:
        return b"".join(bytes(p) for p in self.parts)
