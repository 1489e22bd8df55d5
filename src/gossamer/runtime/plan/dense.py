"""Dense kernels of onnxruntime: a node, or a run of neighbours, as one session.

The session reads and writes the plan's own arrays; nothing is copied at its border.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from gossamer.runtime import sessions
from gossamer.runtime.plan import onnx_recurrent
from gossamer.runtime.plan.graph import EIGHT, Graph, Node
from gossamer.runtime.plan.onnx_model import model

__all__ = ["bind", "pack", "refuses", "unfit"]

_MOST = 1 << 31  # bytes of a protobuf message


@dataclass(frozen=True)
class _Packed:
    session: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def refuses(graph: Graph, node: Node) -> str:
    """Why a node is not for onnxruntime; "" for one that is."""
    if find_spec("onnxruntime") is None:
        return "onnxruntime is not installed; pip install 'gossamer[onnx]'"
    return unfit(graph, node)


def unfit(graph: Graph, node: Node) -> str:
    """Why a node is no part of an ONNX model; "" for one that is."""
    if node.op in onnx_recurrent.OPERATORS and (why := onnx_recurrent.refuses(graph, node)):
        return why
    names = (*node.inputs, *node.outputs)
    kinds = [graph.kind(n) for n in names if n and not (node.op in EIGHT and n == names[1])]
    if other := [k.dtype for k in kinds if k.dtype != "float32"]:
        return f"of {other[0]}"
    if node.op == "reshape" and sum(d < 0 for d in node.attributes["shape"]) > 1:
        return "two free dimensions"
    if sum(a.nbytes for n in node.inputs if (a := graph.constants.get(n)) is not None) >= _MOST:
        return "its weights are beyond a protobuf message"
    return ""


def pack(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], threads: int
) -> _Packed:
    """The session; raises :class:`ArgumentError` where onnxruntime does not take it."""
    opened = sessions.session(model(graph, nodes, inputs, outputs), threads=threads)
    return _Packed(opened, tuple(inputs), tuple(outputs))


def bind(
    packed: _Packed,
    nodes: Sequence[Node],
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    batch: int,
) -> Callable[[], object]:
    """The call on these arrays."""
    binding = packed.session.io_binding()
    for name, a in zip(packed.inputs, inputs, strict=True):
        binding.bind_input(name, "cpu", 0, a.dtype.type, a.shape, a.ctypes.data)
    for name, a in zip(packed.outputs, outputs, strict=True):
        binding.bind_output(name, "cpu", 0, a.dtype.type, a.shape, a.ctypes.data)
    held = (*inputs, *outputs)  # onnxruntime has their addresses alone

    def call(run: Any = packed.session.run_with_iobinding, arrays: Any = held) -> None:
        run(binding)

    return call
