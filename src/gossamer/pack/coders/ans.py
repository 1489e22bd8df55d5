"""Range asymmetric numeral systems (rANS), interleaved.

Jarek Duda, "Asymmetric numeral systems", arXiv:1311.2540; interleaving after Fabian Giesen,
"Interleaved entropy coders", arXiv:1402.3392. States are 32 bits, renormalised 16 at a time, with
frequencies of 2**10 to 2**16; symbol ``i`` belongs to lane ``i % lanes``, and all lanes read one
sequence of words in the order in which they run dry. Few symbols use one lane, many 64.

A stream: one byte (kind in bits 0-2, lanes in bits 3-4, frequency bits - 10 in bits 5-7), a table
of frequencies, the states, the words; everything little-endian. No symbols: no bytes. The kinds:

- 0 raw: symbols of ``ceil(log2(alphabet))`` bits;
- 1 one symbol: which;
- 2 logarithmic: which symbols occur, and the logarithm of each frequency, in steps of
  1/2**0 to 1/2**8 octave, as the difference from the symbol before;
- 3, 4 geometric: frequencies of gaps between random positions, a mixture of one or two densities.

One lane starts encoding from state 0 and so wastes no bits: at the end of the words the decoder
lets the state run down to 0. More lanes start from 2**16 and must come back to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import FormatError
from gossamer.core.kernels import kernel
from gossamer.pack.coders.bits import (
    BitReader,
    BitWriter,
    Symbols,
    as_symbols,
    check_count,
    histogram,
    look_up,
    pack_bits,
    symbol_dtype,
    unpack_bits,
)
from gossamer.pack.coders.frequencies import Table, best_table, read_table

__all__ = ["Rans", "Stream", "parse"]

Ints = NDArray[np.int64]

_RAW, _ONE = 0, 1
_LANES = (1, 4, 16, 64)
# Bytes of payload from which so many lanes cost less than about .1 %.
_ENOUGH = (0, 1 << 13, 1 << 15, 1 << 17)
_MOST = 1 << 20
_WIDE = 1 << 16  # alphabets up to this are decoded straight to symbols
_LOW = 1 << 16


@dataclass(frozen=True)
class Stream:
    """A parsed head, ready for a kernel.

    Attributes:
        frequencies: of each of ``symbols``; sum ``2**bits``.
        symbols: ascending.
        bits: of a frequency.
        lanes: interleaved states.
        payload: states and words.
    """

    frequencies: Ints
    symbols: Ints
    bits: int
    lanes: int
    payload: memoryview

    def table(self, alphabet: int) -> NDArray[np.uint32]:
        """Frequencies of all symbols ``0 .. alphabet - 1``."""
        out = np.zeros(alphabet, np.uint32)
        out[self.symbols] = self.frequencies
        return out


class Rans:
    """The coder. Alphabets up to 2**20."""

    id = "rans"

    def encode(self, symbols: Symbols, alphabet: int) -> bytes:
        """``symbols`` (1-D, each below ``alphabet``) with their table."""
        check_count(len(symbols), alphabet, _MOST)
        symbols = as_symbols(symbols, alphabet)
        if not len(symbols):
            return b""
        counts = histogram(symbols, alphabet)
        used = np.flatnonzero(counts)
        if len(used) == 1:
            writer = BitWriter()
            writer.golomb(used, 4)
            return bytes([_ONE]) + writer.bytes()
        table = best_table(counts)
        width = (alphabet - 1).bit_length()
        if table is None or table.payload + len(table.data) >= len(symbols) * width / 8:
            return bytes([_RAW]) + pack_bits(symbols, width)
        lane = _lane(table)
        if alphabet > _WIDE:
            symbols = np.searchsorted(table.symbols, symbols).astype(np.uint16)
            frequencies = table.frequencies.astype(np.uint32)
        else:
            frequencies = np.zeros(alphabet, np.uint32)
            frequencies[table.symbols] = table.frequencies
        head = bytes([table.kind | lane << 3 | table.bits - 10 << 5])
        return head + table.data + _write(symbols, frequencies, table.bits, _LANES[lane])

    def decode(self, data: bytes | memoryview, count: int, alphabet: int) -> Symbols:
        """The symbols; :class:`FormatError` unless ``data`` codes ``count`` of them."""
        return self._decode(data, count, alphabet, kernel("entropy") is not None)

    def decode_reference(self, data: bytes | memoryview, count: int, alphabet: int) -> Symbols:
        """:meth:`decode` in Python."""
        return self._decode(data, count, alphabet, False)

    def estimate(self, histogram: NDArray[np.integer]) -> float:
        """Bytes for symbols of this histogram, within a few percent."""
        counts = histogram[histogram > 0].astype(np.float64)
        total = float(counts.sum())
        if len(counts) < 2:
            return 2.0 * len(counts)
        entropy = float((counts * np.log2(total / counts)).sum())
        table = min(0.35 * np.log2(total), 5.0) * len(counts)
        width = (len(histogram) - 1).bit_length()
        return min(entropy + table + 32, total * width + 8) / 8

    def measure(self, histogram: NDArray[np.integer]) -> float:
        """The same within a few bytes."""
        counts = histogram.astype(np.int64, copy=False)
        if np.count_nonzero(counts) < 2:
            return self.estimate(histogram)
        table = best_table(counts)
        raw = int(counts.sum()) * (len(counts) - 1).bit_length() / 8
        if table is None or table.payload + len(table.data) >= raw:
            return 1 + raw
        # A state of several lanes holds two bytes of symbols in its four.
        lanes = _LANES[_lane(table)]
        return 1 + len(table.data) + table.payload + (2 * lanes if lanes > 1 else 0)

    def _decode(self, data: bytes | memoryview, count: int, alphabet: int, native: bool) -> Symbols:
        check_count(count, alphabet, _MOST)
        found = parse(data, count, alphabet)
        if not isinstance(found, Stream):
            return found
        dtype = symbol_dtype(alphabet)
        table = found.table(alphabet) if alphabet <= _WIDE else found.frequencies.astype(np.uint32)
        read = _read_native if native else _read
        out = read(found, table, count, dtype if alphabet <= _WIDE else np.dtype(np.uint16))
        return out if alphabet <= _WIDE else look_up(found.symbols.astype(dtype), out)


def _lane(table: Table) -> int:
    """Which of the numbers of lanes."""
    return max(i for i in range(4) if table.payload >= _ENOUGH[i])


def parse(data: bytes | memoryview, count: int, alphabet: int) -> Stream | Symbols:
    """The head of an encoded stream; the symbols themselves where no frequencies are needed."""
    data = memoryview(data)
    dtype = symbol_dtype(alphabet)
    if count == 0:
        if len(data):
            raise FormatError(f"{len(data)} bytes for no symbols")
        return np.zeros(0, dtype)
    if not len(data):
        raise FormatError(f"no bytes for {count} symbols")
    kind, lanes, bits = data[0] & 7, _LANES[data[0] >> 3 & 3], 10 + (data[0] >> 5)
    rest = data[1:]
    if kind in (_RAW, _ONE) and data[0] != kind:
        raise FormatError("rANS data of an unknown kind")
    if kind == _RAW:
        out = unpack_bits(rest, count, (alphabet - 1).bit_length())
        if int(out.max()) >= alphabet:
            raise FormatError(f"symbol {out.max()} in an alphabet of {alphabet}")
        return out
    # A table names at most `count` symbols, or is a mixture of fixed size.
    reader = BitReader(rest, 64 + 16 * min(alphabet, count))
    if kind == _ONE:
        symbol = int(reader.golomb(1, 4)[0])
        if symbol >= alphabet or reader.finish() != len(rest):
            raise FormatError(f"one symbol, {symbol} of an alphabet of {alphabet}")
        return np.full(count, symbol, dtype)
    if bits > 16:
        raise FormatError(f"rANS frequencies of {bits} bits, at most 16 can be")
    symbols, frequencies = read_table(reader, kind, bits, alphabet, count)
    return Stream(frequencies, symbols, bits, lanes, rest[reader.finish() :])


# States and words -------------------------------------------------------------------------------


def _write(symbols: Symbols, frequencies: NDArray[np.uint32], bits: int, lanes: int) -> bytes:
    native = kernel("entropy")
    if native is not None:
        return native.rans_encode(symbols, frequencies, bits, lanes)
    starts = (np.cumsum(frequencies) - frequencies).tolist()
    table = frequencies.tolist()
    states = [_LOW if lanes > 1 else 0] * lanes
    words: list[int] = []
    for i in range(len(symbols) - 1, -1, -1):
        symbol, lane = int(symbols[i]), i % lanes
        state, f = states[lane], table[symbol]
        if state >= f << 32 - bits:
            words.append(state & 0xFFFF)
            state >>= 16
        states[lane] = (state // f << bits) + state % f + starts[symbol]
    head = np.array(states, "<u4").tobytes()
    if lanes == 1 and not words:
        return head.rstrip(b"\0")
    return head + np.array(words[::-1], "<u2").tobytes()


def _read_native(
    stream: Stream, table: NDArray[np.uint32], count: int, dtype: np.dtype[np.unsignedinteger]
) -> Symbols:
    module = kernel("entropy")
    assert module is not None
    out = np.empty(count, dtype)
    try:
        payload = np.frombuffer(stream.payload, np.uint8)
        module.rans_decode(payload, table, stream.bits, stream.lanes, out)
    except ValueError as e:
        raise FormatError(str(e)) from None
    return out


def _read(
    stream: Stream, table: NDArray[np.uint32], count: int, dtype: np.dtype[np.unsignedinteger]
) -> Symbols:
    bits, lanes, payload = stream.bits, stream.lanes, bytes(stream.payload)
    if lanes == 1 and len(payload) < 4:
        payload += bytes(4 - len(payload))
    if len(payload) < 4 * lanes or len(payload) % 2:
        raise FormatError(f"{len(payload)} bytes cannot be {lanes} rANS states and words")
    states = np.frombuffer(payload, "<u4", lanes).tolist()
    words = np.frombuffer(payload, "<u2", offset=4 * lanes).tolist()
    f = table.astype(np.int64)
    starts = (np.cumsum(f) - f).tolist()
    slots = np.repeat(np.arange(len(f)), f).tolist()
    frequencies = f.tolist()
    out = np.empty(count, dtype)
    mask, at, low = (1 << bits) - 1, 0, _LOW
    if lanes > 1 and min(states) < low:
        raise FormatError("a rANS state is below 2**16")
    for i in range(count):
        lane = i % lanes
        state = states[lane]
        slot = state & mask
        symbol = slots[slot]
        out[i] = symbol
        state = frequencies[symbol] * (state >> bits) + slot - starts[symbol]
        if state < low:
            if at < len(words):
                state = state << 16 | words[at]
                at += 1
            elif lanes > 1:
                raise FormatError("rANS words are cut short")
        states[lane] = state
    if at != len(words) or any(s != (low if lanes > 1 else 0) for s in states):
        raise FormatError(f"a rANS stream of {len(payload)} bytes is not {count} symbols")
    return out
