"""Compiled operators that take less time than numpy needs to be called.

Moved elements are exact; sums are in the order of the processor's lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.plan.arrays import arranged
from gossamer.runtime.plan.chains import Refusing, chained
from gossamer.runtime.plan.graph import Graph, Node

__all__ = ["FUNCTIONS", "MOVES", "bind", "finish", "pack", "refuses"]

Array = np.ndarray
Call = Callable[[], object]

_MOST_DIMENSIONS = 8
_NOTHING = np.zeros(0, np.float32)

FUNCTIONS = frozenset({
    "relu", "clamp", "leaky_relu", "elu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh",
    "hardsigmoid", "hardswish", "neg", "abs",
})  # fmt: skip
"""Activations that are compiled."""

MOVES = frozenset({"slice", "pad", "permute", "cat", "fill"})
"""Operators that take elements of any type."""


def refuses(graph: Graph, node: Node) -> str:
    """Why an operator is not for these; "" for one that is."""
    if kernel("small") is None or kernel("floats") is None:
        return "the compiled kernels are not built"
    given = [graph.kind(name) for name in node.inputs if name]
    result = graph.values[node.name]
    if (rank := max(len(v.shape) for v in (*given, result))) > _MOST_DIMENSIONS:
        return f"of {rank} dimensions"
    if node.op in MOVES:
        other = [v.dtype for v in given if v.dtype != result.dtype]
        return f"{other[0]} to {result.dtype}" if other else ""
    floats = [given[0], result] if node.op == "embedding" else [*given, result]
    if node.op == "embedding" and given[1].dtype != "int64":
        return f"indexes of {given[1].dtype}"
    if other := [v.dtype for v in floats if v.dtype != "float32"]:
        return f"of {other[0]}"
    if (name := (node.activation or [""])[0]) and name not in FUNCTIONS:
        return f"{name} is not compiled"
    rank = len(given[0].shape)
    last = {"softmax": lambda a: [a["axis"]], "mean": lambda a: a["axes"]}.get(node.op)
    if last is not None:
        axes = sorted(last(node.attributes))
        if not axes or axes != list(range(rank - len(axes), rank)):
            return "over other axes than the last"
    if node.op in ("max_pool", "avg_pool"):
        a = node.attributes
        if rank != 4:
            return f"over maps of {rank - 2} dimensions"
        if not a.get("counted", True) and any(map(any, a["padding"])):
            return "over padding that does not count"
    if node.op == "matmul" and given[0].shape[:-2] != given[1].shape[:-2]:
        return "one matrix for several products"
    return ""


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
    node, y = nodes[0], outputs[0]
    calls = _RULES[node.op](node.attributes, y, *arranged(node, packed, inputs))
    if node.activation and node.op != "unary":
        calls += finish(node.attributes, y) or []
    return chained(calls)[0]


def finish(a: Mapping[str, Any], y: Array, *added: Array | None) -> list[Call] | None:
    """Additions and the activation, in place; None where that is not compiled."""
    name = (a["activation"] or [""])[0]
    if kernel("floats") is None or (name and name not in FUNCTIONS):
        return None
    made = [_joined("add", y, y, x) for x in added if x is not None]
    return made + (_unary(a, y, y) if name else [])


def _unary(a: Mapping[str, Any], y: Array, x: Array) -> list[Call]:
    name, *settings = a["activation"]
    one, other = (*settings, 0.0, 0.0)[:2]
    return [_floats().Unary(name, one, other, x.reshape(-1), y.reshape(-1))]


def _floats() -> Any:
    return kernel("floats")


def _joined(function: str, y: Array, one: Array, other: Array) -> Call:
    wide = (np.broadcast_to(v, y.shape) for v in (one, other))
    made: Call = _floats().Binary(function, *wide, y)
    return made


def _copy(y: Array, x: Array) -> Call:
    if x.shape != y.shape:
        raise ArgumentError(f"a value of {x.shape} where {y.shape} was planned")
    if x.dtype != y.dtype:  # elements are moved as they are
        raise ArgumentError(f"a value of {x.dtype} where {y.dtype} was planned")
    fours = x.dtype == np.uint8 and x.ndim == 5 and x.shape[-1] == 4
    if fours and x.strides[-1] == y.strides[-1] == 1:  # codes, as words
        x, y = (v.view(np.uint32)[..., 0] for v in (x, y))
    module: Any = kernel("small")
    made: Call = module.Copy(x, y)
    return made


def _fill(a: Mapping[str, Any], y: Array) -> list[Call]:
    module: Any = kernel("small")
    return [module.Fill(y, np.array(a["value"]).astype(y.dtype).tobytes())]


def _pad(a: Mapping[str, Any], y: Array, x: Array) -> list[Call]:
    inside = y[tuple(slice(b, b + s) for (b, _), s in zip(a["pads"], x.shape, strict=True))]
    return [*_fill(a, y), _copy(inside, x)]


def _cat(a: Mapping[str, Any], y: Array, *parts: Array) -> list[Call]:
    ends = np.cumsum([part.shape[a["axis"]] for part in parts])
    return [_copy(to, x) for to, x in zip(np.split(y, ends[:-1], a["axis"]), parts, strict=True)]


def _linear(
    a: Mapping[str, Any], y: Array, x: Array, w: Array, b: Array | None, more: Array | None
) -> list[Call]:
    rows, results = (v.reshape(-1, v.shape[-1]) for v in (x, y))
    call = _floats().Linear(rows, w, _NOTHING if b is None else b, results)
    return [call] if more is None else [call, _joined("add", y, y, more)]


def _affine(a: Mapping[str, Any], y: Array, x: Array, scale: Array, shift: Array) -> list[Call]:
    form = (-1, *[1] * (x.ndim - 2))
    return [_joined("mul", y, x, scale.reshape(form)), _joined("add", y, y, shift.reshape(form))]


def _layer_norm(
    a: Mapping[str, Any], y: Array, x: Array, scale: Array | None, shift: Array | None
) -> list[Call]:
    size = math.prod(x.shape[x.ndim - a["rank"] :])
    terms = (_NOTHING if t is None else t.reshape(-1) for t in (scale, shift))
    return [_floats().LayerNorm(x.reshape(-1, size), *terms, a["eps"], y.reshape(-1, size))]


def _softmax(a: Mapping[str, Any], y: Array, x: Array) -> list[Call]:
    return [_floats().Softmax(*(v.reshape(-1, v.shape[-1]) for v in (x, y)))]


def _pool(a: Mapping[str, Any], y: Array, x: Array) -> list[Call]:
    before = [p[0] for p in a["padding"]]
    greatest = "dilation" in a
    sizes = [*a["kernel"], *a["stride"], *before, *a.get("dilation", (1, 1))]
    planes = (v.reshape(-1, *v.shape[2:]) for v in (x, y))
    return [_floats().Pool(greatest, sizes, 1 / math.prod(a["kernel"]), *planes)]


def _matmul(a: Mapping[str, Any], y: Array, one: Array, other: Array) -> list[Call]:
    return [_floats().Products(*(v.reshape(-1, *v.shape[-2:]) for v in (one, other, y)))]


def _embedding(a: Mapping[str, Any], y: Array, w: Array, indexes: Array) -> list[Call]:
    def why() -> None:
        if indexes.size and not 0 <= indexes.min() <= indexes.max() < len(w):
            raise IndexError(f"an index beyond the {len(w)} rows of an embedding")

    call = _floats().Embedding(w, indexes.reshape(-1), y.reshape(-1, y.shape[-1]))
    return [Refusing(call, why)]


_RULES: Mapping[str, Callable[..., list[Call]]] = {
    "slice": lambda a, y, x: [_copy(y, x[tuple(slice(*part) for part in a["index"])])],
    "permute": lambda a, y, x: [_copy(y, x.transpose(a["axes"]))],
    "pad": _pad,
    "cat": _cat,
    "fill": _fill,
    "linear": _linear,
    "affine": _affine,
    "unary": _unary,
    "binary": lambda a, y, one, other: [_joined(a["function"], y, one, other)],
    "mean": lambda a, y, x: [_floats().Mean(x.reshape(y.size, -1), y.reshape(-1))],
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "matmul": _matmul,
    "embedding": _embedding,
    "max_pool": _pool,
    "avg_pool": _pool,
}
"""Operator -> attributes, result, inputs -> the calls before its activation."""
