"""A symbol coder as another package would add it, for the tests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import FormatError
from gossamer.pack.coders.bits import as_symbols

Symbols = NDArray[np.unsignedinteger]


class Toy:
    """Symbol ``s`` as ``s`` one bits and a zero; no tables, so that short streams gain."""

    id = "toy"

    def encode(self, symbols: Symbols, alphabet: int) -> bytes:
        text = "".join("1" * int(s) + "0" for s in symbols)
        return np.packbits(np.array(list(text), "U1") == "1").tobytes()

    def decode(self, data: bytes | memoryview, count: int, alphabet: int) -> Symbols:
        bits = np.unpackbits(np.frombuffer(data, np.uint8))
        ends = np.flatnonzero(bits == 0)[:count]
        symbols = np.diff(ends, prepend=-1) - 1
        if len(symbols) != count or (count and int(symbols.max()) >= alphabet):
            raise FormatError(f"{len(data)} bytes are not {count} symbols")
        symbols = as_symbols(symbols, alphabet)
        if self.encode(symbols, alphabet) != bytes(data):
            raise FormatError(f"{len(data)} bytes are more than {count} symbols")
        return symbols

    def estimate(self, histogram: NDArray[np.integer]) -> float:
        return (int((histogram * np.arange(1, len(histogram) + 1)).sum()) + 7) // 8

    measure = estimate
