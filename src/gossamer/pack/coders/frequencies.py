"""Frequency tables of rANS streams: which is the smallest, and reading it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import FormatError
from gossamer.pack.coders.bits import BitReader, BitWriter
from gossamer.pack.coders.tables import (
    MIX_LIMIT,
    MIX_STEPS,
    geometric_weights,
    log_weights,
    normalise,
    read_signed,
    read_used,
    signed_bits,
    write_signed,
    write_used,
)

__all__ = ["LOG", "Table", "best_table", "read_table"]

Ints = NDArray[np.int64]

LOG, _MIX1, _MIX2 = 2, 3, 4
_STEPS = (1, 2, 4, 8, 16, 64)  # levels per octave that are tried
_MOST = 1 << 16  # symbols that can have a frequency
_MIXED = 256  # alphabets up to this may be gaps
_KEPT = 4096  # alphabets up to this have their last tables remembered
_SPAN = 18  # octaves between the smallest and the largest frequency


@dataclass(frozen=True)
class Table:
    """Frequencies and how they are written.

    Attributes:
        kind: number in the stream.
        bits: the frequencies sum to ``2**bits``.
        symbols: those with a frequency, ascending.
        frequencies: theirs.
        data: the bytes that say so.
        payload: bytes of the coded symbols, by the code length (no states).
    """

    kind: int
    bits: int
    symbols: Ints
    frequencies: Ints
    data: bytes
    payload: float


def best_table(counts: Ints) -> Table | None:
    """The table for a histogram with two symbols or more that gives the shortest stream.

    ``None`` when there are too many symbols for 16-bit frequencies.
    """
    # The codes of a tensor have one histogram in all its layouts, and are measured, then written.
    return _remembered(counts.tobytes()) if len(counts) <= _KEPT else _best_table(counts)


@lru_cache(maxsize=64)
def _remembered(counts: bytes) -> Table | None:
    return _best_table(np.frombuffer(counts, np.int64))


def _best_table(counts: Ints) -> Table | None:
    used = np.flatnonzero(counts)
    if len(used) > _MOST:
        return None
    occurrences = counts[used]
    total = int(occurrences.sum())
    least = max(12, (len(used) - 1).bit_length())
    # A symbol rarer than a few in 2**bits has a coarse share: finer frequencies help.
    rare = int(occurrences.min()) << least < 16 * total
    sizes = [least, *range(max(14, least + 1), 17)] if rare else [least]
    head = BitWriter()
    write_used(head, used)
    found = [_log_table(head, used, occurrences, sizes[-1], step) for step in _STEPS]
    if len(counts) <= _MIXED and total <= 1 << 17:
        found += _mixtures(counts, used, occurrences, sizes[-1])
    best = min(found, key=_size)
    weights, data = best.weights, best.write()
    tables = []
    for bits in sizes:
        frequencies = normalise(weights, bits)
        chances = frequencies[np.searchsorted(best.symbols, used)]
        payload = float((occurrences * (bits - np.log2(chances))).sum()) / 8
        payload *= 1 + 2.0 ** (bits - 26)  # states of 16 to 32 bits round more often
        tables.append(Table(best.kind, bits, best.symbols, frequencies, data, payload))
    # Decoding is faster with fewer bits.
    goal = min(t.payload for t in tables) * 1.0004
    return next(t for t in tables if t.payload <= goal)


@dataclass(frozen=True, eq=False)
class _Candidate:
    kind: int
    symbols: Ints
    weights: Ints
    bits: int  # of the table
    cost: float
    write: Callable[[], bytes]  # the table


def _size(candidate: _Candidate) -> float:
    return 8 * ((candidate.bits + 7) // 8) + candidate.cost


def _cost(occurrences: Ints, weights: Ints, bits: int) -> float:
    """Bits of the payload, about."""
    chance = weights / weights.sum()
    floor = 2.0**-bits
    small = chance < floor
    loss = float(small.sum()) * floor - float(chance[small].sum())
    return -float((occurrences * np.log2(np.maximum(chance * (1 - loss), floor))).sum())


def _log_table(head: BitWriter, used: Ints, occurrences: Ints, bits: int, step: int) -> _Candidate:
    levels = np.rint(step * np.log2(occurrences)).astype(np.int64)
    # What is rarer than the smallest frequency need not be told apart.
    floor = int(np.floor(step * (np.log2(occurrences.sum()) - bits - 1)))
    levels = levels.clip(max(floor, int(levels.max()) - _SPAN * step))
    steps = np.diff(levels)

    def write() -> bytes:
        writer = BitWriter()
        writer.put(step.bit_length() - 1, 4)
        write_used(writer, used)
        write_signed(writer, steps)
        return writer.bytes()

    weights = log_weights(levels, step)
    size = 4 + head.bits + signed_bits(steps)
    return _Candidate(LOG, used, weights, size, _cost(occurrences, weights, bits), write)


def _mixtures(counts: Ints, used: Ints, occurrences: Ints, bits: int) -> list[_Candidate]:
    """One and two geometric distributions, fitted."""
    alphabet = len(counts)
    total = float(counts.sum())
    mean = float((counts * np.arange(alphabet)).sum()) / total
    density = 1 / (1 + mean)
    out = []
    one = _quantised([(1.0, density)])
    # The escape hides the mean of a long tail: look around.
    tried = [[(256, (one[0][1] + d) % (MIX_LIMIT + 1))] for d in range(-6, 25, 3)]
    tried.append(_quantised(_expectation(counts, density)))
    for parts in tried:
        symbols = np.arange(int(used[-1]) + 1)
        weights = geometric_weights(parts, alphabet, len(symbols))
        writer = BitWriter()
        writer.golomb(np.array([len(symbols) - 1]), 4)
        for i, (share, t) in enumerate(parts):
            if i < len(parts) - 1:
                writer.put(share - 1, 8)
            writer.put(t, 9)
        kind = _MIX1 if len(parts) == 1 else _MIX2
        cost = _cost(counts[: len(symbols)], weights, bits)
        out.append(_Candidate(kind, symbols, weights, writer.bits, cost, writer.bytes))
    return out


def _quantised(parts: list[tuple[float, float]]) -> list[tuple[int, int]]:
    """Shares in 1/256 that sum to 1, and the logarithms of the densities."""
    shares = [min(255, max(1, round(256 * share))) for share, _ in parts[:-1]]
    shares.append(256 - sum(shares))
    levels = [min(MIX_LIMIT, max(0, round(-MIX_STEPS * np.log2(d)))) for _, d in parts]
    return list(zip(shares, levels, strict=True))


def _expectation(counts: Ints, density: float) -> list[tuple[float, float]]:
    """Two geometric distributions by expectation maximisation."""
    gaps = np.arange(len(counts))
    share = np.array([0.5, 0.5])
    chance = np.array([min(0.9, 2 * density), density / 2])
    for _ in range(30):
        likely = share[:, None] * chance[:, None] * (1 - chance[:, None]) ** gaps + 1e-300
        weight = counts * likely / likely.sum(0)
        mass = weight.sum(1) + 1e-9
        share = mass / mass.sum()
        chance = (mass / (mass + (weight * gaps).sum(1))).clip(1e-4, 0.999)
    return [(float(s), float(c)) for s, c in zip(share, chance, strict=True)]


def read_table(
    reader: BitReader, kind: int, bits: int, alphabet: int, count: int
) -> tuple[Ints, Ints]:
    """Symbols and their frequencies, of sum ``2**bits``."""
    if kind == LOG:
        return _read_log(reader, bits, alphabet, count)
    if kind not in (_MIX1, _MIX2) or alphabet > _MIXED:
        raise FormatError(f"rANS data of unknown kind {kind}")
    used = int(reader.golomb(1, 4)[0]) + 1
    if not 2 <= used <= alphabet:
        raise FormatError(f"a table of {used} symbols for an alphabet of {alphabet}")
    share = reader.get(8) + 1 if kind == _MIX2 else 256
    parts = [(share, reader.get(9))]
    if kind == _MIX2:
        parts.append((256 - share, reader.get(9)))
    if any(t > MIX_LIMIT for _, t in parts):
        raise FormatError(f"a geometric distribution of density 2**-{parts[0][1] / MIX_STEPS:g}")
    weights = geometric_weights(parts, alphabet, used)
    return np.arange(used), normalise(weights, bits)


def _read_log(reader: BitReader, bits: int, alphabet: int, count: int) -> tuple[Ints, Ints]:
    step = reader.get(4)
    if step > 8:
        raise FormatError(f"frequencies in steps of 2**-{step} octave")
    used = read_used(reader, alphabet, min(count, 1 << bits))
    if len(used) < 2:
        raise FormatError("a table of one symbol")
    levels = np.concatenate([[0], np.cumsum(read_signed(reader, len(used) - 1))])
    if int(np.ptp(levels)) > _SPAN << step:
        raise FormatError(f"frequencies over more than {_SPAN} octaves")
    return used, normalise(log_weights(levels, 1 << step), bits)
