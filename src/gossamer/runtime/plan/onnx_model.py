"""Nodes of a plan as an ONNX model, float32 or in eight bits, for engines that read one.

A recurrent layer's loop and the product of its inputs, which a plan computes apart, are one
operator of ONNX (:mod:`gossamer.runtime.plan.onnx_recurrent`). Operators in eight bits are written
in the QDQ form: a value is quantized and dequantized, weights and biases are dequantized codes, and
the engine fuses what lies between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gossamer.runtime.plan import onnx_recurrent, wire
from gossamer.runtime.plan.graph import Graph, Node, users

__all__ = ["model"]

_MOST_BIAS = 2**31 - 1


def model(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str]
) -> bytes:
    """Nodes as an ONNX model; raises :class:`ArgumentError` for a part of a recurrent layer."""
    writer = _Writer(graph, nodes, outputs)
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


def _window_of(a: Mapping[str, Any]) -> dict[str, Any]:
    """Of a convolution."""
    pads = [p[0] for p in a["padding"]] + [p[1] for p in a["padding"]]
    return {"strides": a["stride"], "pads": pads, "dilations": a["dilation"], "group": a["groups"]}


class _Writer:
    """Writes nodes, each operator by a method of its name."""

    def __init__(self, graph: Graph, nodes: Sequence[Node], outputs: Sequence[str]) -> None:
        self.graph = graph
        self.nodes: list[bytes] = []
        self.constants: dict[str, bytes] = {}
        self._loops = {n.name: onnx_recurrent.Loop.of(graph, nodes, n)
                       for n in nodes if n.op in onnx_recurrent.OPERATORS}  # fmt: skip
        self._inside = onnx_recurrent.inside(graph, self._loops.values())
        self._wanted, self._nodes = frozenset(outputs), tuple(nodes)

    def write(self, node: Node) -> None:
        """Append what computes a node; its last step gives the node's value."""
        if node.name in self._inside and node.name not in self._wanted:
            return
        for name in node.inputs:
            if name in self.graph.constants and name not in self.constants:
                self.constants[name] = wire.tensor(name, self.graph.constants[name])
        if node.name in self._loops:
            self._loop(self._loops[node.name])
            return
        if (part := self._part(node)) is not None:
            self._add("Identity", [part], node.name)
            return
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
        return self._one("Conv", *(n for n in node.inputs[1:3] if n), **_window_of(a))

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

    def _loop(self, loop: onnx_recurrent.Loop) -> None:
        """All steps; where somebody reads it as the plan has it, the rows one behind the other."""
        readers = users(self.graph).get(loop.node.name, [])
        whole = loop.node.name in self._wanted or any(
            n not in self._nodes or loop.part(n) is None for n in readers
        )
        nodes, constants = loop.written(whole)
        self.nodes += nodes
        self.constants |= {name: wire.tensor(name, a) for name, a in constants.items()}

    def _part(self, node: Node) -> str | None:
        """The result of a loop that a slice takes, where it is one of the loop's own."""
        loop = self._loops.get(node.inputs[0]) if node.inputs else None
        return loop.part(node) if loop is not None else None

    def _round_u8(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        more = [
            self._constant(f"{node.name}/scale", np.array(a["scale"], np.float32)),
            self._constant(f"{node.name}/zero", np.array(a["zero"], np.uint8)),
        ]
        return [*self._one("QuantizeLinear", *more), *self._one("DequantizeLinear", *more)]

    def _weights(self, node: Node) -> list[str]:
        """The dequantized weight and bias; a bias in units of what the sums count."""
        _, w, scale, bias = node.inputs
        codes, steps = self.graph.constants[w], self.graph.constants[scale]
        zeros = self._constant(f"{node.name}/zeros", np.zeros(len(codes), np.int8))
        found = [self._add("DequantizeLinear", [w, scale, zeros], f"{node.name}/weight", axis=0)]
        if not bias:
            return found
        source = next((n for n in self.graph.nodes if n.name == node.inputs[0]), None)
        if source is None or source.op != "round_u8":
            return [*found, bias]
        units = steps.astype(np.float64) * source.attributes["scale"]
        whole = np.rint(self.graph.constants[bias] / units).clip(-_MOST_BIAS, _MOST_BIAS)
        names = [self._constant(f"{node.name}/bias", whole.astype(np.int32)),
                 self._constant(f"{node.name}/units", units.astype(np.float32))]  # fmt: skip
        return [*found, self._add("DequantizeLinear", names, f"{node.name}/shift", axis=0)]

    def _conv_w8(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        return self._one("Conv", *self._weights(node), **_window_of(a))

    def _linear_w8(self, node: Node, a: Mapping[str, Any]) -> list[Any]:
        return self._one("Gemm", *self._weights(node), transB=1)

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
