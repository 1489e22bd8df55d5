"""Random numbers of gradient codecs: counted, not drawn, so that any back end repeats them.

A :class:`Key` of (seed, step, rank, parameter) is mixed by splitmix64 (Steele, Lea, Flood, *Fast
Splittable Pseudorandom Number Generators*, OOPSLA 2014) into four 32-bit words k0..k3. With

    H(a, b, c):  x = c + a;  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;
                 x ^= b;  x *= 0x846ca68b;  x ^= x >> 16          (all modulo 2**32)

which is lowbias32 (C. Wellons, *Prospecting for Hash Functions*, 2018) with one key word before
and one in the middle (two keys never give shifted copies of one sequence), element e has

- the 16-bit word ``H(k0, k1, 16 (e // 32) + e % 16) >> 16 ((e // 16) % 2)``, low 16 bits,
- for ties, looked at once in 65536 elements, the 24 bits ``H(k2, k3, e) >> 8``.

Nothing depends on buckets, threads, devices or what was drawn before.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError

__all__ = ["Key", "dither_shift", "parameter_hash", "tie_words", "words"]

_M32 = 0xFFFFFFFF
_M64 = 0xFFFFFFFFFFFFFFFF
_ALL_RANKS = _M64  # what a key absorbs in place of a rank


def parameter_hash(name: str) -> int:
    """The first 64 bits of BLAKE2b of a clean parameter name, little-endian.

    >>> parameter_hash("fc1.weight") == parameter_hash("fc1.weight")
    True
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _splitmix(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & _M64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _M64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _M64
    return z ^ z >> 31


@dataclass(frozen=True)
class Key:
    """Names one stream of random words.

    Attributes:
        seed: 64 bits.
        step: number of the exchange, from 0, below 2**64.
        rank: of the worker, from 0; ``None`` where all ranks share the stream.
        parameter: 64 bits, :func:`parameter_hash` of the clean name.
        start: the element the stream begins at, a multiple of 64: that of a piece is part of the
            whole's.

    Raises :class:`ArgumentError` for anything else.
    """

    seed: int
    step: int
    rank: int | None
    parameter: int
    start: int = 0

    def __post_init__(self) -> None:
        """Check."""
        if not isinstance(self.start, int) or self.start < 0 or self.start % 64:
            raise ArgumentError(f"start={self.start!r} must be a multiple of 64 from 0")
        for name in ("seed", "step", "rank", "parameter"):
            value = getattr(self, name)
            if name == "rank" and value is None:
                continue
            if not isinstance(value, int) or not 0 <= value <= _M64:
                raise ArgumentError(f"{name}={value!r} must be a whole number from 0, below 2**64")

    def shared(self) -> Key:
        """The same key for all ranks, for the rank-shifted dither."""
        return replace(self, rank=None)

    @property
    def words(self) -> tuple[int, int, int, int]:
        """k0..k3, 32 bits each; counters are added to k0 and k2, and so is where they start."""
        state = self.seed
        for part in (self.step, _ALL_RANKS if self.rank is None else self.rank, self.parameter):
            state = _splitmix(state ^ _splitmix(part))
        one, two = _splitmix(state), _splitmix(state ^ _M64)
        k0, k2 = one + self.start // 2, two + self.start
        return k0 & _M32, one >> 32, k2 & _M32, two >> 32


def dither_shift(rank: int, world: int) -> int:
    """What rank r of N adds to a shared stream's 16-bit words: round(65536 r / N).

    >>> [dither_shift(r, 4) for r in range(4)]
    [0, 16384, 32768, 49152]
    """
    if world < 1 or not 0 <= rank < world:
        raise ArgumentError(f"rank={rank} must lie in 0..world-1, world={world} be 1 or more")
    return (2 * 65536 * rank + world) // (2 * world)


def _hash(counter: Tensor, a: int, b: int) -> Tensor:
    x = (counter + a) & _M32
    x ^= x >> 16
    x = (x * 0x7FEB352D) & _M32
    x ^= x >> 15
    x ^= b
    x = (x * 0x846CA68B) & _M32  # int64 wraps; the low half is right
    x ^= x >> 16
    return x


def words(key: Key, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The 16-bit words of elements ``start .. start + count``: int64, ``(count,)``."""
    k0, k1, _, _ = key.words
    e = torch.arange(start, start + count, dtype=torch.int64, device=device)
    x = _hash((e >> 5 << 4) + (e & 15), k0, k1)
    return x >> (e & 16) & 0xFFFF


def tie_words(key: Key, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The 24-bit words that decide ties, of the same elements: int64, ``(count,)``."""
    _, _, k2, k3 = key.words
    e = torch.arange(start, start + count, dtype=torch.int64, device=device)
    return _hash(e, k2, k3) >> 8
