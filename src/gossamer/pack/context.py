"""The context coder: the smallest file for a matrix of signed ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import ArgumentError, FormatError

__all__ = ["decode", "encode"]

LARGEST = 1 << 20
"""The largest magnitude of a rank."""


def encode(ranks: NDArray[np.signedinteger], kernel: int = 1) -> bytes:
    """Code ``ranks`` (rows, cols); ``cols`` is input channels times ``kernel`` (height x width)."""
    from gossamer._native import context

    if ranks.ndim != 2 or kernel < 1 or ranks.shape[1] % kernel:
        raise ArgumentError(
            f"ranks of shape {ranks.shape} with kernel {kernel}: want 2-D, columns a multiple "
            "of the kernel"
        )
    if ranks.size and max(int(ranks.max()), -int(ranks.min())) > LARGEST:
        raise ArgumentError(f"ranks reach beyond {LARGEST}; code this tensor without a code book")
    data: bytes = context.encode(np.ascontiguousarray(ranks, dtype=np.int32), kernel)
    return data


def decode(data: bytes, rows: int, cols: int, kernel: int = 1) -> NDArray[np.int32]:
    """The ranks (rows, cols) of :func:`encode`; FormatError when ``data`` is not their coding."""
    from gossamer._native import context

    try:
        ranks: NDArray[np.int32] = context.decode(bytes(data), rows, cols, kernel)
    except ValueError as e:
        raise FormatError(f"context stream of {len(data)} bytes: {e}") from e
    return ranks
