"""An array of a packed plan's file as few bytes: entropy-coded bytes, values or blocks.

A part is a byte for its form and what the form says:

- 0 ``plain``: the bytes as they are;
- 1 ``planes``: the first byte of every element, then the second, and so on, each coded by rANS;
- 2 ``values``: how many different elements there are less one, those, ascending by their bits, and
  each one's number by rANS;
- 3 ``blocks``, of int8 convolutions' codes: for each 1 x 4 block along the input channels, output
  by output, whether it has a code that is not zero, by rANS; and all four codes of those that have,
  by rANS as 0, -1, 1, -2, ...;
- 4 ``noise``: nothing; the example's inputs, which are drawn from nothing (:func:`noise`).

rANS is :mod:`gossamer.pack.coders.ans`'s.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from gossamer.pack.coders.ans import Rans
from gossamer.pack.coders.limits import Reader, varint

__all__ = ["noise", "packed", "unpacked"]

Array = np.ndarray
_PLAIN, _PLANES, _VALUES, _BLOCKS, _NOISE = range(5)
_BLOCK = 4
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_RANS = Rans()


def noise(shape: Sequence[int]) -> Array:
    """Float32 values from -2 to 2, always the same ones: SHAKE-128 of nothing, byte by byte."""
    data = hashlib.shake_128(b"").digest(math.prod(shape))
    values: Array = np.frombuffer(data, np.uint8).astype(np.float32)
    return ((values - 127.5) / 63.75).astype(np.float32).reshape(shape)


def packed(array: Array) -> bytes:
    """The shortest form of an array."""
    array = np.ascontiguousarray(array)
    if array.dtype == np.float32 and array.size and np.array_equal(array, noise(array.shape)):
        return bytes([_NOISE])
    found = [bytes([_PLAIN]) + array.tobytes()]
    if array.size:
        words = array.reshape(-1).view(_WORDS[array.itemsize])
        found.append(bytes([_PLANES]) + _planes(words))
        values, numbers = np.unique(words, return_inverse=True)
        if len(values) <= 256:
            book = bytes([_VALUES, len(values) - 1]) + values.tobytes()
            found.append(book + _RANS.encode(numbers.astype(np.uint8), len(values)))
        if array.dtype == np.int8 and array.ndim == 4 and not array.shape[1] % _BLOCK:
            found.append(bytes([_BLOCKS]) + _blocks(array))
    return min(found, key=len)


def unpacked(part: bytes | memoryview, dtype: str, shape: Sequence[int], where: str) -> Array:
    """The array of :func:`packed`.

    Raises :class:`~gossamer.core.errors.FormatError` for bytes that are none; ``where``: for the
    message.
    """
    reader, kind, count = Reader(part, where), np.dtype(dtype), math.prod(shape)
    form = reader.u8("the form of an array")
    if form == _NOISE and kind == np.float32:
        found: Array = noise(shape)
    elif form == _PLAIN:
        found = np.frombuffer(reader.take(count * kind.itemsize, "an array"), kind)
    elif form == _PLANES:
        planes = np.empty((count, kind.itemsize), np.uint8)
        for i in range(kind.itemsize):
            planes[:, i] = _RANS.decode(reader.block("a plane"), count, 256)
        found = planes.reshape(-1).view(kind)
    elif form == _VALUES:
        size = reader.u8("the number of values") + 1
        book = np.frombuffer(reader.take(size * kind.itemsize, "the values"), kind)
        found = book[_RANS.decode(reader.rest(), count, size)]
    elif form == _BLOCKS and kind == np.int8 and len(shape) == 4 and not shape[1] % _BLOCK:
        found = _unblocked(reader, shape)
    else:
        raise reader.fail(f"form {form} of an array of {dtype} {list(shape)}")
    reader.done()
    return found.reshape(shape)


def _planes(words: Array) -> bytes:
    width, data = words.itemsize, words.view(np.uint8)
    each = [_RANS.encode(np.ascontiguousarray(data[i::width]), 256) for i in range(width)]
    return b"".join(varint(len(data)) + data for data in each)


def _blocks(codes: Array) -> bytes:
    o, i, h, w = codes.shape
    runs = codes.reshape(o, i // _BLOCK, _BLOCK, h, w).transpose(0, 1, 3, 4, 2).reshape(-1, _BLOCK)
    live: Array = np.asarray(runs.any(axis=1))
    values = runs[live].reshape(-1).astype(np.int16)
    signs = np.where(values < 0, -2 * values - 1, 2 * values).astype(np.uint8)
    largest = int(signs.max(initial=0))
    mask = _RANS.encode(live.astype(np.uint8), 2)
    return (
        varint(len(mask)) + mask + varint(len(signs)) + bytes([largest])
        + _RANS.encode(signs, largest + 1)
    )  # fmt: skip


def _unblocked(reader: Reader, shape: Sequence[int]) -> Array:
    o, i, h, w = shape
    quads = i // _BLOCK
    live = _RANS.decode(reader.block("the blocks"), o * quads * h * w, 2) != 0
    count = reader.varint("the number of codes", _BLOCK * len(live))
    if count != _BLOCK * np.count_nonzero(live):
        raise reader.fail(f"{count} codes in {np.count_nonzero(live)} blocks")
    largest = reader.u8("the largest code")
    signs = _RANS.decode(reader.rest(), count, largest + 1).astype(np.int16)
    runs = np.zeros((len(live), _BLOCK), np.int8)
    runs[live] = np.where(signs & 1, -(signs >> 1) - 1, signs >> 1).reshape(-1, _BLOCK)
    return np.ascontiguousarray(runs.reshape(o, quads, h, w, _BLOCK).transpose(0, 1, 4, 2, 3))
