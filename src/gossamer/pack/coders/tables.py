"""Compact tables in front of entropy-coded symbols, and the arithmetic that gives frequencies.

Everything a decoder computes here is integer arithmetic, so tables mean the same on any machine.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import FormatError
from gossamer.pack.coders.bits import BitReader, BitWriter, golomb_best

__all__ = [
    "LOG_STEPS",
    "MIX_LIMIT",
    "MIX_STEPS",
    "geometric_weights",
    "log_weights",
    "normalise",
    "read_signed",
    "read_used",
    "signed_bits",
    "write_signed",
    "write_used",
]

Ints = NDArray[np.int64]

LOG_STEPS = 256
"""Finest step of a logarithmic weight: 1/256 of an octave."""

MIX_STEPS = 32
"""Densities of geometric distributions come in steps of 1/32 of an octave."""

MIX_LIMIT = 15 * MIX_STEPS
"""The sparsest: density 2**-15."""

_OCTAVES = 18
# 2**(15 + i / 256), rounded. None is within 1e-4 of a half, so any libm gives these integers.
_POWERS = np.rint(2.0 ** (15 + np.arange(LOG_STEPS) / LOG_STEPS)).astype(np.int64)


# Which symbols occur ------------------------------------------------------------------------------


def write_used(writer: BitWriter, used: Ints) -> None:
    """A non-empty ascending set of symbols."""
    gaps = np.diff(used, prepend=-1) - 1
    writer.golomb(np.array([len(used) - 1]), 4)
    k, _ = golomb_best(gaps)
    if gaps.any():
        writer.put(1, 1)
        writer.put(k, 3)
        writer.golomb(gaps, k)
    else:  # 0, 1, 2, ...
        writer.put(0, 1)


def read_used(reader: BitReader, alphabet: int, most: int) -> Ints:
    """The inverse of :func:`write_used`; :class:`FormatError` above ``alphabet`` or for more than
    ``most`` symbols."""
    count = int(reader.golomb(1, 4)[0]) + 1
    if count > min(alphabet, most):
        raise FormatError(f"a table of {count} symbols, at most {min(alphabet, most)} can be")
    if not reader.get(1):
        return np.arange(count)
    used = np.cumsum(reader.golomb(count, reader.get(3)) + 1) - 1
    # Each gap is below 2**40 and there are at most 2**20, so the sum did not overflow.
    if int(used[-1]) >= alphabet:
        raise FormatError(f"a table names symbol {used[-1]} of an alphabet of {alphabet}")
    return used


def write_signed(writer: BitWriter, values: Ints) -> None:
    """Small integers of either sign."""
    folded = _folded(values)
    k, _ = golomb_best(folded)
    writer.put(k, 3)
    writer.golomb(folded, k)


def signed_bits(values: Ints) -> int:
    """What :func:`write_signed` writes."""
    return 3 + golomb_best(_folded(values))[1]


def _folded(values: Ints) -> Ints:
    return np.where(values >= 0, 2 * values, -2 * values - 1)


def read_signed(reader: BitReader, count: int) -> Ints:
    """The inverse of :func:`write_signed`."""
    folded = reader.golomb(count, reader.get(3))
    return np.where(folded & 1, -(folded >> 1) - 1, folded >> 1)


# Weights ------------------------------------------------------------------------------------------


def log_weights(levels: Ints, step: int) -> Ints:
    """``2**(levels / step)``, scaled so that the smallest level gives ``2**15``.

    ``step`` is a power of two up to 256. Levels more than 18 octaves below the top count as that.
    """
    scaled = (levels - max(int(levels.min()), int(levels.max()) - _OCTAVES * step)).clip(0)
    return _POWERS[(scaled % step) * (LOG_STEPS // step)] << (scaled // step)


def geometric_weights(parts: list[tuple[int, int]], alphabet: int, used: int) -> Ints:
    """Weights of a mixture of geometric distributions: gaps between random positions.

    Symbols ``0 .. used - 1`` have them, and the last of the ``alphabet`` the tail beyond all
    others, being an escape, when ``used`` is the whole alphabet.

    Args:
        parts: of each distribution the share (1 to 256) and the density ``2**(-t / 32)`` as t, 0 to
            480.
        alphabet: number of symbols.
        used: how many from the first on occur.
    """
    out = np.zeros(used, np.int64)
    for share, t in parts:
        weights = _geometric(t, alphabet)[:used]
        out += share * weights
        if used == alphabet:
            out[-1] += share * ((1 << 30) - int(weights.sum()))
    return (out >> 8) + 1


@lru_cache(maxsize=2 * (MIX_LIMIT + 1))
def _geometric(t: int, alphabet: int) -> Ints:
    """Of the symbols 0 .. ``alphabet`` - 1, of 2**30 in all."""
    # The density, and the chance to be beyond the symbols seen so far, both in 2**-30.
    octaves, fraction = divmod(MIX_LIMIT - t, MIX_STEPS)
    density = int(_POWERS[fraction * (LOG_STEPS // MIX_STEPS)]) << octaves
    rest, weights = 1 << 30, []
    for _ in range(alphabet):
        weights.append(rest * density >> 30)
        rest -= weights[-1]
    return np.array(weights, np.int64)


def normalise(weights: Ints, bits: int) -> Ints:
    """Frequencies of sum ``2**bits``, each at least 1, in proportion to positive ``weights``.

    Weights are below 2**40, their sum below 2**56, and there are at most ``2**bits``, 16 bits.

    >>> normalise(np.array([1000, 10, 1]), 4).tolist()
    [14, 1, 1]
    """
    left = 1 << bits
    out = np.ones(len(weights), np.int64)
    free = np.ones(len(weights), np.bool_)
    while True:
        share = int(weights[free].sum())
        # Those whose fair share is below 1 get 1, and the others divide what is left.
        small = free & (weights < -(-share // left))
        if not small.any():
            break
        free &= ~small
        left -= int(small.sum())
    heavy = weights[free]
    base = heavy * left // share
    # Another unit is worth weight * log(1 + 1 / f), nearly weight / (f + 1/2), bits.
    worth = (heavy << 22) // (2 * base + 1)
    base[np.argsort(-worth, kind="stable")[: left - int(base.sum())]] += 1
    out[free] = base
    return out
