"""A header and arrays as one file, sealed by its digest.

Layout: a magic of eight bytes; the length of the header (8 bytes, little-endian); the header, JSON
in UTF-8; zeros to a multiple of 64; the arrays, each at a multiple of 64; the SHA-256 of all before
it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np

from gossamer.core.errors import FormatError
from gossamer.runtime.plan.arrays import LINE

__all__ = [
    "DIGEST", "PACKED", "PLAN", "aligned", "bytes_of", "framed", "opened", "sealed", "sha256",
]  # fmt: skip

PLAN = b"GSMPLAN1"
"""How a plan's file begins (:mod:`gossamer.runtime.plan.planfile`)."""
PACKED = b"GSMPLANZ"
"""How the file of a packed plan begins (:mod:`gossamer.runtime.plan.packed`)."""

DIGEST = 32
_MOST_HEADER = 64 << 20
_FEW = 1 << 19


def sealed(magic: bytes, header: Mapping[str, Any], arrays: Iterable[bytes]) -> list[bytes]:
    """The pieces of a file."""
    import json

    parts = framed(magic, json.dumps(header, allow_nan=False).encode(), arrays)
    return [*parts, sha256(parts)]


def framed(magic: bytes, text: bytes, arrays: Iterable[bytes]) -> list[bytes]:
    """The pieces of a file up to its digest; ``text``: its header's."""
    start = magic + struct.pack("<Q", len(text)) + text
    parts = [start + bytes(-len(start) % LINE)]
    for data in arrays:
        parts += [data, bytes(-len(data) % LINE)]
    return parts


def parsed(text: str) -> Any:
    """What JSON says, without NaN and infinity.

    By the interpreter's own scanner where it has one: ``json`` compiles seven expressions first,
    which takes as long as a hundred layers' header to read. Raises :class:`ValueError`.
    """
    try:
        scan = import_module("_json").make_scanner(_Plain())
    except (ImportError, AttributeError, TypeError):
        import json

        return json.loads(text, parse_constant=_Plain.parse_constant)
    try:
        text = text.strip()
        found, end = scan(text, 0)
    except StopIteration:
        raise ValueError("no JSON") from None
    if end < len(text):
        raise ValueError("more than one value of JSON")
    return found


class _Plain:
    """How the scanner is set."""

    strict, object_hook, object_pairs_hook = True, None, None
    parse_float, parse_int = float, int

    @staticmethod
    def parse_constant(name: str) -> float:
        raise ValueError(f"JSON with {name}")


def sha256(parts: Sequence[bytes | memoryview]) -> bytes:
    """Of bytes in pieces.

    A few are hashed by the interpreter's own code: the library behind ``hashlib`` is five times as
    fast, and takes as long to load as a megabyte takes to hash.
    """
    made: Any = None
    if sum(map(len, parts)) < _FEW:
        for name in ("_sha2", "_sha256"):  # from 3.12 on, and before
            with suppress(ImportError):
                made = import_module(name).sha256()
                break
    if made is None:
        import hashlib

        made = hashlib.sha256()
    for part in parts:
        made.update(part)
    digest: bytes = made.digest()
    return digest


def bytes_of(path: str | os.PathLike[str]) -> memoryview:
    """A whole file, at the beginning of a cache line; arrays that lie in it are read-only."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        raw = np.empty(size + LINE, np.uint8)
        start = -raw.ctypes.data % LINE
        held = raw[start : start + size]
        done = 0
        while done < size and (got := file.readinto(held.data[done:])):
            done += got
    held.flags.writeable = False
    return held.data[:done]


def aligned(data: bytes) -> memoryview:
    """Bytes at the beginning of a cache line; arrays that lie in them are read-only."""
    raw = np.empty(len(data) + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    held = raw[start : start + len(data)]
    held[:] = np.frombuffer(data, np.uint8)
    held.flags.writeable = False
    return held.data


def opened(
    data: memoryview, magic: bytes, where: str, fix: str = "; compile the network again"
) -> tuple[dict[str, Any], memoryview]:
    """The header, and the bytes of the arrays, the digest checked.

    Raises :class:`FormatError`, or :class:`ValueError` where the header is no JSON.
    """
    if len(data) < len(magic) + 8 + DIGEST or data[: len(magic)] != magic:
        raise FormatError(f"{where} is no file of this kind and version{fix}")
    if sha256([data[:-DIGEST]]) != data[-DIGEST:]:
        raise FormatError(f"{where} is damaged: its digest differs{fix}")
    (length,) = struct.unpack_from("<Q", data, len(magic))
    begin = len(magic) + 8
    if length > min(_MOST_HEADER, len(data) - begin - DIGEST):
        raise FormatError(f"{where} is damaged: a header of {length:,} bytes")
    found = parsed(bytes(data[begin : begin + length]).decode())
    if not isinstance(found, dict):
        raise FormatError(f"{where} is damaged: its header is no mapping")
    start = begin + length + -(begin + length) % LINE
    return found, data[start:-DIGEST]
