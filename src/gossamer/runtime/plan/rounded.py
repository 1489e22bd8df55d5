"""A float32 graph in eight bits for dense engines: values rounded, weights in codes.

onnxruntime's and OpenVINO's integer kernels want what their quantizers write: activations of eight
bits (uint8, a zero point for each tensor) at both sides of every layer, addition and pool, and
weights with a scale for each output channel. Weights have **seven bits** (codes of -64 to 64), as
sums of two products saturate at 16 bits in those kernels on processors without VNNI; a channel that
lies on such a grid keeps it. Ranges are the extremes over the calibration inputs, as of the plan's
own integers (:mod:`gossamer.runtime.plan.calibration`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gossamer.runtime.kernels.eight_bits import TOP, Scale
from gossamer.runtime.onnx_int8 import grid
from gossamer.runtime.plan.calibration import scales
from gossamer.runtime.plan.graph import Graph, Node, Value
from gossamer.runtime.plan.int8 import able

__all__ = ["rounded"]

Array = np.ndarray
_CODES, _MOST = 255, 64  # the greatest code of a value, and of a weight
_FEW = 4 * _MOST  # values that a row may have to be looked at as a grid
_CONV = ("stride", "padding", "dilation", "groups", "activation")


def rounded(
    graph: Graph,
    islands: Sequence[object],
    batches: Sequence[Sequence[Array]],
    kept: Collection[str],
) -> Graph:
    """The graph in eight bits.

    Args:
        graph: float32, fused.
        islands: of what was left to torch.
        batches: calibration inputs.
        kept: names of nodes that stay float32.

    Raises :class:`ArgumentError` for calibration inputs that are NaN or infinite.
    """
    apart = _apart(graph)
    layers = {n.name for n in able(apart)}
    layers -= {*kept, *(f"{name}/product" for name in kept)}
    return _Walk(apart, scales(apart, islands, batches), layers).run()


def _apart(graph: Graph) -> Graph:
    """Layers and the additions behind them as two nodes: the product has a range of its own."""
    nodes: list[Node] = []
    values = dict(graph.values)
    for node in graph.nodes:
        if node.op not in ("conv", "linear") or not node.inputs[3]:
            nodes.append(node)
            continue
        name = f"{node.name}/product"
        values[name] = values[node.name]
        plain = {**node.attributes, "activation": None}
        nodes.append(
            node._replace(inputs=(*node.inputs[:3], ""), outputs=(name,), attributes=plain)
        )
        added = {"function": "add", "activation": node.activation}
        nodes.append(Node("binary", (name, node.inputs[3]), node.outputs, added))
    return graph._replace(nodes=tuple(nodes), values=values).check()


def _codes(weight: Array) -> tuple[Array, Array]:
    """Codes of -64 to 64, and each output channel's scale."""
    rows = weight.reshape(len(weight), -1)
    top = np.abs(rows).max(1).astype(np.float64)
    steps = np.where(top > 0, top / _MOST, 1.0)
    if len(np.unique(rows[0])) <= _FEW:
        exact = grid(rows, _MOST)
        steps = np.where(np.isnan(exact), steps, exact)
    codes = np.rint(rows / steps[:, None]).astype(np.int8)
    return codes.reshape(weight.shape), steps.astype(np.float32)


@dataclass
class _Walk:
    """One walk over the graph.

    Attributes:
        scales: value -> of seven bits, whose range is taken over.
        layers: that have weights in codes.
        coded: values that are read rounded.
    """

    graph: Graph
    scales: Mapping[str, Scale]
    layers: Collection[str]
    nodes: list[Node] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    coded: dict[str, tuple[float, int]] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)

    def run(self) -> Graph:
        graph = self.graph
        self.values, self.constants = dict(graph.values), dict(graph.constants)
        for node in graph.nodes:
            if node.name in self.layers:
                self._layer(node)
                continue
            passes = node.op in ("max_pool", "reshape") and node.inputs[0] in self.coded
            adds = self._adds(node)
            given = [
                self._rounded(n) if n in self.coded or (adds and n) else n for n in node.inputs
            ]
            self.nodes.append(node._replace(inputs=tuple(given)))
            if passes:  # the same codes
                self.coded[node.name] = self.coded[node.inputs[0]]
            elif adds:
                self._code(node.name)
        read = {n for node in self.nodes for n in node.inputs}
        constants = {n: a for n, a in self.constants.items() if n in read}
        made = graph._replace(nodes=tuple(self.nodes), values=self.values, constants=constants)
        return made.check()

    def _adds(self, node: Node) -> bool:
        """Whether two maps or rows are added, one of them rounded."""
        if node.op != "binary" or node.attributes["function"] != "add":
            return False
        same = len({self.graph.kind(n) for n in (*node.inputs, node.name)}) == 1
        known = all(n in self.scales for n in (*node.inputs, node.name))
        return same and known and any(n in self.coded for n in node.inputs)

    def _code(self, name: str) -> None:
        """A value's eight bits, over the range of its seven."""
        seven = self.scales[name]
        self.coded[name] = seven.scale * TOP / _CODES, round(seven.zero * _CODES / TOP)

    def _rounded(self, name: str) -> str:
        """A value with eight bits, made where it is not there."""
        if name not in self.made:
            if name not in self.coded:
                self._code(name)
            scale, zero = self.coded[name]
            self.made[name] = made = f"{name}/rounded"
            self.values[made] = self.values[name]
            self.nodes.append(Node("round_u8", (name,), (made,), {"scale": scale, "zero": zero}))
        return self.made[name]

    def _layer(self, node: Node) -> None:
        x, weight, bias, _ = node.inputs
        names = (f"{weight}*{node.name}/codes", f"{weight}*{node.name}/scale")
        self.constants |= dict(zip(names, _codes(self.constants[weight]), strict=True))
        source = self._rounded(x)
        kept = _CONV if node.op == "conv" else ("activation",)
        attributes = {k: node.attributes[k] for k in kept}
        made = Node(f"{node.op}_w8", (source, *names, bias), node.outputs, attributes)
        self.nodes.append(made)
        self._code(node.name)
