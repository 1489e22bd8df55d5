"""The symbol coders by their number in the file."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gossamer.pack.coders.ans import Rans
from gossamer.pack.coders.bits import FixedWidth
from gossamer.pack.coders.huffman import Huffman

__all__ = ["CODERS", "FIXED", "HUFFMAN", "RANS", "Coder", "entropy_bytes"]


class Coder(Protocol):
    """Symbols to bytes and back; the count and the alphabet are the caller's to remember."""

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


def entropy_bytes(histogram: NDArray[np.integer]) -> float:
    """The order-0 entropy of a histogram, in bytes."""
    counts = histogram[histogram > 0].astype(np.float64)
    return float((counts * np.log2(counts.sum() / counts)).sum() / 8) if len(counts) else 0.0


FIXED, HUFFMAN, RANS = range(3)

CODERS: dict[int, Coder] = {FIXED: FixedWidth(), HUFFMAN: Huffman(), RANS: Rans()}
"""By number in the file."""
