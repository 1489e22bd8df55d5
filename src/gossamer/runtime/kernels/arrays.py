"""What goes into a kernel: contiguous numpy arrays of one dtype, finite where weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self, dataclass_transform

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "LINEAR",
    "MOST_INPUTS",
    "RELU",
    "RELU6",
    "Clamp",
    "Packed",
    "array",
    "bounds",
    "called",
    "countable",
    "dot_products",
    "frozen",
    "pair",
    "weights",
]

Clamp = tuple[float, float]  # the least and the greatest that an output can be
LINEAR: Clamp = (-math.inf, math.inf)
RELU: Clamp = (0.0, math.inf)
RELU6: Clamp = (0.0, 6.0)

MOST_INPUTS = 65536
"""What 16 bits number; 2 * 127 * 127 times as much is below 2^31."""


@dataclass_transform(eq_default=False)
class Packed:
    """Base of packed weights: its parts, in the order in which a class names them; frozen.

    A dataclass takes longer to define than a network's layers to pack.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        names = list(type(self).__annotations__)
        parts = dict(zip(names, given, strict=False)) | named
        if len(parts) != len(given) + len(named) or parts.keys() != set(names):
            raise TypeError(f"{type(self).__name__} takes {', '.join(names)}, each once")
        self.__dict__.update(parts)
        self.check()

    def check(self) -> None:
        """Raise :class:`ArgumentError` where parts do not fit together."""
        raise NotImplementedError

    @classmethod
    def unchecked(cls, **parts: Any) -> Self:
        """From parts that were packed before; the compiled kernel checks what it reaches."""
        made = object.__new__(cls)
        made.__dict__.update(parts)
        return made

    @property
    def parts(self) -> dict[str, Any]:
        """Name -> what it is made of."""
        return {name: self.__dict__[name] for name in type(self).__annotations__}

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be set: packed weights stay")

    def __repr__(self) -> str:
        plain = {n: v for n, v in self.parts.items() if not isinstance(v, np.ndarray)}
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in plain.items())})"


def array(name: str, value: Any, dtype: Any, shape: Sequence[int | None]) -> NDArray[Any]:
    """``value``, contiguous; raises :class:`ArgumentError` for another dtype or shape.

    ``None`` in ``shape``: any length.
    """
    wanted = np.dtype(dtype)
    if not isinstance(value, np.ndarray) or value.dtype != wanted:
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise ArgumentError(f"{name} must be a numpy array of {wanted}, not {kind}")
    fits = len(shape) == value.ndim and all(
        want is None or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    if not fits:
        text = ", ".join("any" if n is None else str(n) for n in shape)
        raise ArgumentError(f"{name} has shape {value.shape}; allowed: ({text})")
    return np.ascontiguousarray(value)


def weights(name: str, value: Any, dims: int) -> NDArray[np.float32]:
    """A float32 weight of ``dims`` dimensions, none of them empty.

    Raises :class:`ArgumentError` for another dtype or shape, and for NaN and infinities.
    """
    found = array(name, value, np.float32, [None] * dims)
    if not found.size:
        raise ArgumentError(f"{name} is empty: shape {found.shape}")
    if not np.isfinite(found).all():
        raise ArgumentError(f"{name} has entries that are NaN or infinite; weights must be finite")
    return found


def countable(inputs: int) -> int:
    """How many inputs an output has, where 16 bits number them and sums of bytes fit 32 bits.

    Raises :class:`ArgumentError` beyond :data:`MOST_INPUTS`.
    """
    if inputs > MOST_INPUTS:
        raise ArgumentError(
            f"weight has {inputs} inputs an output; at most {MOST_INPUTS} are taken"
        )
    return inputs


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """Height and width of a setting of a convolution; :class:`ArgumentError` below ``least``."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or not all(isinstance(v, int) and v >= least for v in both):
        raise ArgumentError(f"{name}={value!r} must be one or two integers of at least {least}")
    return both[0], both[1]


def frozen(value: NDArray[Any]) -> NDArray[Any]:
    """The array, contiguous and read-only."""
    value = np.ascontiguousarray(value)
    value.flags.writeable = False
    return value


def bounds(clamp: Clamp) -> Clamp:
    """The pair as floats; :class:`ArgumentError` where it is none or descends."""
    low, high = (float(v) for v in clamp)
    if not low <= high:
        raise ArgumentError(f"clamp={clamp!r} must be (least, greatest)")
    return low, high


def called(
    shape: tuple[int, int], x: Any, bias: Any, clamp: Clamp, *, batch: bool = True
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, float, float]:
    """What a linear layer of ``shape`` (outputs, inputs) is called with: x, bias, bounds.

    Args:
        batch: x has the form (batch, inputs), else (inputs,).

    Raises :class:`ArgumentError` for another dtype or shape.
    """
    outputs, inputs = shape
    x = array("x", x, np.float32, (None, inputs) if batch else (inputs,))
    if bias is not None:
        bias = array("bias", bias, np.float32, (outputs,))
    return x, bias, *bounds(clamp)


def dot_products() -> bool:
    """Whether this processor multiplies and adds four bytes in one instruction.

    AVX-512 VNNI, or NEON with dot products.
    """
    module = kernel("sparse_conv")
    return module is not None and bool(module.dot_products())
