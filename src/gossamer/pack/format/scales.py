"""Integer codes times a scale for each row or group: weights of few bits, as quantizers leave them.

A row of weights that was rounded to ``b`` bits is ``k * scale`` with integers of ``b`` bits. Every
row has other values, so that one code book for the tensor is long and tells nothing; its codes
and its scales apart take what they are worth. Layout: ``docs/format.md`` ("Scaled").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from gossamer.pack.coders.limits import Reader, varint
from gossamer.pack.format.book import grid_values
from gossamer.pack.format.raw import decode_raw, encode_raw
from gossamer.pack.format.values import BY_CODE, BY_TORCH, Bits, DType

__all__ = ["CODES", "LEAST", "Scales", "as_rows", "read_scales", "scale_dtype", "scaled"]

CODES = {
    dtype.code: kind
    for dtype, kind in (
        (BY_TORCH[torch.int8], np.dtype("<i1")),
        (BY_TORCH[torch.int16], np.dtype("<i2")),
        (BY_TORCH[torch.float16], np.dtype("<f2")),
    )
}
"""Types of codes by their number; float16 has a negative zero, as rounding leaves it."""

LEAST = 4
"""Entries of a group at least, so that scales are no more than a quarter of the entries."""

_AT_ONCE = 1 << 18  # entries multiplied at once


@dataclass(frozen=True, eq=False)
class Scales:
    """Scales of groups of a tensor's entries.

    Attributes:
        axis: the dimension whose indices are rows.
        group: columns that share a scale; the last group of a row may have fewer.
        values: ``(rows, groups)``, positive and finite.
        codes: the type of the codes.
    """

    axis: int
    group: int
    values: NDArray[np.floating]
    codes: DType

    def __bytes__(self) -> bytes:
        """What comes before the section of the codes."""
        kind = BY_TORCH[torch.float64 if self.values.dtype.itemsize == 8 else torch.float32]
        coded = encode_raw(np.ascontiguousarray(self.values).view(kind.bits).reshape(-1), kind)
        head = bytes([self.codes.code, self.axis]) + varint(self.group)
        return head + varint(len(coded)) + coded


def scale_dtype(dtype: DType) -> DType:
    """The type of the scales of a tensor: float32, of a tensor of float64 that."""
    return dtype if dtype.size == 8 else BY_TORCH[torch.float32]


def read_scales(reader: Reader, dtype: DType, shape: tuple[int, ...]) -> Scales:
    """The head of a scaled section; FormatError where it does not fit the tensor."""
    if dtype.kind != "float" or dtype.size == 1:
        raise reader.fail(f"scales give floating point of two bytes and more, not {dtype.name}")
    code = reader.u8("type of the codes")
    if code not in CODES:
        raise reader.fail(f"codes of type {code}, allowed are {', '.join(map(str, CODES))}")
    axis = reader.u8("axis of the scales")
    if axis >= len(shape):
        raise reader.fail(f"scales along axis {axis} of a tensor of {len(shape)} dimensions")
    rows = shape[axis]
    cols = math.prod(shape) // rows
    group = reader.varint("entries of a scale", cols)
    if group < LEAST:
        raise reader.fail(f"{group} entries to a scale, at least {LEAST} there must be")
    kind, groups = scale_dtype(dtype), -(-cols // group)
    inner = Reader(reader.block("scales"), reader.where)
    bits = decode_raw(inner, kind, rows * groups)
    inner.done()
    values: NDArray[np.floating] = bits.view(f"<f{kind.size}").reshape(rows, groups)
    if not (np.isfinite(values) & (values > 0)).all():
        raise reader.fail("a scale is not positive and finite")
    return Scales(axis, group, values, BY_CODE[code])


_T = TypeVar("_T", bound=np.generic)


def as_rows(flat: NDArray[_T], shape: tuple[int, ...], axis: int) -> NDArray[_T]:
    """Entries as ``(rows, columns)`` with the indices of ``axis`` as rows; a view for axis 0."""
    moved = np.moveaxis(flat.reshape(shape), axis, 0)
    return moved.reshape(shape[axis], -1)


def scaled(scales: Scales, codes: Bits, dtype: DType, shape: tuple[int, ...], out: Bits) -> None:
    """Write codes times scales to ``out``, flat bit patterns in C order, some rows at a time."""
    k = as_rows(codes.view(CODES[scales.codes.code]), shape, scales.axis)
    rows, cols = k.shape
    whole = scales.axis == 0
    target = out.reshape(rows, cols) if whole else np.empty((rows, cols), dtype.bits)
    step = max(1, _AT_ONCE // cols)
    for start in range(0, rows, step):
        part = k[start : start + step]
        each = scales.values[start : start + step]
        if each.shape[1] > 1:
            each = np.repeat(each, scales.group, axis=1)[:, :cols]
        target[start : start + step] = product(part, each, dtype)
    if not whole:
        sizes = (shape[scales.axis], *shape[: scales.axis], *shape[scales.axis + 1 :])
        out.reshape(shape)[...] = np.moveaxis(target.reshape(sizes), 0, scales.axis)


def product(
    codes: NDArray[np.generic], scales: NDArray[np.floating], dtype: DType
) -> NDArray[np.unsignedinteger]:
    """Bit patterns of codes times scales: exact in double precision, rounded once."""
    if dtype.torch == torch.float32 and scales.dtype.itemsize == 4:
        # 24 and 11 digits: one rounding, and half the time
        with np.errstate(over="ignore", under="ignore"):
            return np.multiply(codes, scales, dtype=np.float32).view(np.uint32)
    return grid_values(codes, scales.astype(np.float64), dtype)
