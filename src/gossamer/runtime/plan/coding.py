"""Arrays as bytes of a plan's file: as they are, without zeros, or in few bits, whichever is least.

``dense``: the array. ``sparse``: a bitmap of what is not zero, and those values. ``few``: a byte
for the bits of a code (1, 2, 4), one for whether each row has a book of its own, the books, and the
codes from the lowest bit on. ``sparse few``: a bitmap, and its values as ``few``. Values are told
apart by their bits, so that zeros of both signs and NaN come back as they were. All but ``dense``
is for float32 and int8; none stands for more than 8 entries a byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gossamer.core.errors import FormatError
from gossamer.runtime.kernels.entries import Entries

__all__ = ["Coded", "coded"]

Array = np.ndarray
_BITS = {"float32": np.uint32, "int8": np.uint8}  # types that are coded, and their bits
_FEWEST = 64  # entries below which an array stays as it is
_SAMPLE = 4096  # entries that must have few values before all are looked through
_STEP = 1 << 20  # entries that are looked up at a time


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


class Coded:
    """An array as a file has it, decoded when it is asked for.

    Args:
        part: what :func:`coded` gave. Its length is checked here, so that what is decoded later is
            an array, whatever its values.
        where: for messages.

    Raises :class:`FormatError` for bytes that are none.
    """

    def __init__(
        self, dtype: str, shape: Sequence[int], coding: str, part: memoryview, where: str
    ) -> None:
        self.dtype, self.shape, self.coding = dtype, tuple(shape), coding
        self.size = math.prod(self.shape)
        if coding not in ("dense", "sparse", "few", "sparse few") or (
            coding != "dense" and dtype not in _BITS
        ):
            raise FormatError(f"{where}: an array of {dtype} coded as {coding!r}")
        self._part, self._bitmap, self._stored = part, part[:0], self.size
        if coding.startswith("sparse"):
            length = -(-self.size // 8)
            if length > len(part):
                raise FormatError(f"{where}: a bitmap beyond its array")
            self._bitmap, self._part = part[:length], part[length:]
            extra = -self.size % 8  # bits behind the last
            number = int.from_bytes(self._bitmap, "big") >> extra if length else 0
            self._stored = number.bit_count()
        if coding.endswith("few"):
            books = self.shape[0] if coding == "few" and self.shape else 1
            self._book, self._codes = _split(dtype, self._stored, books, self._part, where)
        elif len(self._part) != self._stored * np.dtype(dtype).itemsize:
            raise FormatError(f"{where}: an array of {len(part)} bytes, not what its shape needs")

    @property
    def density(self) -> float:
        """The fraction that is not zero."""
        if self.coding.startswith("sparse"):
            live = self._stored
        else:
            live = sum(int(np.count_nonzero(values)) for _, values in self._pieces())
        return live / max(1, self.size)

    def dense(self) -> Array:
        """The array, read-only where it lies in the file as it is."""
        if self.coding == "dense":
            return np.frombuffer(self._part, self.dtype, self.size).reshape(self.shape)
        stored = np.empty(self._stored, self.dtype)
        for start, values in self._pieces():
            stored[start : start + len(values)] = values
        if self.coding == "few":
            return stored.reshape(self.shape)
        mask = np.unpackbits(np.frombuffer(self._bitmap, np.uint8), count=self.size).view(bool)
        found = np.zeros(self.size, self.dtype)
        found[mask] = stored
        return found.reshape(self.shape)

    def entries(self) -> Entries:
        """What is not zero; memory is that of these entries, and a bounded piece of the rest."""
        kind: Any = np.int32 if self.size < 2**31 else np.int64
        if not self.coding.startswith("sparse"):
            places, values = [np.zeros(0, kind)], [np.zeros(0, self.dtype)]
            for start, part in self._pieces():
                live = np.flatnonzero(part)
                places.append((live + start).astype(kind))
                values.append(part[live])
            return Entries(self.shape, np.concatenate(places), np.concatenate(values))
        where, found, done = np.empty(self._stored, kind), np.empty(self._stored, self.dtype), 0
        for start in range(0, len(self._bitmap), _STEP // 8):
            bits = np.frombuffer(self._bitmap[start : start + _STEP // 8], np.uint8)
            bits = np.unpackbits(bits, count=min(_STEP, self.size - 8 * start))
            (live,) = bits.view(bool).nonzero()
            np.add(live, 8 * start, out=where[done : done + len(live)], casting="unsafe")
            done += len(live)
        for start, part in self._pieces():
            found[start : start + len(part)] = part
        if not found.all():  # zeros with a sign are stored, and are zeros
            where, found = where[found != 0], found[found != 0]
        return Entries(self.shape, where, found)

    def _pieces(self) -> Iterator[tuple[int, Array]]:
        """Where each piece of what is stored begins, and its values."""
        if not self.coding.endswith("few"):
            stored = np.frombuffer(self._part, self.dtype, self._stored)
            for start in range(0, self._stored, _STEP):
                yield start, stored[start : start + _STEP]
            return
        book, packed = self._book, self._codes
        books, bits = len(book), book.shape[1].bit_length() - 1
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        each, columns = len(shifts), max(1, self._stored // books)
        for start in range(0, self._stored, _STEP):  # a multiple of what a byte holds
            end = min(start + _STEP, self._stored)
            bytes_ = packed[start // each : -(-end // each)]
            codes = (bytes_[:, None] >> shifts).reshape(-1)[: end - start] & ((1 << bits) - 1)
            at = codes.astype(np.intp)
            if books > 1:
                at += np.arange(start, end) // columns << bits
            yield start, book.reshape(-1)[at]


def _split(dtype: str, count: int, rows: int, part: memoryview, where: str) -> tuple[Array, Array]:
    """Books (1 or rows, values) and packed codes of ``count`` entries."""
    bits, apart = (part[0], part[1]) if len(part) >= 2 else (0, 0)
    books = rows if apart else 1
    size = (books << bits) * np.dtype(dtype).itemsize
    if bits not in (1, 2, 4) or apart > 1 or not books or (
        len(part) != 2 + size + -(-count * bits // 8)
    ):  # fmt: skip
        raise FormatError(f"{where}: codes of few bits that do not fit their array")
    book = np.frombuffer(part[2 : 2 + size], dtype).reshape(books, 1 << bits)
    return book, np.frombuffer(part[2 + size :], np.uint8)
