"""Quantized weights on the wire: a table of the values there are, and its indices in a few bits.

A tensor of up to 256 different values is one byte with the bits of an index, b = ceil(log2(count)),
2^b float32 values (unused ones zero) and, for each of the b bits, lowest first, one bit an element,
eight a byte, lowest first. One of more values is a byte 32 and the float32 values. Every bit of
a value survives, whatever quantizer made it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.core.names import Tensors

__all__ = ["pack_values", "unpack_values"]

_RAW = 32
_MOST = 256


def pack_values(tensors: Mapping[str, Tensor]) -> Tensor:
    """Float32 tensors one after the other, uint8.

    >>> ternary = {"w": torch.tensor([0.5, 0.0, -0.5, 0.5]).repeat(100)}
    >>> pack_values(ternary).numel()  # 1 + 4 * 4 + 2 * 50
    117
    """
    parts = [_pack(t.detach().reshape(-1).contiguous().numpy()) for t in tensors.values()]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *parts]))


def _pack(values: np.ndarray) -> np.ndarray:
    # as integers: a value is its bits, negative zero and NaN included
    table, index = np.unique(values.view(np.uint32), return_inverse=True)
    if len(table) > _MOST or not values.size:
        return np.concatenate([np.array([_RAW], np.uint8), values.view(np.uint8)])
    bits = (len(table) - 1).bit_length()
    padded = np.zeros(1 << bits, np.uint32)
    padded[: len(table)] = table
    planes = [np.packbits((index >> b & 1).astype(bool), bitorder="little") for b in range(bits)]
    return np.concatenate([np.array([bits], np.uint8), padded.view(np.uint8), *planes])


def unpack_values(packed: Tensor, shapes: Mapping[str, Sequence[int]]) -> Tensors:
    """The inverse of :func:`pack_values`, for tensors of these names and shapes.

    Raises :class:`~gossamer.core.errors.FormatError` for bytes that cannot be.
    """
    data, at = packed.numpy(), 0

    def take(count: int) -> np.ndarray:
        nonlocal at
        if at + count > len(data):
            raise FormatError(f"packed values end after {len(data)} bytes, {at + count} are needed")
        at += count
        return data[at - count : at]

    found: Tensors = {}
    for name, shape in shapes.items():
        numel = int(np.prod(shape, dtype=np.int64))
        bits = int(take(1)[0])
        if bits == _RAW:
            values = take(4 * numel).copy().view(np.float32)
        elif bits > 8:
            raise FormatError(f"an index of {bits} bits for {name}; there are 0 to 8, and 32")
        else:
            table = take(4 << bits).copy().view(np.float32)
            index = np.zeros(numel, np.uint8)
            for b in range(bits):
                plane = np.unpackbits(take(-(-numel // 8)), count=numel, bitorder="little")
                index |= plane << b
            values = table[index]
        found[name] = torch.from_numpy(values).reshape(tuple(shape))
    if at != len(data):
        raise FormatError(f"{len(data) - at} bytes follow the packed values")
    return found
