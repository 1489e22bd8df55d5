"""A network as plain data: operators in order, the shapes of their values, and constant arrays.

Nothing here knows torch. A node names its operator (:data:`OPERATORS`), its inputs and outputs; an
input that is left out is ``""``. A dimension of ``n >= 0`` is a size, one of ``-k`` is ``k`` times
the size of the batch, which is free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gossamer.core.errors import FormatError
from gossamer.runtime.plan.stored import Stored

__all__ = [
    "ACTIVATIONS",
    "CODES",
    "DTYPES",
    "EIGHT",
    "LAYERS",
    "OPERATORS",
    "Graph",
    "Node",
    "Value",
    "batch_of",
    "resolved",
    "users",
]

OPERATORS: Mapping[str, tuple[int, frozenset[str]]] = {
    name: (inputs, frozenset(attributes.split()))
    for name, inputs, attributes in (
        ("conv", 4, "stride padding dilation groups activation"),  # x, weight, bias, added
        ("linear", 4, "activation"),  # x (..., I), weight (O, I), bias, added
        ("affine", 3, "activation"),  # x (N, C, ...), scale, shift
        ("unary", 1, "activation"),
        ("binary", 2, "function activation"),
        ("max_pool", 1, "kernel stride padding dilation"),
        ("avg_pool", 1, "kernel stride padding counted"),
        ("mean", 1, "axes keep"),
        ("reshape", 1, "shape"),
        ("permute", 1, "axes"),
        ("slice", 1, "index"),
        ("pad", 1, "pads value"),
        ("cat", -1, "axis"),
        ("softmax", 1, "axis"),
        ("layer_norm", 3, "rank eps"),
        ("embedding", 2, ""),  # weight, indices
        ("matmul", 2, ""),
        ("fill", 0, "shape value"),
        # the inputs' part (T, N, gates * H), weight (gates * H, H); gives (T, N, H)
        ("lstm", 4, "reverse"),  # first state and cell (N, H); and in row T the final cell
        ("gru", 4, "reverse"),  # bias (H) of the state's part of n, first state
        ("torch", -1, "island names reason sizes"),  # an exported subgraph, run in torch
        # codes of seven bits: maps in quads (N, quads, H, W, 4), rows (N, features)
        ("quantize", 1, "scale zero"),
        ("dequantize", 1, "scale zero channels"),
        # codes, weight (int8), factor and shift of each channel, added
        ("conv_int8", 5, "stride padding dilation groups zero step low high"),
        ("linear_int8", 4, "low high"),  # codes, weight (int8), factor, shift
        ("max_pool_int8", 1, "kernel stride padding dilation"),
        # float32 values of eight bits, for dense engines
        ("round_u8", 1, "scale zero"),  # x: the nearest of 256 values
        # x, weight in codes (int8), scale of each output channel, bias
        ("conv_w8", 4, "stride padding dilation groups activation"),
        ("linear_w8", 4, "activation"),
    )
}
"""Operator -> number of inputs (-1: any) and names of its attributes."""

ACTIVATIONS: Mapping[str, int] = {
    "relu": 0, "clamp": 2, "gelu": 0, "gelu_tanh": 0, "hardswish": 0, "hardsigmoid": 0,
    "sigmoid": 0, "tanh": 0, "silu": 0, "leaky_relu": 1, "elu": 1, "exp": 0, "neg": 0, "sqrt": 0,
    "abs": 0, "rsqrt": 0, "pow": 1,
}  # fmt: skip
"""Functions of one value -> how many parameters follow the name: ``["clamp", 0, 6]``."""

LAYERS: Mapping[str, int] = {
    "conv": 3, "linear": 3, "conv_int8": 4, "linear_int8": 4, "lstm": 4, "gru": 4, "conv_w8": 4,
    "linear_w8": 4,
}  # fmt: skip
"""Operators with a weight, their second input -> where the added value is."""

CODES = frozenset({"quantize", "conv_int8", "linear_int8", "max_pool_int8"})
"""Operators whose uint8 results are codes of seven bits (:mod:`..kernels.eight_bits`)."""

EIGHT = frozenset({"conv_w8", "linear_w8"})
"""Layers whose weights are codes, for dense engines of eight bits."""

MOVES = frozenset({"reshape", "slice", "pad"})
"""Operators whose results are codes where what they read is."""

FUNCTIONS = ("add", "sub", "mul", "div", "maximum", "minimum")
DTYPES = ("float32", "int64", "int32", "bool", "float64", "uint8", "int8", "int16")
_MOST = 1 << 28  # elements that a value may claim, for each example


class Value(NamedTuple):
    """What an array is: its shape (see above), and its type as numpy calls it."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __str__(self) -> str:
        sizes = ("N" if d == -1 else f"{-d}N" if d < 0 else str(d) for d in self.shape)
        return f"{self.dtype} ({', '.join(sizes)})"


class Node(NamedTuple):
    """One operator: what it is, what it reads and gives, by name, and how."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = {}  # never written

    @property
    def name(self) -> str:
        """Of its first output."""
        return self.outputs[0]

    @property
    def activation(self) -> list[Any] | None:
        """The function applied to the result, and its parameters."""
        found: list[Any] | None = self.attributes.get("activation")
        return found

    def __str__(self) -> str:
        shown = ", ".join(f"{k}={v}" for k, v in self.attributes.items() if v not in (None, ""))
        return f"{', '.join(self.outputs)} = {self.op}({', '.join(self.inputs)}; {shown})"


class Graph(NamedTuple):
    """Operators in an order in which each reads what is there.

    Attributes:
        inputs, outputs: names of values, in the network's order.
        nodes: the operators.
        values: name -> what it is, of everything that is computed or given.
        constants: name -> array.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    constants: Mapping[str, np.ndarray]

    @property
    def free(self) -> bool:
        """Whether the batch may be of any size."""
        return any(d < 0 for name in self.inputs for d in self.values[name].shape)

    @property
    def islands(self) -> list[Node]:
        """What was left to torch."""
        return [node for node in self.nodes if node.op == "torch"]

    def kind(self, name: str) -> Value:
        """What a value or constant is."""
        if name in self.values:
            return self.values[name]
        held = self.constants
        array = held.coded[name] if isinstance(held, Stored) else held[name]
        return Value(array.shape, str(array.dtype))

    def __str__(self) -> str:
        lines = [f"{name}: {self.values[name]}" for name in self.inputs]
        lines += [f"{node}  -> {self.values[node.name]}" for node in self.nodes]
        return "\n".join([*lines, f"return {', '.join(self.outputs)}"])

    def check(self) -> Graph:
        """Itself, where its parts fit together; else :class:`FormatError` names what does not."""
        known = set(self.constants) | set(self.inputs)
        for name in self.constants:
            if (dtype := self.kind(name).dtype) not in DTYPES:
                raise FormatError(f"constant {name!r} is of type {dtype}")
        for name in (*self.inputs, *self.outputs):
            if name not in self.values:
                raise FormatError(f"the graph's value {name!r} has no shape")
        for node in self.nodes:
            _check_node(node)
            if missing := [n for n in node.inputs if n and n not in known]:
                raise FormatError(
                    f"{node.op} {node.name!r} reads {missing[0]!r}, which is not there"
                )
            for name in node.outputs:
                if name in known or name not in self.values:
                    raise FormatError(f"{node.op} gives {name!r} twice, or without a shape")
                known.add(name)
        for name, value in self.values.items():
            if value.dtype not in DTYPES or len(value.shape) > 16:
                raise FormatError(f"value {name!r} is {value}")
            if abs(math.prod(value.shape)) > _MOST:
                raise FormatError(f"value {name!r} of {value} is larger than can be")
        _check_codes(self)
        if missing := [name for name in self.outputs if name not in known]:
            raise FormatError(f"output {missing[0]!r} is computed nowhere")
        return self


def _check_node(node: Node) -> None:
    if node.op not in OPERATORS:
        raise FormatError(f"operator {node.op!r} is not one of {', '.join(OPERATORS)}")
    count, attributes = OPERATORS[node.op]
    if count >= 0 and len(node.inputs) != count:
        raise FormatError(f"{node.op} takes {count} inputs, not {len(node.inputs)}")
    if not node.outputs or (node.op != "torch" and len(node.outputs) != 1):
        raise FormatError(f"{node.op} gives {len(node.outputs)} values")
    if set(node.attributes) != attributes:
        raise FormatError(
            f"{node.op} {node.name!r} has {sorted(node.attributes)}, not {sorted(attributes)}"
        )
    if (found := node.activation) is not None and (
        not found or ACTIVATIONS.get(found[0]) != len(found) - 1
    ):
        raise FormatError(f"{node.op} {node.name!r}: activation {found} is unknown")
    if node.attributes.get("function", "add") not in FUNCTIONS:
        raise FormatError(f"{node.name!r}: function {node.attributes['function']!r} is unknown")


def _check_eight(graph: Graph, node: Node) -> None:
    """Scales are positive, zero points are codes, and weights in codes are constants."""
    scales: Any = [node.attributes["scale"]] if node.op == "round_u8" else []
    if scales and node.attributes["zero"] not in range(256):
        raise FormatError(f"{node.name!r}: a zero point of {node.attributes['zero']}")
    if node.op in EIGHT:
        for name, wanted in zip(node.inputs[1:3], ("int8", "float32"), strict=True):
            if name not in graph.constants or graph.kind(name).dtype != wanted:
                raise FormatError(f"{node.op} {node.name!r}: {name!r} is no {wanted} constant")
        scales = graph.constants[node.inputs[2]]
    if len(scales) and not (np.isfinite(scales).all() and np.min(scales) > 0):
        raise FormatError(f"{node.op} {node.name!r} has a scale that is not positive and finite")


def _check_codes(graph: Graph) -> None:
    """Integer operators read codes of seven bits: bytes beyond saturate on some processors."""
    codes: set[str] = set()
    for node in graph.nodes:
        _check_eight(graph, node)
        moved = node.op in MOVES and node.inputs[0] in codes
        if moved and node.op == "pad":
            from gossamer.runtime.kernels.eight_bits import TOP  # graphs of float32 do without

            if node.attributes["value"] not in range(TOP + 1):
                raise FormatError(f"pad {node.name!r}: {node.attributes['value']} is no code")
        if node.op in CODES or moved:
            codes |= {n for n in node.outputs if graph.values[n].dtype == "uint8"}
        if node.op not in (*CODES, "dequantize") or node.op == "quantize":
            continue
        added = [n for n in node.inputs[4:] if n and graph.kind(n).dtype != "float32"]
        if bad := [n for n in (node.inputs[0], *added) if n not in codes]:
            raise FormatError(f"{node.op} {node.name!r} reads {bad[0]!r}, which is no codes")
        for name in node.inputs[1:4]:
            wanted = "int8" if name == node.inputs[1] else "float32"
            if name not in graph.constants or graph.kind(name).dtype != wanted:
                raise FormatError(f"{node.op} {node.name!r}: {name!r} is no constant of {wanted}")


def resolved(shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """A shape with the size of the batch in it.

    >>> resolved((-1, 3, -2), 4)
    (4, 3, 8)
    """
    return tuple(d if d >= 0 else -d * batch for d in shape)


def batch_of(graph: Graph, inputs: Sequence[np.ndarray]) -> int:
    """The size of the batch: what the free dimension of the inputs is; 1 where there is none."""
    for name, array in zip(graph.inputs, inputs, strict=True):
        for have, want in zip(array.shape, graph.values[name].shape, strict=True):
            if want < 0:
                return int(have // -want)
    return 1


def users(graph: Graph) -> dict[str, list[Node]]:
    """Name -> the nodes that read it; the graph's outputs are not among them."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in _read(node):
            found.setdefault(name, []).append(node)
    return found


def _read(node: Node) -> Iterator[str]:
    return iter(dict.fromkeys(name for name in node.inputs if name))
