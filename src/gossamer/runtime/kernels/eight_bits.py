"""8-bit activations of seven bits: scales, zero points, and channels in quads.

A value is ``scale * (code - zero)`` with a code of 0 to 127. Seven bits, so that bytes multiplied
in pairs never saturate 16 bits and every processor gives the same integers. Maps keep four channels
of a pixel together (*quads*, one 32-bit element): (batch, quads, height, width, 4); channels that
fill the last quad up are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.runtime.kernels.arrays import array

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TOP", "Scale", "dequantize", "from_quads", "quantize", "to_quads"]

TOP = 127  # the greatest code


@dataclass(frozen=True)
class Scale:
    """What the codes of a tensor mean: ``scale * (code - zero)``.

    Raises :class:`ArgumentError` for a scale that is not positive and finite or a zero point
    outside 0 to 127.
    """

    scale: float
    zero: int

    def __post_init__(self) -> None:
        """Refuse what no tensor has."""
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ArgumentError(f"scale={self.scale} must be positive and finite")
        if not 0 <= self.zero <= TOP:
            raise ArgumentError(f"zero={self.zero} must be 0 to {TOP}")

    @classmethod
    def of(cls, low: float, high: float) -> Scale:
        """The scale of values in [low, high], which is widened to hold 0.

        >>> Scale.of(0, 254)
        Scale(scale=2.0, zero=0)
        """
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ArgumentError(f"range ({low}, {high}) must be finite")
        scale = (high - low) / TOP or 1.0
        return cls(scale, round(-low / scale))


def quantize(x: NDArray[np.float32], scale: Scale) -> NDArray[np.uint8]:
    """Codes of float32 values, to the nearest (ties to even), clamped to 0 to 127.

    Raises :class:`ArgumentError` for another dtype and for NaN.
    """
    x = array("x", x, np.float32, [None] * np.ndim(x))
    codes = np.rint(x * np.float32(1 / scale.scale)) + np.float32(scale.zero)
    if np.isnan(codes).any():
        raise ArgumentError("x has NaN, which no code stands for")
    return np.clip(codes, 0, TOP).astype(np.uint8)


def dequantize(codes: NDArray[np.uint8], scale: Scale) -> NDArray[np.float32]:
    """The values of codes."""
    return (codes.astype(np.float32) - np.float32(scale.zero)) * np.float32(scale.scale)


def to_quads(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(batch, channels, height, width) to (batch, quads, height, width, 4)."""
    codes = array("codes", codes, np.uint8, (None, None, None, None))
    n, c, h, w = codes.shape
    full: NDArray[Any] = np.zeros((n, -(-c // 4) * 4, h, w), np.uint8)
    full[:, :c] = codes
    return np.ascontiguousarray(full.reshape(n, -1, 4, h, w).transpose(0, 1, 3, 4, 2))


def from_quads(quads: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """The codes of so many channels, (batch, channels, height, width)."""
    quads = array("quads", quads, np.uint8, (None, -(-channels // 4), None, None, 4))
    n, q, h, w, _ = quads.shape
    codes = quads.transpose(0, 1, 4, 2, 3).reshape(n, 4 * q, h, w)
    return np.ascontiguousarray(codes[:, :channels])
