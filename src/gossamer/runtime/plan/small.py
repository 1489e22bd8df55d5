"""Compiled operators that take less time than numpy needs to be called.

Moved elements are exact. Sums are of 16 parts in one order, the same on every processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.plan.graph import Graph, Node
from gossamer.runtime.plan.sparse import ends

__all__ = ["bind", "pack", "refuses"]

Array = np.ndarray
Call = Callable[[], object]

_MOST_WEIGHTS = 1 << 14  # beyond them a product by BLAS or without its zeros takes less
_MOST_DIMENSIONS = 8


def refuses(graph: Graph, node: Node) -> str:
    """Why an operator is not for these; "" for one that is."""
    if kernel("small") is None:
        return "the compiled kernels are not built"
    x = graph.kind(node.inputs[0])
    if node.op not in ("mean", "linear"):
        rank = len(x.shape)
        return f"of {rank} dimensions" if rank > _MOST_DIMENSIONS else ""
    if x.dtype != "float32":
        return f"of {x.dtype}"
    if node.op == "mean":
        rank, axes = len(x.shape), node.attributes["axes"]
        last = list(range(rank - len(axes), rank))
        return "" if axes and sorted(axes) == last else "a mean over other axes than the last"
    if (size := math.prod(graph.kind(node.inputs[1]).shape)) > _MOST_WEIGHTS:
        return f"{size} weights"
    if node.inputs[3]:
        return "a value is added to its result"
    return "" if ends(node.attributes)[2] else "its activation is no clamp"


def pack(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], threads: int
) -> list[Array | None]:
    """The node's constants at their places; None for what is computed, or left out."""
    held = (graph.constants.get(name) for name in nodes[0].inputs)
    return [None if a is None else np.ascontiguousarray(a) for a in held]


def bind(
    packed: list[Array | None],
    nodes: Sequence[Node],
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    batch: int,
) -> Call:
    """The call on these arrays."""
    module: Any = kernel("small")
    node, y = nodes[0], outputs[0]
    a = node.attributes
    x, (weight, bias) = inputs[0], (*packed, None, None)[1:3]
    call: Call
    if node.op == "linear":
        low, high, _ = ends(a)
        rows = (v.reshape(-1, v.shape[-1]) for v in (x, y))
        call = module.Linear(next(rows), weight, bias, low, high, next(rows))
    elif node.op == "mean":
        call = module.Mean(x.reshape(y.size, -1), y.reshape(-1))
    elif node.op == "permute":
        call = _copy(x.transpose(a["axes"]), y)
    elif node.op == "slice":
        call = _copy(x[tuple(slice(*part) for part in a["index"])], y)
    else:
        inside = y[tuple(slice(b, b + s) for (b, _), s in zip(a["pads"], x.shape, strict=True))]
        fill = module.Fill(y, np.array(a["value"]).astype(y.dtype).tobytes())
        call = module.Chain([fill, _copy(x, inside)])
    return call


def _copy(x: Array, y: Array) -> Any:
    if x.shape != y.shape:
        raise ArgumentError(f"a value of {x.shape} where {y.shape} was planned")
    module: Any = kernel("small")
    fours = x.dtype == np.uint8 and x.ndim == 5 and x.shape[-1] == 4
    if fours and x.strides[-1] == y.strides[-1] == 1:  # codes, as words
        x, y = (v.view(np.uint32)[..., 0] for v in (x, y))
    return module.Copy(x, y)
