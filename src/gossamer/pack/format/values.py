"""What a tensor's values look like: bit patterns, zeros, distinct values, ranks.

Everything works on bit patterns, so every dtype, NaN payload and negative zero round-trips: only
the all-zero pattern (+0) is "zero", and two values are equal when their bits are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.pack.coders.bits import histogram

__all__ = ["BY_CODE", "BY_TORCH", "Bits", "DType", "Values", "analyse", "nonfinite", "to_bits"]

Bits = NDArray[np.unsignedinteger]

MAX_DISTINCT = 1 << 16
"""Above this many distinct values a tensor has no code book."""

_SAMPLE = 1 << 14
_CHUNK = 1 << 17
_HASHED = 2000  # distinct values up to which a collision-free hash is looked for


@dataclass(frozen=True)
class DType:
    """A storable element type.

    Attributes:
        code: its number in the file.
        torch: the torch dtype.
        kind: ``float`` (sign and magnitude), ``signed`` (two's complement) or ``unsigned``.
        size: bytes.
        exponent: for ``float``, the mask of the exponent bits (all set: NaN or infinity); 0 if
            the type has no infinity.
    """

    code: int
    torch: torch.dtype
    kind: Literal["float", "signed", "unsigned"]
    size: int
    exponent: int = 0

    @property
    def name(self) -> str:
        """As torch prints it, without the prefix."""
        return str(self.torch).removeprefix("torch.")

    @property
    def bits(self) -> np.dtype[np.unsignedinteger]:
        """The unsigned integer of the same size."""
        return np.dtype(f"<u{self.size}")

    @property
    def sign(self) -> int:
        """The mask of the sign bit, 0 for unsigned types."""
        return 0 if self.kind == "unsigned" else 1 << (8 * self.size - 1)

    def keys(self, bits: Bits) -> Bits:
        """Bit patterns as unsigned integers that sort like the values (-0 just below +0)."""
        sign = bits.dtype.type(self.sign)
        if self.kind == "float":
            return np.where(bits & sign, ~bits, bits | sign)
        return bits ^ sign

    def from_keys(self, keys: Bits) -> Bits:
        """The inverse of :meth:`keys`."""
        sign = keys.dtype.type(self.sign)
        if self.kind == "float":
            return np.where(keys & sign, keys ^ sign, ~keys)
        return keys ^ sign

    def negatives(self, bits: Bits) -> int:
        """How many patterns have the sign bit."""
        return int(np.count_nonzero(bits & bits.dtype.type(self.sign)))


_TABLE = (
    DType(0, torch.float32, "float", 4, 0x7F800000),
    DType(1, torch.float16, "float", 2, 0x7C00),
    DType(2, torch.bfloat16, "float", 2, 0x7F80),
    DType(3, torch.float64, "float", 8, 0x7FF0000000000000),
    DType(4, torch.int8, "signed", 1),
    DType(5, torch.int16, "signed", 2),
    DType(6, torch.int32, "signed", 4),
    DType(7, torch.int64, "signed", 8),
    DType(8, torch.uint8, "unsigned", 1),
    DType(9, torch.bool, "unsigned", 1),
    DType(10, torch.uint16, "unsigned", 2),
    DType(11, torch.uint32, "unsigned", 4),
    DType(12, torch.uint64, "unsigned", 8),
    DType(13, torch.float8_e5m2, "float", 1, 0x7C),
    DType(14, torch.float8_e4m3fn, "float", 1),
)
BY_CODE = {d.code: d for d in _TABLE}
BY_TORCH = {d.torch: d for d in _TABLE}
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def to_bits(name: str, tensor: Tensor) -> tuple[DType, Bits]:
    """The dtype and the flat bit patterns of a tensor, in C order (a view where possible).

    Raises :class:`ArgumentError` for a dtype, layout or device that cannot be stored.
    """
    dtype = BY_TORCH.get(tensor.dtype)
    if dtype is None:
        fix = "pass torch.view_as_real(tensor)" if tensor.is_complex() else "convert it first"
        raise ArgumentError(
            f"tensor {name!r} is {tensor.dtype}, which a .gsm file cannot hold; {fix}. "
            f"Allowed: {', '.join(d.name for d in _TABLE)}"
        )
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        kind = "a nested tensor" if tensor.is_nested else kind
        raise ArgumentError(f"tensor {name!r} is {kind}; pass a dense tensor with data")
    flat = tensor.detach().resolve_neg().cpu().contiguous().reshape(-1)
    return dtype, flat.view(_SIGNED[dtype.size]).numpy().view(dtype.bits)


def from_bits(bits: Bits, dtype: DType, shape: tuple[int, ...]) -> Tensor:
    """A tensor over the same memory as ``bits``."""
    signed = np.ascontiguousarray(bits).view(f"<i{dtype.size}")
    return torch.from_numpy(signed).view(dtype.torch).reshape(shape)


def nonfinite(bits: Bits, dtype: DType) -> int:
    """How many patterns are NaN or infinite."""
    if dtype.torch == torch.float8_e4m3fn:
        return int(np.count_nonzero((bits & np.uint8(0x7F)) == 0x7F))
    if not dtype.exponent:
        return 0
    mask = bits.dtype.type(dtype.exponent)
    parts = (bits[i : i + _CHUNK] for i in range(0, len(bits), _CHUNK))
    return sum(int(np.count_nonzero((part & mask) == mask)) for part in parts)


@dataclass(frozen=True, eq=False)
class Values:
    """A tensor seen as zeros and distinct non-zero values.

    Attributes:
        dtype: its element type.
        shape: its shape.
        bits: flat bit patterns, C order.
        positions: where ``bits`` is not zero, ascending.
        book: the distinct non-zero patterns in ascending order of value, or ``None`` when there
            are too many for a code book.
        codes: index into ``book`` of each non-zero, in order of position.
        counts: occurrences of each entry of ``book``.
    """

    dtype: DType
    shape: tuple[int, ...]
    bits: Bits
    positions: NDArray[np.int64]
    book: Bits | None
    codes: Bits | None
    counts: NDArray[np.int64] | None

    @property
    def rows(self) -> int:
        """First dimension; 1 for vectors and scalars."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def cols(self) -> int:
        """Everything but the first dimension."""
        return len(self.bits) // self.rows if self.rows else 0

    @property
    def kernel(self) -> int:
        """Entries of the innermost spatial kernel: kh * kw of a convolution, else 1."""
        return int(np.prod(self.shape[2:])) if len(self.shape) > 2 else 1

    @property
    def negatives(self) -> int:
        """Entries of ``book`` with the sign bit."""
        return self.dtype.negatives(self.book) if self.book is not None else 0


def analyse(bits: Bits, dtype: DType, shape: tuple[int, ...]) -> Values:
    """Find the zero structure and the code book of a tensor's bit patterns."""
    positions = np.flatnonzero(bits != 0)  # of bools: the fast way
    nonzero = bits if len(positions) == len(bits) else bits[positions]
    found = distinct(nonzero, dtype, min(MAX_DISTINCT, max(16, len(nonzero) // 2)))
    if found is None:
        return Values(dtype, shape, bits, positions, None, None, None)
    book, codes = found
    counts = histogram(codes, len(book)) if len(codes) else np.zeros(0, np.int64)
    return Values(dtype, shape, bits, positions, book, codes, counts)


def distinct(bits: Bits, dtype: DType, limit: int) -> tuple[Bits, Bits] | None:
    """The distinct patterns in order of value, and each pattern's index; ``None`` above ``limit``.

    One pass: a table, begun from a sample, maps a pattern to its number; patterns it does not
    know yet are added as they turn up.
    """
    if len(bits) == 0:
        return bits, np.zeros(0, np.uint8)
    known = np.unique(bits[:: max(1, len(bits) // _SAMPLE)])
    if len(known) > limit or (len(bits) > 4 * _SAMPLE and len(known) > _SAMPLE // 2):
        return None
    table = _Table(known)
    codes = np.empty(len(bits), np.uint16)
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK]
        found = table.look_up(chunk)
        missed = known[found] != chunk
        if missed.any():
            # Numbers already given out stay: new patterns go to the end.
            known = np.concatenate([known, np.unique(chunk[missed])])
            if len(known) > limit:
                return None
            table = _Table(known)
            found = table.look_up(chunk)
        codes[start : start + len(chunk)] = found
    order = np.argsort(dtype.keys(known))
    kind: type[np.unsignedinteger] = np.uint8 if len(known) <= 256 else np.uint16
    place = np.empty(len(known), kind)
    place[order] = np.arange(len(known), dtype=kind)
    return known[order], place[codes]


class _Table:
    """Pattern -> its index in ``known``; an unknown pattern gets some index."""

    def __init__(self, known: Bits) -> None:
        self.bits = 8 * known.dtype.itemsize
        self.slots: NDArray[np.uint16] | None = None
        self.multiplier, self.shift = known.dtype.type(1), known.dtype.type(0)
        if self.bits <= 16:
            self._fill(known, known)
        elif len(known) <= _HASHED:
            rng = np.random.default_rng(0)
            for width in (12, 14, 16, 18, 20, 22):
                self.shift = known.dtype.type(self.bits - width)
                for _ in range(4):
                    self.multiplier = rng.integers(0, 1 << self.bits, dtype=known.dtype) | 1
                    hashed = known * self.multiplier >> self.shift
                    if len(np.unique(hashed)) == len(known):
                        self._fill(known, hashed)
                        return
        if self.slots is None:
            self.order = np.argsort(known)
            self.ordered = known[self.order]

    def _fill(self, known: Bits, hashed: Bits) -> None:
        self.slots = np.zeros(1 << (self.bits - int(self.shift)), np.uint16)
        self.slots[hashed] = np.arange(len(known))

    def look_up(self, chunk: Bits) -> NDArray[np.integer]:
        if self.slots is None:
            found = np.searchsorted(self.ordered, chunk)
            return self.order[np.minimum(found, len(self.order) - 1)]
        if self.bits > 16:
            chunk = chunk * self.multiplier >> self.shift
        return self.slots[chunk]
