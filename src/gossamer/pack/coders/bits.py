"""Bits: n-bit packing of integers, and reading and writing of small variable-length tables.

All bit streams here are filled from the lowest bit of each byte upward, as the 4-bit fields of
Deep Compression's published files are (low nibble first).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.kernels import kernel

__all__ = [
    "BitReader",
    "BitWriter",
    "FixedWidth",
    "as_symbols",
    "check_count",
    "histogram",
    "look_up",
    "pack_bits",
    "pieces",
    "symbol_dtype",
    "unpack_bits",
]

Symbols = NDArray[np.unsignedinteger]
Integers = TypeVar("Integers", bound=NDArray[np.integer])

_CHUNK = 1 << 16  # symbols per step of the numpy packer; a multiple of 8
_LONGEST = 32  # unary prefix of a table entry


def symbol_dtype(alphabet: int) -> np.dtype[np.unsignedinteger]:
    """The smallest of uint8, uint16 and uint32 that holds ``0 .. alphabet - 1``."""
    if alphabet <= 1 << 8:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16) if alphabet <= 1 << 16 else np.dtype(np.uint32)


def as_symbols(symbols: Symbols, alphabet: int) -> Symbols:
    """``symbols`` in :func:`symbol_dtype`, contiguous; :class:`ArgumentError` unless 1-D and
    each is below ``alphabet`` (1 to 2**32)."""
    if not 1 <= alphabet <= 1 << 32:
        raise ArgumentError(f"alphabet must be 1 to 2**32, got {alphabet}")
    symbols = np.asarray(symbols)
    if symbols.ndim != 1 or symbols.dtype.kind not in "iu":
        raise ArgumentError(
            f"symbols must be a 1-D array of integers, got {symbols.dtype} of shape {symbols.shape}"
        )
    if len(symbols) and (int(symbols.min()) < 0 or int(symbols.max()) >= alphabet):
        raise ArgumentError(
            f"symbols span [{symbols.min()}, {symbols.max()}], the alphabet is {alphabet}; "
            "pass a larger alphabet"
        )
    return np.ascontiguousarray(symbols, symbol_dtype(alphabet))


def check_count(count: int, alphabet: int, most: int = 1 << 32) -> None:
    """:class:`ArgumentError` for a negative count or an alphabet outside ``1 .. most``."""
    if count < 0:
        raise ArgumentError(f"count must not be negative, got {count}")
    if not 1 <= alphabet <= most:
        raise ArgumentError(f"alphabet must be 1 to {most}, got {alphabet}")


def histogram(symbols: Symbols, alphabet: int) -> NDArray[np.int64]:
    """How often each of ``0 .. alphabet - 1`` occurs; ``symbols`` as of :func:`as_symbols`."""
    native = kernel("entropy")
    if native is not None:
        counts = np.zeros(alphabet, np.int64)
        native.histogram(symbols, counts)
        return counts
    counts = np.zeros(alphabet, np.int64)
    for _, part in pieces(symbols):
        counts += np.bincount(part, minlength=alphabet)
    return counts


def pieces(symbols: Integers) -> Iterator[tuple[int, Integers]]:
    """Where each piece of an array begins, and the piece: 65,536 symbols, fewer at the end."""
    for start in range(0, len(symbols), _CHUNK):
        yield start, cast(Integers, symbols[start : start + _CHUNK])


def look_up(table: NDArray[np.unsignedinteger], symbols: Symbols) -> Symbols:
    """``table[symbols]``, in the place of ``symbols`` where the types allow.

    In pieces: numpy makes eight bytes of each index.
    """
    same = symbols.dtype == table.dtype and symbols.flags.writeable
    out = symbols if same else np.empty(len(symbols), table.dtype)
    for start, part in pieces(symbols):
        out[start : start + len(part)] = table[part]
    return out


# n-bit packing ----------------------------------------------------------------------------------


def pack_bits(values: Symbols, width: int) -> bytes:
    """``ceil(len(values) * width / 8)`` bytes of ``width``-bit (0 to 32) integers, low bits first.

    The bits left over in the last byte are 0. Higher bits of ``values`` are cut off.
    """
    _check_width(width)
    native = kernel("entropy")
    if native is not None:
        return native.pack_bits(np.ascontiguousarray(values, "<u4"), width)
    parts = []
    for start in range(0, len(values), _CHUNK):
        raw = np.ascontiguousarray(values[start : start + _CHUNK], "<u4").view(np.uint8)
        bits = np.unpackbits(raw.reshape(-1, 4), axis=1, bitorder="little")[:, :width]
        parts.append(np.packbits(bits, bitorder="little").tobytes())
    return b"".join(parts)


def unpack_bits(data: bytes | memoryview, count: int, width: int) -> Symbols:
    """The inverse of :func:`pack_bits`; :class:`FormatError` when ``data`` has not its length or
    leftover bits are set."""
    _check_width(width)
    if count < 0:
        raise ArgumentError(f"count must not be negative, got {count}")
    size = (count * width + 7) // 8
    if len(data) != size:
        raise FormatError(f"{count} integers of {width} bits take {size} bytes, got {len(data)}")
    spare = 8 * size - count * width
    if spare and data[-1] >> (8 - spare):
        raise FormatError(f"the last {spare} bits of packed integers are not 0")
    out = np.zeros(count, symbol_dtype(1 << width))
    raw = np.frombuffer(data, np.uint8)
    native = kernel("entropy")
    if native is not None:
        native.unpack_bits(raw, width, out)
        return out
    for start in range(0, count, _CHUNK):
        part = out[start : start + _CHUNK]
        at = start * width // 8
        flat = np.unpackbits(raw[at : at + _CHUNK * width // 8], bitorder="little")
        bits = flat[: len(part) * width].reshape(len(part), width)
        packed = np.packbits(bits, axis=1, bitorder="little")
        wide = np.zeros((len(part), out.itemsize), np.uint8)
        wide[:, : packed.shape[1]] = packed
        part[:] = wide.view(out.dtype.newbyteorder("<")).reshape(-1)
    return out


def _check_width(width: int) -> None:
    if not 0 <= width <= 32:
        raise ArgumentError(f"width must be 0 to 32 bits, got {width}")


class FixedWidth:
    """Each symbol in ``ceil(log2(alphabet))`` bits; no table. One possible symbol takes none."""

    id = "fixed"

    def encode(self, symbols: Symbols, alphabet: int) -> bytes:
        """``symbols`` (1-D, each below ``alphabet``) packed."""
        return pack_bits(as_symbols(symbols, alphabet), (alphabet - 1).bit_length())

    def decode(self, data: bytes | memoryview, count: int, alphabet: int) -> Symbols:
        """The symbols; :class:`FormatError` for a wrong length or a symbol out of range."""
        check_count(count, alphabet)
        out = unpack_bits(data, count, (alphabet - 1).bit_length())
        if count and int(out.max()) >= alphabet:
            raise FormatError(f"symbol {out.max()} in an alphabet of {alphabet}")
        return out

    decode_reference = decode

    def estimate(self, histogram: NDArray[np.integer]) -> float:
        """Exact bytes for symbols of this histogram, whose length is the alphabet."""
        return (int(histogram.sum()) * max(0, len(histogram) - 1).bit_length() + 7) // 8

    measure = estimate


# Tables -----------------------------------------------------------------------------------------


class BitWriter:
    """Collects integers of given widths and exp-Golomb coded ones."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.uint8]] = []

    def put(self, value: int, width: int) -> None:
        """One integer in ``width`` bits."""
        self.put_all(np.array([value], np.int64), np.array([width]))

    def put_all(self, values: NDArray[np.int64], widths: NDArray[np.integer]) -> None:
        """Integers of a width each."""
        starts = np.cumsum(widths) - widths
        at = np.arange(int(np.sum(widths))) - np.repeat(starts, widths)
        self._parts.append((np.repeat(values, widths) >> at & 1).astype(np.uint8))

    def golomb(self, values: NDArray[np.int64], k: int) -> None:
        """Non-negative integers, exp-Golomb of order ``k``: all prefixes, then all remainders."""
        widths = golomb_widths(values, k)
        # The prefix of a remainder of k + u bits is u zeros and a one.
        self.put_all(np.left_shift(1, widths - k), widths - k + 1)
        self.put_all(values + (1 << k), widths)

    @property
    def bits(self) -> int:
        """So far."""
        return sum(len(p) for p in self._parts)

    def bytes(self) -> bytes:
        """Everything, the last byte filled up with zeros."""
        if not self._parts:
            return b""
        return np.packbits(np.concatenate(self._parts), bitorder="little").tobytes()


def golomb_widths(values: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Bits of each exp-Golomb remainder; a code takes ``2 * width - k + 1`` bits."""
    return np.frexp((values + (1 << k)).astype(np.float64))[1].astype(np.int64) - 1


def golomb_best(values: NDArray[np.int64]) -> tuple[int, int]:
    """The order ``k`` (0 to 7) that takes the fewest bits, and those bits."""
    if not len(values):
        return 0, 0
    orders = np.arange(8)
    widths = golomb_widths(values + (1 << orders)[:, None] - 1, 0)
    costs = 2 * widths.sum(1) + (1 - orders) * len(values)
    k = int(np.argmin(costs))
    return k, int(costs[k])


class BitReader:
    """Reads what :class:`BitWriter` wrote; :class:`FormatError` at the end of the data.

    Args:
        data: the bytes.
        most: look at no more than so many bytes.
    """

    def __init__(self, data: bytes | memoryview, most: int) -> None:
        self._bits = np.unpackbits(np.frombuffer(data[:most], np.uint8), bitorder="little")
        self._at = 0

    def get(self, width: int) -> int:
        """One integer of ``width`` bits."""
        if self._at + width > len(self._bits):
            raise FormatError("a table is cut short")
        part = self._bits[self._at : self._at + width]
        self._at += width
        return sum(int(b) << i for i, b in enumerate(part))

    def golomb(self, count: int, k: int) -> NDArray[np.int64]:
        """``count`` integers of exp-Golomb order ``k``, each below ``2**(32 + k)``."""
        if count > len(self._bits) - self._at:
            raise FormatError("a table is cut short")
        rest = self._bits[self._at :]
        ones = np.flatnonzero(rest[: count * (_LONGEST + 1)])[:count]
        if len(ones) < count:
            raise FormatError("a table is cut short or has an entry of too many bits")
        widths = np.diff(ones, prepend=-1) - 1
        if count and int(widths.max()) > _LONGEST:
            raise FormatError("a table has an entry of too many bits")
        widths += k
        if count:
            self._at += int(ones[-1]) + 1
        starts = self._at + np.cumsum(widths) - widths
        self._at += int(widths.sum())
        if self._at > len(self._bits):
            raise FormatError("a table is cut short")
        # The leading one of each remainder is implied by its width.
        values = np.left_shift(np.int64(1), widths)
        for b in range(int(widths.max()) if count else 0):
            has = np.flatnonzero(widths > b)
            values[has] |= self._bits[starts[has] + b].astype(np.int64) << b
        return values - (1 << k)

    def finish(self) -> int:
        """Bytes read so far; the rest of the last one must be zeros."""
        end = (self._at + 7) // 8 * 8
        if self._bits[self._at : end].any():
            raise FormatError("bits after a table are not 0")
        return end // 8
