"""A weight as its entries that are not zero: what the sparse kernels pack, dense or from a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.core.errors import ArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Entries", "entries_of"]


class Entries:
    """The entries of an array that are not zero, in C order.

    Attributes:
        shape: of the array.
        places: whole numbers, ascending: where each is in the flat array.
        values: of the same length, none of them zero; their type is the array's.
    """

    def __init__(
        self, shape: Sequence[int], places: NDArray[np.integer[Any]], values: NDArray[Any]
    ) -> None:
        self.shape, self.places, self.values = tuple(shape), places, values

    @property
    def size(self) -> int:
        """Of the array."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """The fraction that is not zero."""
        return len(self.places) / max(1, self.size)

    def reshaped(self, *shape: int) -> Entries:
        """The same in another shape of the same size."""
        if math.prod(shape) != self.size:
            raise ArgumentError(f"shape {shape} has another size than {self.shape}")
        return Entries(shape, self.places, self.values)


def entries_of(name: str, value: Any, dtype: Any, dims: int) -> Entries:
    """The entries of an array, or entries as they are.

    Raises :class:`ArgumentError` for another dtype, another number of dimensions than ``dims``, an
    empty array, and entries that are NaN or infinite.
    """
    wanted = np.dtype(dtype)
    held = value.values if isinstance(value, Entries) else value
    if not isinstance(held, np.ndarray) or held.dtype != wanted:
        kind = held.dtype if isinstance(held, np.ndarray) else type(value).__name__
        raise ArgumentError(f"{name} must be a numpy array of {wanted}, not {kind}")
    if len(value.shape) != dims:
        text = ", ".join(["any"] * dims)
        raise ArgumentError(f"{name} has shape {value.shape}; allowed: ({text})")
    if not value.size:
        raise ArgumentError(f"{name} is empty: shape {value.shape}")
    if not isinstance(value, Entries):
        flat = np.ascontiguousarray(value).reshape(-1)
        places = np.flatnonzero(flat)
        value = Entries(value.shape, places, flat[places])
    if wanted.kind == "f" and not np.isfinite(value.values).all():
        raise ArgumentError(f"{name} has entries that are NaN or infinite; weights must be finite")
    found: Entries = value
    return found
