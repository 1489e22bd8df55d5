"""The symbol coders by name.

Another package adds its own with :func:`register`: profile ``smallest`` then tries it wherever its
``estimate`` and ``measure`` say that it may pay, and a file tells it by name.
"""

from __future__ import annotations

import re
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import ArgumentError
from gossamer.core.tables import Table
from gossamer.pack.coders.ans import Rans
from gossamer.pack.coders.bits import FixedWidth
from gossamer.pack.coders.huffman import Huffman

__all__ = [
    "CODERS",
    "FIXED",
    "HUFFMAN",
    "NAMED",
    "NUMBERED",
    "RANS",
    "Coder",
    "entropy_bytes",
    "named",
    "register",
]


class Coder(Protocol):
    """Symbols to bytes and back; the count and the alphabet are the caller's to remember.

    Several threads may call it at once.
    """

    id: str

    def encode(self, symbols: NDArray[np.unsignedinteger], alphabet: int) -> bytes:
        """All of ``symbols`` (1-D, each below ``alphabet``), with whatever tables they need."""

    def decode(
        self, data: bytes | memoryview, count: int, alphabet: int
    ) -> NDArray[np.unsignedinteger]:
        """The symbols; FormatError when ``data`` is not exactly their encoding."""

    def estimate(self, histogram: NDArray[np.integer]) -> float:
        """About how many bytes :meth:`encode` takes for symbols of this histogram; fast."""

    def measure(self, histogram: NDArray[np.integer]) -> float:
        """The same nearly to the byte."""


FIXED, HUFFMAN, RANS = NUMBERED = ("fixed", "huffman", "rans")
"""Told by their number in the file."""

NAMED = 3
"""The number of all others, whose name follows it."""

CODERS: Table[Coder] = Table("symbol coder", {c.id: c for c in (FixedWidth(), Huffman(), Rans())})
"""By name; :func:`register` adds to it."""


def register(coder: Coder) -> Coder:
    """Have a coder tried by profile ``smallest``, and found by its ``id`` in a file.

    Raises :class:`ArgumentError` for a name that is taken, or that no file can hold.
    """
    if not named(coder.id):
        raise ArgumentError(
            f"coder id {coder.id!r} must be 1 to 64 printable ASCII characters without spaces, "
            "since files tell it by this name; rename it"
        )
    return CODERS.register(coder.id, coder)


def named(name: str) -> bool:
    """Whether a file can hold this name of a coder."""
    return re.fullmatch("[!-~]{1,64}", name) is not None


def entropy_bytes(histogram: NDArray[np.integer]) -> float:
    """The order-0 entropy of a histogram, in bytes."""
    counts = histogram[histogram > 0].astype(np.float64)
    return float((counts * np.log2(counts.sum() / counts)).sum() / 8) if len(counts) else 0.0
