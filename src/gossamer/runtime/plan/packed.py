"""A plan's file packed for transport, which expands to the plan's file.

Layout: ``GSMPLANZ``; the length of the plan's header (varint); the header, compressed by zlib,
behind its length (varint); the arrays, in sets: those of one type whose shapes differ in the first
dimension at most, sets in the order of their first arrays in the header's table. A set is a byte, 1
where its arrays are joined along the first dimension and 0 where they are not, and the array or
the arrays, each behind its length (:mod:`gossamer.runtime.plan.packed_arrays`). Last the SHA-256 of
the plan's file, which is checked when that is read (:mod:`gossamer.runtime.plan.planfile`). The
format in full: docs/plan-format.md.

A plan that is to be small is made smaller first (:func:`small`): what a packed file leaves out is
left out of the plan, and the answers that it is checked against are its own.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gossamer.pack.coders.limits import MAX_HEADER, Reader, decoded_bytes, varint
from gossamer.runtime.plan.arrays import LINE
from gossamer.runtime.plan.coding import Coded
from gossamer.runtime.plan.facts import Contents, Facts
from gossamer.runtime.plan.graph import DTYPES, Graph, Node, resolved
from gossamer.runtime.plan.packed_arrays import noise, packed, unpacked
from gossamer.runtime.plan.program import Program, steps_of
from gossamer.runtime.plan.sealed import DIGEST, PACKED, PLAN, framed, opened, sha256

__all__ = ["expanded", "pack_bytes", "small"]

_KEPT_BITS = 12  # of the significand of a factor or a shift: a 64th of a code, of 127
_LIGHT = 1 << 14  # multiplications, or entries, that are not worth opening onnxruntime for

Array = np.ndarray


def small(plan: Contents) -> Contents:
    """The plan with what takes bytes and no answer left out.

    Factors and shifts of integer layers are rounded to 12 bits; light operators that onnxruntime
    would compute are numpy's, so that it need not be opened; times of kernels that were not chosen
    are gone; the example is of drawn inputs, which no file need hold, and of their answers.
    """
    rounded = {n for node in plan.graph.nodes if node.op in ("conv_int8", "linear_int8")
               for n in node.inputs[2:4]}  # fmt: skip
    constants = {
        name: _rounded(array) if name in rounded else array
        for name, array in plan.graph.constants.items()
    }
    graph = plan.graph._replace(constants=constants)
    nodes = {node.name: node for node in graph.nodes}
    chosen = {
        name: "numpy" if kernel == "onnxruntime" and _light(graph, nodes[name]) else kernel
        for name, kernel in plan.facts.chosen.items()
    }
    kept = {"chosen": chosen, "rows": [], "whole": {}, "errors": {}, "kept": {}}
    facts = Facts(**{**vars(plan.facts), **kept})
    inputs = [graph.values[name] for name in graph.inputs]
    probe: tuple[tuple[Array, ...], tuple[Array, ...]] = (), ()
    if all(value.dtype == "float32" for value in inputs):
        given = tuple(noise(resolved(value.shape, 1)) for value in inputs)
        probe = given, tuple(Program(graph, steps_of(graph, chosen, facts.threads))(given, 1))
    return Contents(graph, facts, plan.forms, plan.names, probe)


def _rounded(array: Array) -> Array:
    """Float32 with a significand of so many bits, to the nearest."""
    if array.dtype != np.float32:
        return array
    fraction, exponent = np.frexp(array)
    kept: Array = np.ldexp(np.rint(np.ldexp(fraction, _KEPT_BITS)), exponent - _KEPT_BITS)
    return kept.astype(np.float32)


def _light(graph: Graph, node: Node) -> bool:
    """Whether numpy computes it about as fast as onnxruntime is called."""
    weight = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op == "linear" and weight is not None:
        return bool(weight.size <= _LIGHT)
    if node.op in ("conv", "lstm", "gru", "matmul"):
        return False
    return math.prod(resolved(graph.values[node.name].shape, 1)) <= _LIGHT


def pack_bytes(plain: bytes) -> bytes:
    """A plan's file, packed; raises :class:`FormatError` for what is none."""
    fix = "; pack what Plan.save wrote"
    header, body = opened(memoryview(plain), PLAN, "the bytes to pack", fix)
    arrays = [
        Coded(dtype, shape, coding, body[at : at + size], "the plan").dense()
        for _, dtype, shape, coding, at, size in header["arrays"]
    ]
    # A reader need not try codings: arrays are kept without zeros, or as they are.
    stored = [_stored(array) for array in arrays]
    table, at = [], 0
    for row, (coding, data) in zip(header["arrays"], stored, strict=True):
        table.append([*row[:3], coding, at, len(data)])
        at += len(data) + -len(data) % LINE
    text = json.dumps({**header, "arrays": table}, separators=(",", ":"), allow_nan=False).encode()
    digest = sha256(framed(PLAN, text, [data for _, data in stored]))
    head = zlib.compress(text, 9)
    out = [PACKED, varint(len(text)), varint(len(head)), head]
    out += [_set([arrays[i] for i in numbers]) for numbers in _sets(table)]
    return b"".join([*out, digest])


def _sets(table: Sequence[Sequence[Any]]) -> list[list[int]]:
    """Numbers of arrays that may be joined along the first dimension; of one without any, alone."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for number, (_, dtype, shape, *_) in enumerate(table):
        found.setdefault((dtype, *shape[1:]) if shape else (number,), []).append(number)
    return list(found.values())


def _set(arrays: Sequence[Array]) -> bytes:
    """A set in the form of fewer bytes."""
    forms = [b"\0" + b"".join(varint(len(p)) + p for p in map(packed, arrays))]
    if len(arrays) > 1:
        part = packed(np.concatenate(arrays))
        forms.append(b"\1" + varint(len(part)) + part)
    return min(forms, key=len)


def expanded(data: bytes, where: str) -> bytes:
    """The plan's file of packed bytes.

    Raises :class:`FormatError` for bytes that are none. The digest at its end is the reader's to
    check.
    """
    reader = Reader(memoryview(data)[len(PACKED) :], where)
    length = reader.varint("the length of the header", MAX_HEADER)
    head = reader.block("the header")
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(head, length + 1)
    except zlib.error as e:
        raise reader.fail(f"its header cannot be read ({e})") from None
    if len(text) != length or not inflate.eof or inflate.unused_data:
        raise reader.fail(f"its header is not of {length} bytes")
    try:
        table = json.loads(text)["arrays"]
        rows = [(str(t), [int(d) for d in shape], coding) for _, t, shape, coding, *_ in table]
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise reader.fail(f"its header lists no arrays ({type(e).__name__})") from None
    left = decoded_bytes(len(data))
    for dtype, shape, coding in rows:
        if dtype not in DTYPES or any(d < 0 for d in shape) or coding not in _CODINGS:
            raise reader.fail(f"an array of {dtype} {shape}, {coding!r}")
        left -= math.prod(shape) * np.dtype(dtype).itemsize
        if left < 0:
            raise reader.fail("its arrays are larger than any file of its size is read as")
    parts = [b""] * len(rows)
    for numbers in _sets(table):
        for number, array in zip(numbers, _arrays(reader, [rows[i] for i in numbers]), strict=True):
            parts[number] = _CODINGS[rows[number][2]](array)
    digest = bytes(reader.take(DIGEST, "the digest"))
    reader.done()
    return b"".join([*framed(PLAN, text, parts), digest])


def _arrays(reader: Reader, rows: Sequence[tuple[str, list[int], str]]) -> list[Array]:
    """The arrays of a set."""
    joined = reader.u8("whether arrays are joined")
    if joined > (len(rows) > 1):
        raise reader.fail(f"arrays joined as {joined}")
    if not joined:
        return [unpacked(reader.block("an array"), dtype, shape, reader.where)
                for dtype, shape, _ in rows]  # fmt: skip
    dtype, (_, *rest), _ = rows[0]
    firsts = [shape[0] for _, shape, _ in rows]
    whole = unpacked(reader.block("arrays"), dtype, [sum(firsts), *rest], reader.where)
    return np.split(whole, np.cumsum(firsts)[:-1])


def _stored(array: Array) -> tuple[str, bytes]:
    coding = "sparse" if array.dtype == np.int8 and 2 * np.count_nonzero(array) < array.size else (
        "dense"
    )  # fmt: skip
    return coding, _CODINGS[coding](array)


def _sparse(array: Array) -> bytes:
    flat = array.reshape(-1)
    live = flat.view(np.uint8 if flat.itemsize == 1 else np.uint32) != 0
    return np.packbits(live).tobytes() + flat[live].tobytes()


_CODINGS: dict[str, Callable[[Array], bytes]] = {"dense": np.ndarray.tobytes, "sparse": _sparse}
