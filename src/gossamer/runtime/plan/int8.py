"""A float32 graph with some of its layers on codes of seven bits.

Weights get codes of -127 to 127 and a scale for each output channel; activations codes of 0 to 127,
a scale and a zero point for each tensor (0 behind a ReLU). Bias, activation, the added value and
the requantization are inside the layer. A value between two integer layers stays in codes, through
max-pools, slices, padding with zeros and flattening too: a flattened map is the map's own memory,
and the next layer's columns are put in its order. Else ``quantize`` and ``dequantize`` stand
between.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gossamer.runtime.kernels.arrays import MOST_INPUTS
from gossamer.runtime.kernels.conv_int8 import weight_codes
from gossamer.runtime.kernels.eight_bits import TOP, Scale
from gossamer.runtime.plan.graph import Graph, Node, Value, users

__all__ = ["Lowering", "able"]

_HUGE = 3.4e38  # JSON has no infinity
Array = np.ndarray


def able(graph: Graph) -> list[Node]:
    """The layers that have an integer form, in order."""
    return [node for node in graph.nodes if _able(graph, node)]


def _able(graph: Graph, node: Node) -> bool:
    if node.op not in ("conv", "linear") or (node.activation or ["relu"])[0] not in (
        "relu",
        "clamp",
    ):
        return False
    weight, rank = graph.constants[node.inputs[1]], len(graph.values[node.name].shape)
    if weight.dtype != np.float32 or not weight.size or weight[0].size > MOST_INPUTS:
        return False
    if any(graph.kind(n).dtype != "float32" or n in graph.constants
           for n in (node.inputs[0], node.inputs[3]) if n):  # fmt: skip
        return False
    if not np.isfinite(weight).all():
        return False
    return rank == 4 if node.op == "conv" else rank == 2 and not node.inputs[3]


@dataclass(frozen=True)
class _Codes:
    """A value in codes: its name, what codes mean, and of a flattened map (C, H, W)."""

    name: str
    scale: Scale
    flat: tuple[int, ...] = ()


class Lowering:
    """Integer forms of a graph's layers; each layer's weight is quantized once.

    Args:
        graph: float32, fused.
        scales: of every value that may become codes.
    """

    def __init__(self, graph: Graph, scales: Mapping[str, Scale]) -> None:
        self.graph, self.scales = graph, scales
        self._users = users(graph)
        self._weights: dict[tuple[str, tuple[int, ...]], tuple[Array, ...]] = {}

    def alone(self, node: Node) -> Lowering:
        """Of one layer's graph, from floats to floats."""
        inputs = tuple(dict.fromkeys(n for n in (node.inputs[0], node.inputs[3]) if n))
        values = {n: self.graph.values[n] for n in (*inputs, node.name)}
        small = Graph(inputs, (node.name,), (node,), values, self.graph.constants)
        made = Lowering(small, self.scales)
        made._weights = self._weights
        return made

    def graph_of(self, chosen: Collection[str]) -> Graph:
        """The graph with these layers (their names) in integers; without any, the graph itself."""
        if not chosen:
            return self.graph
        return _Mixed(self, chosen).run()

    def codes(self, node: Node, flat: tuple[int, ...]) -> tuple[Array, ...]:
        """A layer's weight in codes, and each channel's scale and sum of codes.

        ``flat``: (C, H, W) of the map that its input is flattened of; () for rows as they are.
        """
        key = node.name, flat
        if key not in self._weights:
            if not flat:
                codes, scale = weight_codes(self.graph.constants[node.inputs[1]])
                sums = codes.reshape(len(codes), -1).sum(1, dtype=np.int64)
            else:
                codes, scale, sums = self.codes(node, ())
                c, h, w = flat
                full: Array = np.zeros((len(codes), -(-c // 4) * 4, h, w), np.int8)
                full[:, :c] = codes.reshape(-1, c, h, w)
                quads = full.reshape(len(codes), -1, 4, h, w).transpose(0, 1, 3, 4, 2)
                codes = np.ascontiguousarray(quads.reshape(len(codes), -1))
            self._weights[key] = codes, scale, sums
        return self._weights[key]

    def wanted(self, name: str, chosen: Collection[str]) -> bool:
        """Whether an integer layer reads a value, perhaps through pools and flattening."""
        return any(
            user.name in chosen
            or (self.passes(user) and self.wanted(user.name, chosen))
            for user in self._users.get(name, ())
        )  # fmt: skip

    def passes(self, node: Node) -> bool:
        """Whether codes go through an operator as they are."""
        if node.op not in ("max_pool", "reshape", "slice", "pad"):
            return False
        have, want = (self.graph.kind(n).shape for n in (node.inputs[0], node.name))
        if node.op == "max_pool":
            return len(have) == 4 and node.inputs[0] in self.graph.values
        if node.op in ("slice", "pad"):
            return len(have) == 4 and _in_quads(node, have[1], 0) is not None
        return (len(have), len(want)) == (4, 2) and have[0] == want[0]


class _Mixed:
    """One walk over the graph."""

    def __init__(self, lowering: Lowering, chosen: Collection[str]) -> None:
        self.of, self.graph, self.chosen = lowering, lowering.graph, chosen
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {n: self.graph.values[n] for n in self.graph.inputs}
        self.constants = dict(self.graph.constants)
        self.coded: dict[str, _Codes] = {}
        self.views: dict[str, Node] = {}  # flattened maps whose floats nobody has asked for yet

    def run(self) -> Graph:
        graph = self.graph
        for node in graph.nodes:
            if node.name in self.chosen:
                self._layer(node)
            elif self.of.passes(node) and self.of.wanted(node.name, self.chosen) and (
                node.inputs[0] in self.coded and not self.coded[node.inputs[0]].flat
            ):  # fmt: skip
                self._through(node)
            else:
                for name in dict.fromkeys(node.inputs):
                    self._float(name)
                self._add(node, [graph.values[n] for n in node.outputs])
        for name in graph.outputs:
            self._float(name)
        read = {n for node in self.nodes for n in node.inputs}
        constants = {n: a for n, a in self.constants.items() if n in read}
        made = Graph(graph.inputs, graph.outputs, tuple(self.nodes), self.values, constants)
        return made.check()

    def _add(self, node: Node, kinds: list[Value]) -> None:
        self.nodes.append(node)
        self.values |= dict(zip(node.outputs, kinds, strict=True))

    def _float(self, name: str) -> None:
        """Make a value's floats, where they are not there."""
        if not name or name in self.values or name in self.graph.constants:
            return
        if name in self.views:
            node = self.views.pop(name)
            self._float(node.inputs[0])
            self._add(node, [self.graph.values[name]])
            return
        codes, kind = self.coded[name], self.graph.values[name]
        a = {"scale": codes.scale.scale, "zero": codes.scale.zero, "channels": kind.shape[1]}
        self._add(Node("dequantize", (codes.name,), (name,), a), [kind])

    def _codes(self, name: str) -> _Codes:
        """A value's codes, made where they are not there."""
        if name not in self.coded:
            scale, kind = self.of.scales[name], self.graph.values[name]
            self._float(name)
            a = {"scale": scale.scale, "zero": scale.zero}
            self._add(Node("quantize", (name,), (f"{name}/codes",), a), [_coded(kind)])
            self.coded[name] = _Codes(f"{name}/codes", scale)
        return self.coded[name]

    def _through(self, node: Node) -> None:
        """A pool, or a map flattened, in codes."""
        codes, name = self.coded[node.inputs[0]], f"{node.name}/codes"
        kind = _coded(self.graph.values[node.name])
        flat: tuple[int, ...] = ()
        if node.op == "max_pool":
            made = Node("max_pool_int8", (codes.name,), (name,), dict(node.attributes))
        elif node.op in ("slice", "pad"):
            channels = self.graph.values[node.inputs[0]].shape[1]
            a = _in_quads(node, channels, codes.scale.zero)
            made = Node(node.op, (codes.name,), (name,), a or {})
        else:
            n, c, h, w = self.graph.values[node.inputs[0]].shape
            kind, flat = Value((n, -(-c // 4) * h * w * 4), "uint8"), (c, h, w)
            made = Node("reshape", (codes.name,), (name,), {"shape": list(kind.shape)})
            self.views[node.name] = node
        self._add(made, [kind])
        self.coded[node.name] = _Codes(name, codes.scale, flat)

    def _layer(self, node: Node) -> None:
        """A layer from codes to codes, or to floats where no integer layer reads them."""
        x, weight, bias, added = node.inputs
        source = self._codes(x)
        codes, scale, sums = self.of.codes(node, source.flat)
        a, name = node.attributes, node.name
        kind = self.graph.values[name]
        factor = scale * source.scale.scale
        shift = self.graph.constants[bias].astype(np.float64) if bias else np.zeros(len(codes))
        shift = shift - factor * source.scale.zero * sums
        low, high = _ends(node)
        step = 1.0
        if self.of.wanted(name, self.chosen):
            target, kind = self.of.scales[name], _coded(kind)
            factor, shift = factor / target.scale, shift / target.scale + target.zero
            low, high = (float(np.clip(np.rint(v / target.scale + target.zero), 0, TOP))
                         for v in (low, high))  # fmt: skip
            if added:
                more = self._codes(added)
                step = more.scale.scale / target.scale
                shift, added = shift - step * more.scale.zero, more.name
            self.coded[name] = _Codes(f"{name}/codes", target)
            name = f"{name}/codes"
        elif added:
            self._float(added)
        ends = {"low": low, "high": high}
        names = [f"{weight}*{node.name}/{part}" for part in ("codes", "factor", "shift")]
        arrays = codes, factor.astype(np.float32), shift.astype(np.float32)
        self.constants |= dict(zip(names, arrays, strict=True))
        if node.op == "linear":
            made = Node("linear_int8", (source.name, *names), (name,), ends)
        else:
            more_of = {k: a[k] for k in ("stride", "padding", "dilation", "groups")}
            more_of |= {"zero": source.scale.zero, "step": step, **ends}
            made = Node("conv_int8", (source.name, *names, added), (name,), more_of)
        self._add(made, [kind])


def _in_quads(node: Node, channels: int, zero: int) -> dict[str, Any] | None:
    """A slice or a padding of (N, C, H, W) as one of (N, quads, H, W, 4); None where it is none.

    ``zero``: the code of zero.
    """
    if node.op == "pad":
        batch, (before, after), *rest = node.attributes["pads"]
        if node.attributes["value"] or before % 4 or after % 4 or (after and channels % 4):
            return None
        pads = [batch, [before // 4, after // 4], *rest, [0, 0]]
        return {"pads": pads, "value": float(zero)}
    batch, among, *rest = node.attributes["index"]
    start, stop, step = slice(*among).indices(channels)
    if step != 1 or start % 4 or (stop % 4 and stop != channels):
        return None
    return {"index": [batch, [start // 4, -(-stop // 4), 1], *rest, [None, None, None]]}


def _ends(node: Node) -> tuple[float, float]:
    name, *settings = node.activation or ["none"]
    if name == "clamp":
        return settings[0], settings[1]
    return (0.0 if name == "relu" else -_HUGE), _HUGE


def _coded(kind: Value) -> Value:
    """What a value is in codes."""
    n, c, *rest = kind.shape
    return Value((n, -(-c // 4), *rest, 4) if rest else kind.shape, "uint8")
