"""Plans as files: written whole, checked when read, and run without torch.

``GSMPLAN1`` and what :mod:`gossamer.runtime.plan.sealed` says, arrays coded by
:mod:`gossamer.runtime.plan.coding`. A file holds no code: what it names are operators and kernels
of this library, and nothing of it is trusted before the digest and every part's fit are checked.
The format in full, which ``native/c`` reads too: docs/plan-format.md.

Weights of sparse kernels are decoded straight into what the kernels read, and what is large is kept
beside the file (:mod:`gossamer.runtime.plan.ready`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.runtime.kernels.arrays import Packed
from gossamer.runtime.plan.arrays import LINE, TOLERANCE, difference
from gossamer.runtime.plan.coding import Coded, coded
from gossamer.runtime.plan.facts import Contents, Facts
from gossamer.runtime.plan.forms import check as check_form
from gossamer.runtime.plan.graph import DTYPES, Graph, Node, Value, batch_of
from gossamer.runtime.plan.kernels import KERNELS
from gossamer.runtime.plan.program import Program, steps_of
from gossamer.runtime.plan.sealed import DIGEST, PACKED, PLAN, aligned, bytes_of, opened, sealed
from gossamer.runtime.plan.stored import Stored

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["header", "read", "write"]

_MOST_TOLD = 300  # characters
FEWEST = 1 << 20
"""Bytes of a file from which its packed layers are kept: fewer are packed as fast as read."""
_CODE = 0.02  # of the largest output
_STANDS_IN = {"onnxruntime": "openvino", "openvino": "onnxruntime"}
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
    from pathlib import Path

    from gossamer.core.files import write_chunks  # readers do without

    if small:
        from gossamer.runtime.plan import packed

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
        chunks.append(data)
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
        "facts": vars(plan.facts),
    }
    pieces = sealed(PLAN, about, chunks)
    write_chunks(path, [packed.pack_bytes(b"".join(pieces))] if small else pieces)
    return Path(path)


def read(
    path: str | os.PathLike[str], key: Mapping[str, Any] | None = None, *, cache: bool = True
) -> tuple[Contents, Program]:
    """The plan of a file, and what runs it; torch is not needed.

    A kernel that cannot be used here is replaced by another dense engine or the portable one, and
    the plan says so. Where the file holds an example, the plan is run on it and compared first.

    Args:
        key: what the plan must have been made of; None: anything.
        cache: look for its packed layers beside it, and leave them there where they are large.

    Raises :class:`FormatError` for a file that is damaged, hostile, of another version or another
    key, and where the example's outputs come out otherwise here.
    """
    where = str(path)
    try:
        data = _plain(path)
        header, body = opened(data, PLAN, where)
        if key is not None and header["key"] != dict(key):
            raise FormatError(f"{where} is a plan of something else{_changed(header['key'], key)}")
        cache = cache and len(data) >= FEWEST
        if cache:
            from gossamer.runtime.plan import ready
        digest, notes = bytes(data[-DIGEST:]), list[str]()
        if cache:
            try:
                if known := ready.read(path, digest):
                    return _read(header, body, where, known)
            except Exception as e:  # of whatever kind: the plan's file itself is read instead
                notes.append(f"the packed layers beside the file are made anew: {e}")
        plan, program = _read(header, body, where, {})
        plan.facts.notes += notes
        packed = plan.graph.constants.packed if isinstance(plan.graph.constants, Stored) else {}
        if cache and packed:
            try:
                ready.write(path, digest, packed)
            except (ArgumentError, OSError) as e:  # a folder that cannot be written
                plan.facts.notes.append(f"no packed layers were left beside the file: {e}")
        return plan, program
    except FormatError as e:
        raise e if where in str(e) else FormatError(f"{where}: {e}") from e
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
            RecursionError, MemoryError) as e:  # fmt: skip
        raise FormatError(f"{where}: no plan's parts: {type(e).__name__}: {str(e)[:200]}") from e


def header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says of itself, its digest checked; raises :class:`FormatError`."""
    return opened(_plain(path), PLAN, str(path))[0]


def _plain(path: str | os.PathLike[str]) -> memoryview:
    """The bytes of a plan's file, those of a packed one expanded."""
    data = bytes_of(path)
    if data[: len(PACKED)] != PACKED:
        return data
    from gossamer.runtime.plan.packed import expanded

    return aligned(expanded(bytes(data), str(path)))


def _read(
    header: Mapping[str, Any], body: memoryview, where: str, known: Mapping[str, Packed]
) -> tuple[Contents, Program]:
    """``known``: node's name -> what it was packed into before."""
    held = {row[0]: _array(body, where, *row[1:]) for row in header["arrays"]}
    given, wanted = (int(n) for n in header["probe"])
    probe = [held.pop(f"probe/{i}").dense() for i in range(given + wanted)]
    nodes = tuple(Node(op, tuple(i), tuple(o), a) for op, i, o, a in header["nodes"])
    values = {n: Value(tuple(int(d) for d in s), t) for n, (s, t) in header["values"].items()}
    constants = Stored(held, known)
    graph = Graph(tuple(header["inputs"]), tuple(header["outputs"]), nodes, values, constants)
    graph.check()
    if graph.islands:
        raise FormatError(f"{where} names parts of torch, which no file holds")
    facts = Facts(**header["facts"])
    facts.notes = list(facts.notes)  # the header may be read twice
    for form, count in zip(header["forms"], (graph.inputs, graph.outputs), strict=True):
        if check_form(form, where) != len(count):
            raise FormatError(f"{where}: a form of another number of tensors")
    chosen = {n.name: _usable(graph, n, facts, known) for n in nodes}
    program = Program(graph, steps_of(graph, chosen, facts.threads))
    names = [str(n) for n in header["names"]]
    takes, gives = header["forms"]
    example = tuple(probe[:given]), tuple(probe[given:])
    plan = Contents(graph, facts, (takes, gives), names, example)
    _tried(plan, program, where)
    return plan, program


def _changed(made: Any, wanted: Mapping[str, Any]) -> str:
    """What is another than when the plan was made, where that can be said."""
    if not isinstance(made, dict) or set(made) != set(wanted):
        return ""
    told = [f"{k} were {made[k]}, here {wanted[k]}" for k in wanted if made[k] != wanted[k]]
    return f": {'; '.join(told)}"[:_MOST_TOLD] if told else ""


def _usable(graph: Graph, node: Node, facts: Facts, known: Mapping[str, Packed]) -> str:
    """The kernel that the plan names, or where it cannot be used here another dense engine.

    Where that is not there either, the portable one. ``known``: layers that were packed before.
    """
    name = facts.chosen[node.name]
    if node.name in known or not (why := _unusable(graph, node, name)):
        return name
    other = _STANDS_IN.get(name, "numpy")
    other = "numpy" if _unusable(graph, node, other) else other
    note = f"kernel {name} cannot be used here ({why}): {other} in its place"
    if note not in facts.notes:
        facts.notes.append(note)
    return other


def _unusable(graph: Graph, node: Node, name: str) -> str:
    if name not in KERNELS or node.op not in KERNELS[name].serves:
        return "is unknown here"
    return KERNELS[name].refuses(graph, node)


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
) -> Coded:
    if dtype not in DTYPES or any(not isinstance(d, int) or d < 0 for d in shape):
        raise FormatError(f"{where} holds an array of {dtype} {shape}")
    if not 0 <= at <= at + size <= len(body):
        raise FormatError(f"{where}: an array reaches beyond the file")
    return Coded(dtype, shape, coding, body[at : at + size], where)
