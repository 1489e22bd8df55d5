"""Arrays as bytes of a plan's file: as they are, without zeros, or in few bits, whichever is least.

``dense``: the array. ``sparse``: a bitmap of what is not zero, and those values. ``few``: a byte
for the bits of a code (1, 2, 4), one for whether each row has a book of its own, the books, and the
codes from the lowest bit on. ``sparse few``: a bitmap, and its values as ``few``. Values are told
apart by their bits, so that zeros of both signs and NaN come back as they were. All but ``dense``
is for float32 and int8; none stands for more than 8 entries a byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gossamer.core.errors import FormatError

__all__ = ["coded", "decoded"]

Array = np.ndarray
_BITS = {"float32": np.uint32, "int8": np.uint8}  # types that are coded, and their bits
_FEWEST = 64  # entries below which an array stays as it is
_SAMPLE = 4096  # entries that must have few values before all are looked through
_STEP = 1 << 20  # codes that are looked up at a time


def coded(array: Array) -> tuple[str, bytes]:
    """(coding, bytes) of an array."""
    array = np.ascontiguousarray(array)
    plain = array.tobytes()
    if str(array.dtype) not in _BITS or array.size < _FEWEST:
        return "dense", plain
    bits = array.view(_BITS[str(array.dtype)]).reshape(len(array), -1)
    flat = bits.reshape(-1)
    found = {"dense": plain}
    parts = [_few(flat[None]), _few(bits) if len(bits) > 1 else None]
    if each := [p for p in parts if p is not None]:
        found["few"] = min(each, key=len)
    live = flat != 0
    if 2 * np.count_nonzero(live) < flat.size:
        bitmap = np.packbits(live).tobytes()
        found["sparse"] = bitmap + flat[live].tobytes()
        if live.any() and (few := _few(flat[live][None])) is not None:
            found["sparse few"] = bitmap + few
    return min(found.items(), key=lambda item: len(item[1]))


def _few(rows: Array) -> bytes | None:
    """Codes of a matrix, a book for each row; None where a row has more than 16 values."""
    from gossamer.runtime.kernels.row_books import row_values  # readers do without

    start = rows[:, :_SAMPLE][: max(1, _SAMPLE // rows.shape[1])]
    if row_values(start, 16) is None or (found := row_values(rows, 16)) is None:
        return None
    codes, values = found
    bits = 1 if values.shape[1] <= 2 else 2 if values.shape[1] <= 4 else 4
    book = np.zeros((len(rows), 1 << bits), rows.dtype)
    book[:, : values.shape[1]] = values
    each = 8 // bits
    full = np.zeros(-(-codes.size // each) * each, np.uint8)
    full[: codes.size] = codes.reshape(-1)
    packed = np.zeros(len(full) // each, np.uint8)
    for k in range(each):
        packed |= full[k::each] << np.uint8(bits * k)
    return bytes([bits, len(rows) > 1]) + book.tobytes() + packed.tobytes()


def decoded(dtype: str, shape: Sequence[int], coding: str, part: memoryview, where: str) -> Array:
    """The array of :func:`coded`.

    Raises :class:`FormatError` or :class:`ValueError` for bytes that are none; ``where``: for the
    message.
    """
    count = math.prod(shape)
    if coding == "dense":
        return np.frombuffer(part, dtype, count).reshape(shape)
    if coding not in ("sparse", "few", "sparse few") or dtype not in _BITS:
        raise FormatError(f"{where}: an array coded as {coding!r}")
    if coding == "few":
        return _looked_up(dtype, count, shape[0] if shape else 1, part, where).reshape(shape)
    size = -(-count // 8)
    if size > len(part):
        raise FormatError(f"{where}: a bitmap beyond its array")
    mask = np.unpackbits(np.frombuffer(part[:size], np.uint8), count=count).view(bool)
    if coding == "sparse":
        values = np.frombuffer(part[size:], dtype)
    else:
        values = _looked_up(dtype, int(np.count_nonzero(mask)), 1, part[size:], where)
    found = np.zeros(count, dtype)
    found[mask] = values  # as many as there are bits, or a ValueError
    return found.reshape(shape)


def _looked_up(dtype: str, count: int, rows: int, part: memoryview, where: str) -> Array:
    bits, apart = (part[0], part[1]) if len(part) >= 2 else (0, 0)
    books = rows if apart else 1
    size = (books << bits) * np.dtype(dtype).itemsize
    if bits not in (1, 2, 4) or apart > 1 or not books or (
        len(part) != 2 + size + -(-count * bits // 8)
    ):  # fmt: skip
        raise FormatError(f"{where}: codes of few bits that do not fit their array")
    book = np.frombuffer(part[2 : 2 + size], dtype)
    packed = np.frombuffer(part[2 + size :], np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    each, columns = len(shifts), max(1, count // books)
    found = np.empty(count, dtype)
    for start in range(0, count, _STEP):  # a multiple of what a byte holds
        end = min(start + _STEP, count)
        bytes_ = packed[start // each : -(-end // each)]
        codes = (bytes_[:, None] >> shifts).reshape(-1)[: end - start] & ((1 << bits) - 1)
        at = codes.astype(np.intp)
        if books > 1:
            at += np.arange(start, end) // columns << bits
        found[start:end] = book[at]
    return found
