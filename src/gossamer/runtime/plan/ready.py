"""The packed layers of a plan's file, kept beside it: what this processor's kernels read.

A plan's file holds weights in few bytes and for any processor. Packing them anew at each load takes
as long as they are many, so that what was packed is left in a file of its own, named by the
processor and by a hash of what it was packed from: the plan's digest, the processor, the version of
the layouts (:data:`LAYOUTS`). It is used where its own digest is right and it was packed from just
that; else the plan's file alone is read, and it is written anew. It is written whole, in one step,
so that any number of processes may write and read it at once. It holds arrays, no code, and goes
through the same checks as what is packed here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.machine import cpu
from gossamer.runtime.kernels.arrays import Packed
from gossamer.runtime.plan.arrays import LINE
from gossamer.runtime.plan.sealed import bytes_of, opened, sealed, sha256

__all__ = ["LAYOUTS", "beside", "read", "write"]

MAGIC = b"GSMREADY"
LAYOUTS = 1
"""Of what packing makes: raised when the same weight is packed into other arrays."""

_KINDS = {
    "SparseConv": "conv", "SparseRows": "gemv", "SparseBytes": "gemv_int8", "RowBooks": "row_books",
}  # fmt: skip


def _key(digest: bytes) -> dict[str, Any]:
    return {"plan": digest.hex(), "processor": cpu(), "layouts": LAYOUTS}


def beside(path: str | os.PathLike[str], digest: bytes) -> str:
    """Where the packed layers of a plan's file of this digest are kept."""
    key = _key(digest)
    name = sha256([repr(sorted(key.items())).encode()]).hex()[:16]
    processor = re.sub(r"\W+", "-", key["processor"]).strip("-").lower()
    return f"{os.path.splitext(path)[0]}.{processor[:40]}.{name}.ready"


def write(path: str | os.PathLike[str], digest: bytes, packed: Mapping[str, Packed]) -> None:
    """Leave packed layers beside a plan's file.

    Raises as :func:`gossamer.core.files.replacing`, and :class:`OSError` where a folder cannot be
    written.
    """
    from gossamer.core.files import write_chunks  # what is read needs none of it

    layers, arrays, at = [], [], 0
    for node, one in packed.items():
        plain: dict[str, Any] = {}
        for name, value in one.parts.items():
            if isinstance(value, np.ndarray):
                data = np.ascontiguousarray(value).tobytes()
                plain[name] = {"array": [str(value.dtype), len(value), at]}
                arrays.append(data)
                at += len(data) + -len(data) % LINE
            else:
                plain[name] = value
        layers.append([node, type(one).__name__, plain])
    header = {"key": _key(digest), "layers": layers}
    write_chunks(beside(path, digest), sealed(MAGIC, header, arrays))


def read(path: str | os.PathLike[str], digest: bytes) -> dict[str, Packed]:
    """Node's name -> packed layer; empty where no file is there.

    Raises :class:`FormatError` for a file that is damaged, hostile, or of something else.
    """
    target = beside(path, digest)
    try:
        data = bytes_of(target)
    except FileNotFoundError:
        return {}
    try:
        header, body = opened(data, MAGIC, target, "")
        if header["key"] != _key(digest):
            raise FormatError(f"{target} is of something else")
        return {node: _layer(kind, parts, body) for node, kind, parts in header["layers"]}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
            RecursionError, MemoryError) as e:  # fmt: skip
        raise FormatError(f"{target}: {e}") from e


def _layer(kind: str, parts: Mapping[str, Any], body: memoryview) -> Packed:
    found: dict[str, Any] = {}
    for name, value in parts.items():
        if isinstance(value, dict):
            dtype, length, at = value["array"]
            if min(length, at) < 0:
                raise FormatError(f"an array of {length} entries at {at}")
            found[name] = np.frombuffer(body, dtype, length, at)
        else:
            found[name] = tuple(value) if isinstance(value, list) else value
    if kind not in _KINDS:
        raise ArgumentError(f"layers of kind {kind!r} are unknown")
    made: Packed = getattr(import_module(f"gossamer.runtime.kernels.{_KINDS[kind]}"), kind)(**found)
    return made
