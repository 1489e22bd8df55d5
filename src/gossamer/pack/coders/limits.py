"""Bounded reading of untrusted bytes, and the writing that matches it.

Every number in a ``.gsm`` file passes through :class:`Reader`, so no length is used before it is
known to lie inside the bytes that are really there.
"""

from __future__ import annotations

import threading

from gossamer.core.errors import FormatError

__all__ = [
    "ANY_BYTES",
    "MAX_BYTES",
    "MAX_DIMENSIONS",
    "MAX_HEADER",
    "NAMES",
    "SEEDS",
    "VERSION",
    "Allowance",
    "Reader",
    "decoded_bytes",
    "expansion",
    "tensors",
    "unzigzag",
    "varint",
    "zigzag",
]

VERSION = 3
"""The newest format version that is read; a file has the oldest that it needs."""

SEEDS = 2
"""The version that brought seeds in place of values."""

NAMES = 3
"""The version that brought symbol coders told by name, and further layouts."""

MAX_BYTES = 16 << 30
"""Default bound on decoded bytes where the caller says the shapes (16 GiB)."""

ANY_BYTES = 1 << 62
"""No bound: for a file of one's own, or of which nothing is decoded."""

MAX_HEADER = 64 << 20
"""Bound on the expanded header and on the expanded metadata, in bytes."""

MAX_DIMENSIONS = 32

_EXPANSION = 100
_EXPANSION_FREE = 64 << 10
_TENSORS_FREE = 1 << 16
_DECODED = 128
_DECODED_FREE = 1 << 30

_VARINT_BYTES = 9  # 63 bits


def expansion(stored: int) -> int:
    """Bytes that a header or metadata of ``stored`` compressed ones may expand to.

    The most regular headers (thousands of like tensors in sections of one length) reach 90 times;
    zstd itself would reach some thousands. What would go beyond is stored as it is.

    >>> expansion(1000) == 64 * 1024 + 100 * 1000
    True
    """
    return min(MAX_HEADER, _EXPANSION_FREE + _EXPANSION * stored)


def tensors(stored: int) -> int:
    """How many tensors a header of ``stored`` compressed bytes may list, some microseconds each.

    Names that differ take more bytes than these two, unless they count up from one to millions;
    such a header is stored as it is.

    >>> tensors(1000)
    66036
    """
    return _TENSORS_FREE + stored // 2


def decoded_bytes(file_bytes: int) -> int:
    """Bytes of tensors that a file of this size may claim when nobody says how many are wanted.

    1 GiB, or 128 times the file: networks of which a thousandth is left get below a hundredth.
    """
    return max(_DECODED_FREE, _DECODED * file_bytes)


def varint(value: int) -> bytes:
    """LEB128: seven bits a byte, low group first, the high bit set on all but the last byte.

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def zigzag(value: int) -> int:
    """A signed integer as an unsigned one: 0, -1, 1, -2 become 0, 1, 2, 3."""
    return value << 1 if value >= 0 else (-value << 1) - 1


def unzigzag(value: int) -> int:
    """The inverse of :func:`zigzag`."""
    return value >> 1 if value & 1 == 0 else -(value >> 1) - 1


class Allowance:
    """Work that the sections of a file may cost beyond what their bytes pay for, all together.

    Args:
        free: how much; in the context coder's entries by default, under a second of them.
    """

    def __init__(self, free: int = 1 << 22) -> None:
        self.left = free
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    def take(self, work: int, section: int = 0) -> bool:
        """Whether ``section`` may cost ``work``; one that is read again takes nothing again."""
        with self._lock:
            if section in self._seen:
                return True
            fits = work <= self.left
            if fits:
                self._seen.add(section)
                self.left -= work
            return fits


class Reader:
    """A cursor over bytes that refuses to step outside them.

    Args:
        data: the bytes.
        where: what they are, for messages: ``"model.gsm: tensor 'fc.weight'"``.
        version: of the file's format, what it may use.
    """

    def __init__(self, data: bytes | memoryview, where: str, version: int = VERSION) -> None:
        self.data = memoryview(data)
        self.version = version
        self.where = where
        self.at = 0

    def fail(self, problem: str) -> FormatError:
        """The error to raise, naming the place."""
        return FormatError(f"{self.where}: {problem}; the file is damaged, fetch or pack it again")

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> memoryview:
        """The next ``count`` bytes."""
        if count < 0 or count > self.left:
            raise self.fail(f"{what} needs {count} bytes, {self.left} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def u8(self, what: str) -> int:
        """The next byte."""
        return self.take(1, what)[0]

    def varint(self, what: str, limit: int = (1 << 63) - 1) -> int:
        """The next LEB128 number, at most ``limit``, in its shortest form."""
        at = self.at
        if at < len(self.data):  # one byte, as most are, without the loop
            value = self.data[at]
            if value < 0x80 and value <= limit:
                self.at = at + 1
                return value
        value = 0
        for i in range(_VARINT_BYTES):
            byte = self.u8(what)
            value |= (byte & 0x7F) << 7 * i
            if not byte & 0x80:
                if byte == 0 and i:
                    raise self.fail(f"{what} is not in its shortest form")
                if value > limit:
                    raise self.fail(f"{what} is {value}, at most {limit} is possible here")
                return value
        raise self.fail(f"{what} is a number of more than 63 bits")

    def block(self, what: str) -> memoryview:
        """A length and that many bytes."""
        return self.take(self.varint(f"length of {what}"), what)

    def rest(self) -> memoryview:
        """All that is left."""
        return self.take(self.left, "rest")

    def done(self) -> None:
        """Raise unless everything was read."""
        if self.left:
            raise self.fail(f"{self.left} bytes too many")
