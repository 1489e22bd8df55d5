"""Plans as files: written whole, checked when read, and run without torch.

Layout: ``GSMPLAN1``; the length of the header (8 bytes, little-endian); the header, JSON in UTF-8;
zeros to a multiple of 64; the arrays, each at a multiple of 64
(:mod:`gossamer.runtime.plan.coding`); the SHA-256 of all before it. A file holds no code: what
it names are operators and kernels of this library, and nothing of it is trusted before the digest
and every part's fit are checked. The format in full, which ``native/c``
reads too: docs/plan-format.md.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.files import write_chunks
from gossamer.runtime.plan import packed
from gossamer.runtime.plan.arrays import LINE, TOLERANCE, difference
from gossamer.runtime.plan.coding import coded, decoded
from gossamer.runtime.plan.facts import Contents, Facts
from gossamer.runtime.plan.forms import check as check_form
from gossamer.runtime.plan.graph import DTYPES, Graph, Node, Value
from gossamer.runtime.plan.kernels import KERNELS
from gossamer.runtime.plan.program import Program, steps_of
from gossamer.runtime.plan.reference import batch_of

__all__ = ["header", "read", "write"]

MAGIC = b"GSMPLAN1"
_DIGEST = 32
_MOST_HEADER = 64 << 20
_CODE = 0.02  # of the largest output
_MOST_PROBE = 4 << 20  # bytes of example inputs that are kept to try a plan with


def write(
    plan: Contents, path: str | Path, key: Mapping[str, Any] | None = None, *, small: bool = False
) -> Path:
    """Write a plan; atomic, so that a reader sees a whole file or the one before.

    ``key``: what the plan was made of, kept in the file (:func:`read`). ``small``: of few bytes
    (:func:`gossamer.runtime.plan.packed.small`), entropy-coded.

    Raises :class:`ArgumentError` for a plan with parts left to torch, which no file holds.
    """
    if plan.graph.islands or not plan.facts.chosen:
        left = [name for n in plan.graph.islands for name in n.attributes["names"]]
        raise ArgumentError(
            f"the plan runs {', '.join(left) or 'the whole network'} in torch, which a file does "
            "not hold; compile with engine='plan', or write the network with other operations"
        )
    if small:
        plan = packed.small(plan)
    probe = plan.probe if sum(a.nbytes for a in plan.probe[0]) <= _MOST_PROBE else ((), ())
    weights = {n.inputs[1] for n in plan.graph.nodes if n.op in ("conv", "linear")}
    arrays = [
        (name, array + np.float32(0) if name in weights and array.dtype == np.float32 else array)
        for name, array in plan.graph.constants.items()  # their zeros have one sign: fewer values
    ]
    arrays += [(f"probe/{i}", a) for i, a in enumerate((*probe[0], *probe[1]))]
    table, chunks, at = [], [], 0
    for name, array in arrays:
        coding, data = coded(array)
        table.append([name, str(array.dtype), list(array.shape), coding, at, len(data)])
        chunks += [data, bytes(-len(data) % LINE)]
        at += len(data) + -len(data) % LINE
    graph = plan.graph
    about = {
        "key": dict(key or {}),
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "nodes": [[n.op, n.inputs, n.outputs, dict(n.attributes)] for n in graph.nodes],
        "values": {n: [v.shape, v.dtype] for n, v in graph.values.items()},
        "arrays": table,
        "probe": [len(probe[0]), len(probe[1])],
        "forms": plan.forms,
        "names": plan.names,
        "facts": asdict(plan.facts),
    }
    text = json.dumps(about, allow_nan=False).encode()
    start = MAGIC + struct.pack("<Q", len(text)) + text
    parts = [start + bytes(-len(start) % LINE), *chunks]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    parts.append(digest.digest())
    write_chunks(path, [packed.pack_bytes(b"".join(parts))] if small else parts)
    return Path(path)


def read(path: str | Path, key: Mapping[str, Any] | None = None) -> tuple[Contents, Program]:
    """The plan of a file, and what runs it; torch is not needed.

    A kernel that cannot be used here is replaced by the portable one, and the plan says so. Where
    the file holds an example, the plan is run on it and compared first.

    Args:
        key: what the plan must have been made of; None: anything.

    Raises :class:`FormatError` for a file that is damaged, hostile, of another version or another
    key, and where the example's outputs come out otherwise here.
    """
    where = str(path)
    try:
        return _read(_plain(path), where, key)
    except FormatError as e:
        raise e if where in str(e) else FormatError(f"{where}: {e}") from e
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
            RecursionError, MemoryError) as e:  # fmt: skip
        raise FormatError(f"{where}: no plan's parts: {type(e).__name__}: {str(e)[:200]}") from e


def header(path: str | Path) -> dict[str, Any]:
    """What a file says of itself, its digest checked; raises :class:`FormatError`."""
    return _opened(_plain(path), str(path))[0]


def _plain(path: str | Path) -> bytes:
    data = Path(path).read_bytes()
    return packed.expanded(data, str(path)) if data[:8] == packed.MAGIC else data


def _opened(data: bytes, where: str) -> tuple[dict[str, Any], memoryview]:
    """The header, and the bytes of the arrays."""
    if len(data) < len(MAGIC) + 8 + _DIGEST or data[: len(MAGIC)] != MAGIC:
        raise FormatError(f"{where} is no plan of this version; compile the network again")
    if hashlib.sha256(memoryview(data)[:-_DIGEST]).digest() != data[-_DIGEST:]:
        raise FormatError(f"{where} is damaged: its digest differs; compile the network again")
    (length,) = struct.unpack_from("<Q", data, len(MAGIC))
    begin = len(MAGIC) + 8
    if length > min(_MOST_HEADER, len(data) - begin - _DIGEST):
        raise FormatError(f"{where} is damaged: a header of {length:,} bytes")
    found = json.loads(data[begin : begin + length])
    if not isinstance(found, dict):
        raise FormatError(f"{where} is damaged: its header is no mapping")
    start = begin + length + -(begin + length) % LINE
    return found, memoryview(data)[start:-_DIGEST]


def _read(data: bytes, where: str, key: Mapping[str, Any] | None) -> tuple[Contents, Program]:
    header, body = _opened(data, where)
    if key is not None and header["key"] != dict(key):
        raise FormatError(f"{where} is a plan of something else")
    arrays = {row[0]: _array(body, where, *row[1:]) for row in header["arrays"]}
    given, wanted = (int(n) for n in header["probe"])
    probe = [arrays.pop(f"probe/{i}") for i in range(given + wanted)]
    nodes = tuple(Node(op, tuple(i), tuple(o), a) for op, i, o, a in header["nodes"])
    values = {n: Value(tuple(int(d) for d in s), t) for n, (s, t) in header["values"].items()}
    graph = Graph(tuple(header["inputs"]), tuple(header["outputs"]), nodes, values, arrays).check()
    if graph.islands:
        raise FormatError(f"{where} names parts of torch, which no file holds")
    facts = Facts(**header["facts"])
    for form, count in zip(header["forms"], (graph.inputs, graph.outputs), strict=True):
        if check_form(form, where) != len(count):
            raise FormatError(f"{where}: a form of another number of tensors")
    chosen = {n.name: _usable(graph, n, facts) for n in nodes}
    program = Program(graph, steps_of(graph, chosen, facts.threads))
    names = [str(n) for n in header["names"]]
    takes, gives = header["forms"]
    example = tuple(probe[:given]), tuple(probe[given:])
    plan = Contents(graph, facts, (takes, gives), names, example)
    _tried(plan, program, where)
    return plan, program


def _usable(graph: Graph, node: Node, facts: Facts) -> str:
    """The kernel that the plan names, or the portable one where it cannot be used here."""
    name = facts.chosen[node.name]
    if name not in KERNELS or node.op not in KERNELS[name].serves:
        why = "is unknown here"
    elif not (why := KERNELS[name].refuses(graph, node)):
        return name
    note = f"kernel {name} cannot be used here ({why}): numpy in its place"
    if note not in facts.notes:
        facts.notes.append(note)
    return "numpy"


def _tried(plan: Contents, program: Program, where: str) -> None:
    """Run the example that the file holds; without one, bind the kernels at least."""
    given, wanted = plan.probe
    if not given and not wanted:
        program.give_back(1, program.block(1))
        return
    if len(given) != len(plan.graph.inputs) or len(wanted) != len(plan.graph.outputs):
        raise FormatError(f"{where} holds an example of another number of tensors")
    for array, name in zip(given, plan.graph.inputs, strict=True):
        if str(array.dtype) != plan.graph.values[name].dtype:
            raise FormatError(f"{where} holds an example of another type")
    # of integers the file holds its own answers: a float's last bit may turn a code here
    allowed = _CODE if plan.facts.precision == "int8" else TOLERANCE
    for a, b in zip(wanted, program(given, batch_of(plan.graph, given)), strict=True):
        if not difference(a, b) <= allowed:
            raise FormatError(f"{where} gives something else here than where it was made")


def _array(
    body: memoryview, where: str, dtype: str, shape: list[int], coding: str, at: int, size: int
) -> np.ndarray:
    if dtype not in DTYPES or any(not isinstance(d, int) or d < 0 for d in shape):
        raise FormatError(f"{where} holds an array of {dtype} {shape}")
    if not 0 <= at <= at + size <= len(body):
        raise FormatError(f"{where}: an array reaches beyond the file")
    return decoded(dtype, shape, coding, body[at : at + size], where)
