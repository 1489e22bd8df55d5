"""A carry-less binary range coder, which the context coder drives bit by bit.

The interval [low, high] of 32 bits is cut by the probability of a 1; bytes that both ends share
go out. Probabilities are in units of 2^-16.
"""

from __future__ import annotations

from typing import Protocol

from gossamer.core.errors import FormatError

__all__ = ["Coder", "Decoder", "Encoder"]


class Coder(Protocol):
    """Either side: the same calls write a stream and read it."""

    def code(self, bit: int, p: int) -> int:
        """The bit, of probability ``p`` to be 1, in units of 2^-16; read, whatever is given."""


class Encoder:
    """Carry-less binary range coder over [low, high] of 32 bits."""

    def __init__(self) -> None:
        self.low, self.high, self.out = 0, 0xFFFFFFFF, bytearray()

    def code(self, bit: int, p: int) -> int:
        """Write the bit."""
        middle = self.low + ((self.high - self.low) * p >> 16)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while not (self.low ^ self.high) >> 24:
            self.out.append(self.high >> 24)
            self.low = self.low << 8 & 0xFFFFFFFF
            self.high = self.high << 8 & 0xFFFFFFFF | 255
        return bit

    def finish(self) -> bytes:
        """All bytes, without trailing zeros."""
        return bytes(self.out + _tail(self.low, self.high)).rstrip(b"\0")


def _tail(low: int, high: int) -> bytes:
    """The fewest bytes that, followed by zeros, name a number in [low, high]."""
    for k in range(1, 5):
        rest = (1 << 32 - 8 * k) - 1
        value = (low + rest) & ~rest
        if value <= high:
            break
    return value.to_bytes(4, "big")[:k]


class Decoder:
    """Reads zeros past the end; ``finish`` tells whether these were all the encoder's bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 4
        self.low, self.high = 0, 0xFFFFFFFF
        self.value = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def code(self, bit: int, p: int) -> int:
        """The bit that comes next."""
        middle = self.low + ((self.high - self.low) * p >> 16)
        bit = int(self.value <= middle)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while not (self.low ^ self.high) >> 24:
            self.low = self.low << 8 & 0xFFFFFFFF
            self.high = self.high << 8 & 0xFFFFFFFF | 255
            byte = self.data[self.at] if self.at < len(self.data) else 0
            self.value = self.value << 8 & 0xFFFFFFFF | byte
            self.at += 1
        return bit

    def finish(self) -> None:
        """FormatError unless the data end here."""
        tail, done = _tail(self.low, self.high), self.at - 4
        rest = self.data[done:]
        if self.data[-1:] == b"\0" or rest.ljust(len(tail), b"\0") != tail:
            raise FormatError(
                f"context stream of {len(self.data)} bytes: it does not end where its entries end"
            )
