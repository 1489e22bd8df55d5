"""Dense kernels of onnxruntime: a node, or a run of neighbours, as one session.

The session reads and writes the plan's own arrays; nothing is copied at its border.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from gossamer.runtime import sessions
from gossamer.runtime.plan import wire
from gossamer.runtime.plan.graph import Graph, Node

__all__ = ["bind", "model", "pack", "refuses"]

_MOST = 1 << 31  # bytes of a protobuf message


@dataclass(frozen=True)
class _Packed:
    session: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def refuses(graph: Graph, node: Node) -> str:
    """Why a node is not for onnxruntime; "" for one that is."""
    if find_spec("onnxruntime") is None:
        return "onnxruntime is not installed"
    kinds = [graph.kind(name) for name in (*node.inputs, *node.outputs) if name]
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


def model(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str]
) -> bytes:
    """Nodes as an ONNX model of float32."""
    writer = _Writer(graph)
    for node in nodes:
        writer.write(node)
    given, wanted = (
        {n: (graph.values[n].dtype, [_shown(d) for d in graph.values[n].shape]) for n in names}
        for names in (inputs, outputs)
    )
    return wire.model(writer.nodes, list(writer.constants.values()), given, wanted)


def _shown(dim: int) -> int | str:
    return dim if dim >= 0 else "N" if dim == -1 else f"{-dim}N"


_SIMPLE = {"relu": "Relu", "hardswish": "HardSwish", "sigmoid": "Sigmoid", "tanh": "Tanh",
           "exp": "Exp", "neg": "Neg", "sqrt": "Sqrt", "abs": "Abs"}  # fmt: skip
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "maximum": "Max",
           "minimum": "Min"}  # fmt: skip


class _Writer:
    """Writes nodes, each operator by a method of its name."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[bytes] = []
        self.constants: dict[str, bytes] = {}

    def write(self, node: Node) -> None:
        """Append what computes a node; its last step gives the node's value."""
        for name in node.inputs:
            if name in self.graph.constants and name not in self.constants:
                self.constants[name] = wire.tensor(name, self.graph.constants[name])
        steps = getattr(self, f"_{node.op}")(node, node.attributes)
        added = node.inputs[3] if node.op in ("conv", "linear") else ""
        if added:
            steps.append(lambda x, out: self._add("Add", [x, added], out))
        steps += self._activation(node)
        at = node.inputs[0]
        for i, step in enumerate(steps):
            at = step(at, node.name if i == len(steps) - 1 else f"{node.name}/{i}")

    def _add(self, kind: str, inputs: Sequence[str], out: str, **attributes: Any) -> str:
        self.nodes.append(wire.node(kind, inputs, out, **attributes))
        return out

    def _constant(self, name: str, array: np.ndarray) -> str:
        self.constants[name] = wire.tensor(name, array)
        return name

    def _one(self, kind: str, *more: str, **attributes: Any) -> list[Any]:
        return [lambda x, out: self._add(kind, [x, *more], out, **attributes)]

    def _activation(self, node: Node) -> list[Any]:
        if not node.activation:
            return []
        name, *settings = node.activation
        if name in _SIMPLE:
            return self._one(_SIMPLE[name])
        if name == "clamp":
            ends = [
                self._constant(f"{node.name}/{i}", np.array(v, np.float32))
                for i, v in zip(("low", "high"), settings, strict=True)
            ]
            return self._one("Clip", *ends)
        if name in ("gelu", "gelu_tanh"):
            return self._one("Gelu", approximate="tanh" if name == "gelu_tanh" else "none")
        if name == "hardsigmoid":
            return self._one("HardSigmoid", alpha=1 / 6, beta=0.5)
        if name in ("leaky_relu", "elu"):
            return self._one(
                "LeakyRelu" if name == "leaky_relu" else "Elu", alpha=float(settings[0])
            )
        if name == "pow":
            exponent = self._constant(f"{node.name}/power", np.array(settings[0], np.float32))
            return self._one("Pow", exponent)
        if name == "rsqrt":
            return [*self._one("Sqrt"), *self._one("Reciprocal")]
        return [  # silu
            lambda x, out: self._add("Mul", [x, self._add("Sigmoid", [x], f"{out}/gate")], out)
        ]

    def _conv(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        more = [n for n in node.inputs[1:3] if n]
        pads = [p[0] for p in a["padding"]] + [p[1] for p in a["padding"]]
        return self._one("Conv", *more, strides=a["stride"], pads=pads, dilations=a["dilation"],
                         group=a["groups"])  # fmt: skip

    def _linear(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        w, b = node.inputs[1:3]
        if len(self.graph.values[node.name].shape) == 2:
            return self._one("Gemm", *([w, b] if b else [w]), transB=1)
        turned = self._constant(f"{w}/T", np.ascontiguousarray(self.graph.constants[w].T))
        return [*self._one("MatMul", turned), *(self._one("Add", b) if b else [])]

    def _affine(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        form = (-1, *[1] * (len(self.graph.values[node.name].shape) - 2))
        scale, shift = (
            self._constant(f"{node.name}/{n}", self.graph.constants[n].reshape(form))
            for n in node.inputs[1:]
        )
        return [*self._one("Mul", scale), *self._one("Add", shift)]

    def _unary(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        return []

    def _binary(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        return self._one(_BINARY[a["function"]], node.inputs[1])

    def _window(self, a: Mapping[str, Any]) -> dict[str, Any]:
        pads = [p[0] for p in a["padding"]] + [p[1] for p in a["padding"]]
        return {"kernel_shape": a["kernel"], "strides": a["stride"], "pads": pads}

    def _max_pool(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        return self._one("MaxPool", dilations=a["dilation"], **self._window(a))

    def _avg_pool(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        return self._one("AveragePool", count_include_pad=int(a["counted"]), **self._window(a))

    def _mean(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        axes = self._constant(f"{node.name}/axes", np.array(a["axes"], np.int64))
        return self._one("ReduceMean", axes, keepdims=int(a["keep"]))

    def _reshape(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        sizes = [-1 if d < 0 else d for d in a["shape"]]
        return self._one("Reshape", self._constant(f"{node.name}/shape", np.array(sizes, np.int64)))

    def _permute(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        return self._one("Transpose", perm=a["axes"])

    def _slice(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        rows = [
            (start or 0, np.iinfo(np.int64).max if stop is None else stop, axis, step or 1)
            for axis, (start, stop, step) in enumerate(a["index"])
        ]
        columns = zip(("starts", "ends", "axes", "steps"), zip(*rows, strict=True), strict=True)
        names = [
            self._constant(f"{node.name}/{part}", np.array(column, np.int64))
            for part, column in columns
        ]
        return self._one("Slice", *names)

    def _pad(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        around = np.array(a["pads"], np.int64).T.reshape(-1)
        value = self._constant(f"{node.name}/value", np.array(a["value"], np.float32))
        return self._one("Pad", self._constant(f"{node.name}/pads", around), value)

    def _cat(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        return self._one("Concat", *node.inputs[1:], axis=a["axis"])

    def _softmax(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        return self._one("Softmax", axis=a["axis"])

    def _layer_norm(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        x, scale, shift = node.inputs
        shape = self.graph.values[x].shape[-a["rank"] :]
        names = [
            n or self._constant(f"{node.name}/{i}", np.full(shape, fill, np.float32))
            for i, (n, fill) in enumerate(((scale, 1), (shift, 0)))
        ]
        return self._one("LayerNormalization", *names, axis=-a["rank"], epsilon=a["eps"])

    def _matmul(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        return self._one("MatMul", node.inputs[1])
