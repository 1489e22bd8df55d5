"""What travels: the layout that all ranks must agree on, and messages of payloads.

A message is little-endian bytes, every part on a multiple of 8:

====== ======= ==========================================================================
offset bytes   what
====== ======= ==========================================================================
0      4       ``GSMX``
4      1       version, 2
5      1       codec number
6      2       kind: 0 codes, 1 sums
8      8       step
16     8       layout fingerprint
24     4       number of parts
28     4       CRC-32 of the message with zeros in this place; 0 where not asked for
32     16 each scale (float32), form (uint32), payload bytes (uint64)
...            payloads in order, each padded with zeros to 8 bytes
====== ======= ==========================================================================

Forms are those of :mod:`gossamer.distribute.wire.planes`, and 255 for plain floats. A part is what
a span holds of a parameter, or in two-phase exchanges the piece of that which a rank sums.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.distribute.wire.planes import FORMS, Form

__all__ = ["CODES", "SUMS", "VERSION", "Layout", "Part", "Slot", "Writer", "read"]

CODES, SUMS = 0, 1

_EXACT = 255
_MAGIC, VERSION = b"GSMX", 2
_HEAD = struct.Struct("<4sBBHQQII")
_ROW = np.dtype([("scale", "<f4"), ("form", "<u4"), ("length", "<u8")])


class Slot(NamedTuple):
    """One parameter of an exchange; ``coded`` is False where it travels in floating point."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    coded: bool

    @property
    def numel(self) -> int:
        """Elements."""
        n = 1
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True)
class Layout:
    """What every rank must hold alike: settings, by name and in words; parameters, in order."""

    settings: tuple[tuple[str, str], ...]
    slots: tuple[Slot, ...]

    @cached_property
    def text(self) -> str:
        """A line a setting, then a line a parameter."""
        lines = [f"{name} = {value}" for name, value in self.settings]
        for name, shape, dtype, coded in self.slots:
            size = "x".join(map(str, shape)) or "scalar"
            kind = "coded" if coded else "exact"
            lines.append(f"{name} {size} {str(dtype).removeprefix('torch.')} {kind}")
        return "\n".join(lines)

    @cached_property
    def fingerprint(self) -> int:
        """63 bits of the text."""
        digest = hashlib.blake2b(self.text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


class Part(NamedTuple):
    """A payload and how to read it: codes of a form, or plain floats where that is None."""

    scale: float
    form: Form | None
    payload: Tensor


class Writer:
    """Builds a message in place: codecs write straight into ``space``.

    Args:
        room: the most bytes each part can take.
        device: where the message is built.
    """

    def __init__(self, room: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._rows = np.zeros(len(room), _ROW)
        self._done = 0
        self._end = _HEAD.size + _ROW.itemsize * len(room)
        size = self._end + sum(map(_padded, room))
        self._data = torch.empty(size, dtype=torch.uint8, device=device)

    @property
    def space(self) -> Tensor:
        """Where the next payload goes."""
        return self._data[self._end :]

    def add(self, length: int, form: Form | None, scale: float = 0.0) -> None:
        """Take the first ``length`` bytes of ``space`` as the next part."""
        self._rows[self._done] = scale, _EXACT if form is None else FORMS.index(form), length
        self._done += 1
        end = self._end + _padded(length)
        self._data[self._end + length : end] = 0
        self._end = end

    def finish(
        self, kind: int, codec: int, step: int, fingerprint: int, *, checksum: bool = False
    ) -> Tensor:
        """The message: uint8, a multiple of 8 bytes."""
        head = _HEAD.pack(_MAGIC, VERSION, codec, kind, step, fingerprint, len(self._rows), 0)
        front = np.frombuffer(bytearray(head + self._rows.tobytes()), np.uint8)
        self._data[: len(front)] = torch.from_numpy(front)
        message = self._data[: self._end]
        if checksum:
            crc = np.array([zlib.crc32(message.cpu().numpy().data)], "<u4")
            message[_HEAD.size - 4 : _HEAD.size] = torch.from_numpy(crc.view(np.uint8))
        return message


def read(
    data: Tensor,
    *,
    kind: int,
    codec: int,
    step: int,
    fingerprint: int,
    count: int,
    checksum: bool = False,
) -> list[Part]:
    """The parts of a message, as views of ``data``; bytes past its end are padding.

    Raises :class:`FormatError` unless every field is as expected, every payload is there, and the
    checksum, where asked for, is right.
    """
    fixed = _HEAD.size + _ROW.itemsize * count
    if data.numel() < fixed:
        raise FormatError(f"a message of {data.numel()} bytes; {count} parts need {fixed} or more")
    front = data[:fixed].cpu().numpy().tobytes()
    *found, crc = _HEAD.unpack_from(front)
    wanted = (_MAGIC, VERSION, codec, kind, step, fingerprint, count)
    fields = ("magic", "version", "codec", "kind", "step", "fingerprint", "parts")
    for field, is_, should in zip(fields, found, wanted, strict=True):
        if is_ != should:
            raise FormatError(f"a message with {field} {is_!r} where {should!r} was expected")
    parts, at = [], fixed
    for scale, form, length in np.frombuffer(front, _ROW, offset=_HEAD.size).tolist():
        if (form != _EXACT and form >= len(FORMS)) or length > data.numel() - at:
            raise FormatError(
                f"a message part of form {form}, {length} bytes; forms are 0..{len(FORMS) - 1} or "
                f"{_EXACT}, and {data.numel() - at} bytes are left"
            )
        name = None if form == _EXACT else FORMS[form]
        parts.append(Part(scale, name, data[at : at + length]))
        at += _padded(length)
    if checksum:
        start = zlib.crc32(front[: _HEAD.size - 4] + bytes(4))
        real = zlib.crc32(data[_HEAD.size : at].cpu().numpy().data, start)
        if real != crc:
            raise FormatError(f"a message with checksum {crc:08x} where its bytes give {real:08x}")
    return parts


def _padded(length: int) -> int:
    return length + -length % 8
