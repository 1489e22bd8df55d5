"""Canonical Huffman coding with limited code lengths.

Codes are assigned in order of length, then of symbol, and written from the high bit downward.
Lengths are optimal: Huffman's where they fit, else by package-merge (Larmore and Hirschberg, "A
fast algorithm for optimal length-limited Huffman codes", J. ACM 37(3), 1990).

A stream: one byte (0: one distinct symbol; 1 or 2: one or four bit streams), the table of which
symbols have a code and of their lengths, then with four streams the bytes of the first three
(little-endian uint32 each), then the streams. Each codes a run of consecutive symbols and is
filled up with zero bits. No symbols: no bytes.
"""

from __future__ import annotations

import heapq
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.kernels import kernel
from gossamer.pack.coders.bits import (
    BitReader,
    BitWriter,
    Symbols,
    as_symbols,
    check_count,
    histogram,
    symbol_dtype,
)
from gossamer.pack.coders.tables import read_signed, read_used, write_signed, write_used

__all__ = ["Huffman", "code_lengths", "table_bytes"]

Ints = NDArray[np.int64]

_ONE, _SINGLE, _FOUR = range(3)
_SPLIT = 1 << 16  # symbols from which four streams are used
_LONGEST = 24
_MOST = 1 << 20  # largest alphabet: the code of each symbol must fit
_CHUNK = 1 << 18  # bits, or symbols, per step of the numpy twins


def code_lengths(histogram: NDArray[np.integer], limit: int | None = None) -> Ints:
    """Optimal prefix code lengths in bits; 0 for symbols that do not occur.

    A single symbol gets length 1, as in the published tables.

    Args:
        histogram: occurrences of each symbol.
        limit: longest length allowed; ``None`` for plain Huffman lengths.

    Raises :class:`ArgumentError` when ``limit`` bits cannot tell the symbols apart.

    >>> code_lengths(np.array([8, 4, 2, 1, 1])).tolist()
    [1, 2, 3, 4, 4]
    >>> code_lengths(np.array([8, 4, 2, 1, 1]), limit=3).tolist()
    [1, 3, 3, 3, 3]
    """
    counts = np.asarray(histogram, np.int64)
    if counts.ndim != 1 or (len(counts) and int(counts.min()) < 0):
        raise ArgumentError("histogram must be 1-D and hold no negative count")
    used = np.flatnonzero(counts)
    if limit is not None and (limit < 1 or len(used) > 1 << limit):
        raise ArgumentError(
            f"limit of {limit} bits cannot tell {len(used)} symbols apart; "
            f"use at least {max(1, (len(used) - 1).bit_length())}"
        )
    out = np.zeros(len(counts), np.int64)
    if len(used) == 1:
        out[used] = 1
    if len(used) < 2:
        return out
    order = used[np.argsort(counts[used], kind="stable")]
    weights = counts[order]
    lengths = _huffman(weights.tolist())
    if limit is not None and max(lengths) > limit:
        lengths = _package_merge(weights, limit).tolist()
    out[order] = lengths
    return out


def _huffman(weights: list[int]) -> list[int]:
    """Lengths for two or more ascending weights."""
    heap = [(w, i) for i, w in enumerate(weights)]
    parent = [0] * (2 * len(weights) - 1)
    for node in range(len(weights), len(parent)):
        first, a = heapq.heappop(heap)
        second, b = heap[0]
        heapq.heapreplace(heap, (first + second, node))
        parent[a] = parent[b] = node
    depth = [0] * len(parent)
    for node in range(len(parent) - 2, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return depth[: len(weights)]


def _package_merge(weights: Ints, limit: int) -> Ints:
    """Lengths up to ``limit`` for ascending weights."""
    count = len(weights)
    packages = weights[:0]
    leaves: list[NDArray[np.bool_]] = []
    for _ in range(limit):
        merged = np.concatenate([weights, packages])
        order = np.argsort(merged, kind="stable")
        leaves.append(order < count)
        merged = merged[order]
        even = len(merged) // 2 * 2
        packages = merged[0:even:2] + merged[1:even:2]
    lengths = np.zeros(count, np.int64)
    take = 2 * count - 2
    for level in reversed(leaves):
        # The lightest leaves among the first `take` items gain a bit; the packages open up.
        found = int(level[:take].sum())
        lengths[:found] += 1
        take = 2 * (take - found)
    return lengths


def _limit(used: int) -> int:
    """Longest code of a stream: loses next to nothing, and keeps decoding tables small."""
    return max(14, min(_LONGEST, (used - 1).bit_length() + 4))


def _canonical(used: Ints, lengths: Ints) -> tuple[Ints, Ints, Ints]:
    """Symbols and lengths in order of code, and the codes, which use up all bit patterns."""
    order = np.argsort(lengths, kind="stable")
    symbols, lengths = used[order], lengths[order]
    longest = int(lengths[-1])
    steps = np.left_shift(1, longest - lengths)
    return symbols, lengths, np.cumsum(steps) - steps >> longest - lengths


class Huffman:
    """The coder. Alphabets up to 2**20."""

    id = "huffman"

    def encode(self, symbols: Symbols, alphabet: int) -> bytes:
        """``symbols`` (1-D, each below ``alphabet``) with their table."""
        check_count(len(symbols), alphabet, _MOST)
        symbols = as_symbols(symbols, alphabet)
        if not len(symbols):
            return b""
        counts = histogram(symbols, alphabet)
        used = np.flatnonzero(counts)
        if len(used) == 1:
            return bytes([_ONE]) + _one(used)
        lengths = code_lengths(counts[used], _limit(len(used)))
        ordered, sorted_lengths, codes = _canonical(used, lengths)
        # Both tables in one: code << 5 | length.
        table = np.zeros(alphabet, np.uint32)
        table[ordered] = codes << 5 | sorted_lengths
        parts = _split(symbols, 4 if len(symbols) >= _SPLIT else 1)
        streams = [_write(part, table) for part in parts]
        head = bytes([_SINGLE if len(parts) == 1 else _FOUR]) + _table(used, lengths)
        sizes = b"".join(len(s).to_bytes(4, "little") for s in streams[:-1])
        return b"".join([head, sizes, *streams])

    def decode(self, data: bytes | memoryview, count: int, alphabet: int) -> Symbols:
        """The symbols; :class:`FormatError` unless ``data`` codes ``count`` of them."""
        return self._decode(data, count, alphabet, kernel("entropy") is not None)

    def decode_reference(self, data: bytes | memoryview, count: int, alphabet: int) -> Symbols:
        """:meth:`decode` in numpy."""
        return self._decode(data, count, alphabet, False)

    def estimate(self, histogram: NDArray[np.integer]) -> float:
        """Bytes for symbols of this histogram: exact but for the table's few."""
        used = histogram[histogram > 0]
        if len(used) < 2:
            return 2.0 * len(used)
        lengths = code_lengths(used, _limit(len(used)))
        return float((used * lengths).sum() / 8 + 4 + _table_estimate(histogram))

    def measure(self, histogram: NDArray[np.integer]) -> float:
        """The same, exact but for how four streams are filled up."""
        used = np.flatnonzero(histogram)
        if len(used) < 2:
            return float(sum(1 + len(_one(s)) for s in used[:, None]))
        counts = histogram[used]
        lengths = code_lengths(counts, _limit(len(used)))
        head = 1 + len(_table(used, lengths)) + (14 if int(counts.sum()) >= _SPLIT else 0)
        return head + (int((counts * lengths).sum()) + 7) // 8

    def _decode(self, data: bytes | memoryview, count: int, alphabet: int, native: bool) -> Symbols:
        check_count(count, alphabet, _MOST)
        data = memoryview(data)
        if count == 0:
            if len(data):
                raise FormatError(f"{len(data)} bytes for no symbols")
            return np.zeros(0, symbol_dtype(alphabet))
        mode = data[0] if len(data) else -1
        if mode not in (_ONE, _SINGLE, _FOUR):
            raise FormatError("Huffman data is empty or of an unknown kind")
        rest = data[1:]
        reader = BitReader(rest, 16 + 16 * min(alphabet, count))
        if mode == _ONE:
            symbol = int(reader.golomb(1, 4)[0])
            if symbol >= alphabet or reader.finish() != len(rest):
                raise FormatError(f"one symbol, {symbol} of an alphabet of {alphabet}")
            return np.full(count, symbol, symbol_dtype(alphabet))
        used, lengths = _read_lengths(reader, alphabet, count)
        rest = rest[reader.finish() :]
        order, lengths, _ = _canonical(used, lengths)
        streams = _streams(rest, 4 if mode == _FOUR else 1)
        out = np.empty(count, symbol_dtype(alphabet))
        for stream, part in zip(streams, _split(out, len(streams)), strict=True):
            if native:
                self._native(stream, order, lengths, part)
            else:
                _read(stream, order, lengths, part)
        return out

    def _native(self, stream: memoryview, order: Ints, lengths: Ints, out: Symbols) -> None:
        module = kernel("entropy")
        assert module is not None
        data = np.frombuffer(stream, np.uint8)
        try:
            module.huffman_decode(data, order.astype(np.uint32), lengths.astype(np.uint8), out)
        except ValueError as e:
            raise FormatError(str(e)) from None


def table_bytes(data: bytes | memoryview, count: int, alphabet: int) -> int:
    """What comes before the codes of a stream that was decoded: mode, table and lengths."""
    if not len(data) or data[0] == _ONE:
        return len(data)
    reader = BitReader(memoryview(data)[1:], 16 + 16 * min(alphabet, count))
    _read_lengths(reader, alphabet, count)
    return 1 + reader.finish() + (12 if data[0] == _FOUR else 0)


def _one(used: Ints) -> bytes:
    """Which is the only symbol."""
    writer = BitWriter()
    writer.golomb(used, 4)
    return writer.bytes()


def _table(used: Ints, lengths: Ints) -> bytes:
    """Which symbols have a code, and the lengths."""
    writer = BitWriter()
    write_used(writer, used)
    writer.put(int(lengths[0]) - 1, 5)
    write_signed(writer, np.diff(lengths))
    return writer.bytes()


def _table_estimate(histogram: NDArray[np.integer]) -> float:
    """Bytes of a table, about."""
    used = np.flatnonzero(histogram)
    holes = int(used[-1]) + 1 - len(used)
    return len(used) / 4 + min(holes, 2 * len(used)) / 4


def _read_lengths(reader: BitReader, alphabet: int, count: int) -> tuple[Ints, Ints]:
    """Symbols with a code and the lengths, which make a complete code."""
    used = read_used(reader, alphabet, count)
    first = reader.get(5) + 1
    lengths = first + np.concatenate([[0], np.cumsum(read_signed(reader, len(used) - 1))])
    if int(lengths.min()) < 1 or int(lengths.max()) > _LONGEST:
        raise FormatError(f"Huffman lengths of {lengths.min()} to {lengths.max()} bits")
    taken = int(np.left_shift(1, _LONGEST - lengths).sum())
    if taken != 1 << _LONGEST:
        kind = "overfull" if taken > 1 << _LONGEST else "incomplete"
        raise FormatError(f"Huffman lengths make an {kind} code (Kraft sum {taken / 2**24:.6g})")
    return used, lengths


def _split(symbols: Symbols, parts: int) -> list[Symbols]:
    size = -(-len(symbols) // parts)
    return [symbols[i * size : (i + 1) * size] for i in range(parts)]


def _streams(data: memoryview, count: int) -> list[memoryview]:
    if count == 1:
        return [data]
    if len(data) < 4 * (count - 1):
        raise FormatError("Huffman data is cut short")
    head = np.frombuffer(data[: 4 * (count - 1)], "<u4").astype(np.int64)
    ends = [4 * (count - 1), *(4 * (count - 1) + np.cumsum(head)).tolist(), len(data)]
    if ends[-2] > len(data):
        raise FormatError("Huffman streams are longer than the data")
    return [data[a:b] for a, b in pairwise(ends)]


def _write(symbols: Symbols, table: NDArray[np.uint32]) -> bytes:
    native = kernel("entropy")
    if native is not None:
        return native.huffman_encode(symbols, table)
    parts = []
    for start in range(0, len(symbols), _CHUNK):
        entries = table[symbols[start : start + _CHUNK]].astype(np.int64)
        widths, codes = entries & 31, entries >> 5
        ends = np.repeat(np.cumsum(widths), widths)
        at = ends - np.arange(len(ends)) - 1
        parts.append((np.repeat(codes, widths) >> at & 1).astype(np.uint8))
    return np.packbits(np.concatenate(parts)).tobytes() if parts else b""


def _read(stream: memoryview, order: Ints, lengths: Ints, out: Symbols) -> None:
    """Decode in numpy: the code at every bit, then from code to code."""
    longest = int(lengths[-1])
    steps = np.left_shift(1, longest - lengths)
    starts = np.cumsum(steps) - steps
    bits = np.unpackbits(np.frombuffer(stream, np.uint8))
    bits = np.concatenate([bits, np.zeros(longest, np.uint8)])
    total = 8 * len(stream)
    at, done = 0, 0
    while done < len(out) and at < total:
        size = min(_CHUNK, total - at)
        window = np.zeros(size, np.int64)
        for b in range(longest):
            window = window << 1 | bits[at + b : at + b + size]
        index = np.searchsorted(starts, window, side="right") - 1
        jumps = lengths[index].tolist()
        here, path = 0, list[int]()
        while here < size and done + len(path) < len(out):
            path.append(here)
            here += jumps[here]
        out[done : done + len(path)] = order[index[path]]
        done += len(path)
        at += here
    if done < len(out) or at > total or at + 8 <= total or bits[at:total].any():
        raise FormatError(f"a Huffman stream of {len(stream)} bytes is not {len(out)} symbols")
