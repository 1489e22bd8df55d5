"""What tests of symbol coders and of sections share: symbols to code, and damage to the bytes."""

from typing import Any

import numpy as np
from hypothesis import strategies as st


def skewed(seed: int, alphabet: int, count: int, shape: float = 0.3) -> np.ndarray:
    """Random symbols, the more unlike in frequency the smaller ``shape`` is."""
    rng = np.random.default_rng(seed)
    chance = rng.gamma(shape, size=alphabet) + 1e-9
    return rng.choice(alphabet, count, p=chance / chance.sum())


@st.composite
def streams(draw: Any, most: int = 5000) -> tuple[int, np.ndarray]:
    """An alphabet, and up to ``most`` symbols of it."""
    alphabet = draw(st.one_of(st.integers(1, 300), st.integers(1, 70_000)))
    count = draw(st.integers(0, most))
    return alphabet, skewed(draw(st.integers(0, 99)), alphabet, count, draw(st.floats(0.01, 2)))


def damaged(data: st.DataObject, coded: bytes, *, flips: int, reach: int) -> bytes:
    """With 1 to ``flips`` of the first ``reach`` bytes changed, or cut short."""
    out = bytearray(coded)
    if not out or not data.draw(st.booleans()):
        return bytes(out[: data.draw(st.integers(0, len(out)))])
    for _ in range(data.draw(st.integers(1, flips))):
        at = data.draw(st.integers(0, min(len(out), reach) - 1))
        out[at] ^= data.draw(st.integers(1, 255))
    return bytes(out)


def mutated(data: st.DataObject, coded: bytes) -> bytes:
    """With 1 to 3 bytes set, or up to 4 put in at once."""
    out = bytearray(coded)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(out) - 1))
        if data.draw(st.booleans()):
            out[at] = data.draw(st.integers(0, 255))
        else:
            out[at:at] = data.draw(st.binary(min_size=1, max_size=4))
    return bytes(out)
