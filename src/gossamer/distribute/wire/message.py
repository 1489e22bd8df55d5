"""What travels: the layout that all ranks must agree on, and messages of payloads.

A message is little-endian bytes, every part on a multiple of 8:

====== ======= ==========================================================================
offset bytes   what
====== ======= ==========================================================================
0      4       ``GSMX``
4      1       version, 1
5      1       codec number
6      2       kind: 0 codes, 1 sums
8      8       step
16     8       layout fingerprint
24     8       number of parts
32     16 each scale (float32), form (uint32), payload bytes (uint64)
...            payloads in order, each padded with zeros to 8 bytes
====== ======= ==========================================================================

Forms are those of :mod:`gossamer.distribute.wire.planes`, and 255 for plain floats. A part is what
a span holds of a parameter, or in two-phase exchanges the piece of that which a rank sums.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.distribute.wire.planes import FORMS, Form

__all__ = ["CODES", "SUMS", "Layout", "Part", "Slot", "Writer", "difference", "read"]

CODES, SUMS = 0, 1

_EXACT = 255
_MAGIC, _VERSION = b"GSMX", 1
_HEAD = struct.Struct("<4sBBHQQQ")
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
    """What every rank must hold alike: the settings, in words, and the parameters in order."""

    settings: str
    slots: tuple[Slot, ...]

    @cached_property
    def text(self) -> str:
        """A line of settings, then a line a parameter."""
        lines = [self.settings]
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


def difference(texts: Sequence[str]) -> str:
    """Where the layouts of the ranks, in order, first differ from rank 0's, in words.

    >>> difference(["a", "a", "b"])
    "rank 2 has 'b' where rank 0 has 'a'"
    """
    for rank, text in enumerate(texts):
        for theirs, first in zip_longest(text.split("\n"), texts[0].split("\n")):
            if theirs != first:
                has, had = (repr(line) if line else "nothing" for line in (theirs, first))
                return f"rank {rank} has {has} where rank 0 has {had}"
    return "no rank differs"


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

    def finish(self, kind: int, codec: int, step: int, fingerprint: int) -> Tensor:
        """The message: uint8, a multiple of 8 bytes."""
        head = _HEAD.pack(_MAGIC, _VERSION, codec, kind, step, fingerprint, len(self._rows))
        front = np.frombuffer(bytearray(head + self._rows.tobytes()), np.uint8)
        self._data[: len(front)] = torch.from_numpy(front)
        return self._data[: self._end]


def read(
    data: Tensor, *, kind: int, codec: int, step: int, fingerprint: int, count: int
) -> list[Part]:
    """The parts of a message, as views of ``data``; bytes past its end are padding.

    Raises :class:`FormatError` unless every field is as expected and every payload is there.
    """
    fixed = _HEAD.size + _ROW.itemsize * count
    if data.numel() < fixed:
        raise FormatError(f"a message of {data.numel()} bytes; {count} parts need {fixed} or more")
    front = data[:fixed].cpu().numpy().tobytes()
    found = _HEAD.unpack_from(front)
    wanted = (_MAGIC, _VERSION, codec, kind, step, fingerprint, count)
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
    return parts


def _padded(length: int) -> int:
    return length + -length % 8
