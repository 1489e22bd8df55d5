"""Recurrent layers as operators of ONNX: a plan's loop, and the product of its inputs before it.

Gates stand in another order there (LSTM: i, o, f, c; GRU: z, r, h), and the results are apart: the
states of all steps, the last state, the last cell. See
https://github.com/onnx/onnx/blob/main/docs/Operators.md#LSTM and #GRU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.runtime.plan import wire
from gossamer.runtime.plan.graph import Graph, Node, users

__all__ = ["OPERATORS", "Loop", "before", "inside", "refuses"]

Array = np.ndarray
_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}  # the gate of torch at each place in ONNX
OPERATORS = frozenset(_ORDER)
"""Loops."""


def refuses(graph: Graph, node: Node) -> str:
    """Why a loop is no operator of ONNX; "" where it is one together with the nodes before."""
    found = _found(graph, node)
    return found if isinstance(found, str) else ""


def before(graph: Graph, node: Node) -> tuple[Node, Node]:
    """The linear layer of the inputs and the reshape behind it; raises where :func:`refuses`."""
    found = _found(graph, node)
    if isinstance(found, str):
        raise ArgumentError(found)
    return found


def _found(graph: Graph, node: Node) -> tuple[Node, Node] | str:
    """What is before, or why it is not that."""
    made = {n.name: n for n in graph.nodes}
    shaped = made.get(node.inputs[0])
    linear = made.get(shaped.inputs[0]) if shaped is not None and shaped.op == "reshape" else None
    if shaped is None or linear is None or linear.op != "linear":
        return "the product of its inputs is not before it"
    if linear.activation or linear.inputs[3] or graph.values[node.inputs[0]].shape[0] < 1:
        return "more than the product of its inputs is before it"
    return linear, shaped


@dataclass(frozen=True)
class Loop:
    """A loop with what is before it.

    Attributes:
        graph: that it is of.
        node: the loop.
        before: the linear layer of its inputs, and the reshape behind it.
    """

    graph: Graph
    node: Node
    before: tuple[Node, Node]

    @classmethod
    def of(cls, graph: Graph, nodes: Sequence[Node], node: Node) -> Loop:
        """Of a loop among these nodes; :class:`ArgumentError` where what is before is not."""
        found = before(graph, node)
        if any(n not in nodes for n in found):
            raise ArgumentError("it is measured together with the product of its inputs alone")
        return cls(graph, node, found)

    @property
    def steps(self) -> int:
        """How many."""
        return self.graph.values[self.node.inputs[0]].shape[0]

    def part(self, node: Node) -> str | None:
        """The name of the loop's own result that a slice takes; None for any other node."""
        if node.op != "slice" or node.inputs[0] != self.node.name:
            return None
        (start, stop, step), *rest = node.attributes["index"]
        rows = self.graph.values[self.node.name].shape[0]
        at = (start or 0, rows if stop is None else stop)
        if step not in (None, 1) or any(r != [None, None, None] for r in rest):
            return None
        last = 0 if self.node.attributes["reverse"] else self.steps - 1
        places = {(0, self.steps): "states", (last, last + 1): "last"}
        if rows > self.steps:
            places[self.steps, self.steps + 1] = "cell"
        return f"{self.node.name}/{places[at]}" if at in places else None

    def written(self, whole: bool) -> tuple[list[bytes], dict[str, Array]]:
        """Nodes and constants; ``whole``: the plan's own value too, all rows in one."""
        node, (linear, _), constants = self.node, self.before, self.graph.constants
        op, name, units = node.op, node.name, self.graph.constants[node.inputs[1]].shape[1]
        into, state = (self._turned(constants[n]) for n in (linear.inputs[1], node.inputs[1]))
        gates = len(_ORDER[op])
        bias = np.zeros((2, gates * units), np.float32)
        if linear.inputs[2]:
            bias[0] = self._turned(constants[linear.inputs[2]])[0]
        first = list(node.inputs[2:])
        own = first.pop(0) if op == "gru" else ""
        if own:  # of the state's part of n, which is the last gate
            bias[1, 2 * units :] = constants[own]
        made = {f"{name}/W": into, f"{name}/R": state, f"{name}/B": bias.reshape(1, -1),
                f"{name}/axis": np.array([0], np.int64), f"{name}/way": np.array([1], np.int64),
                f"{name}/form": np.array([self.steps, -1, into.shape[2]], np.int64)}  # fmt: skip
        nodes = [wire.node("Reshape", [linear.inputs[0], f"{name}/form"], f"{name}/x")]
        given = [f"{name}/{n}" for n in ("x", "W", "R", "B")]
        if any(first):
            given.append("")
            for i, one in enumerate(first):
                given.append(f"{name}/first{i}" if one else "")
                if one:
                    nodes.append(wire.node("Unsqueeze", [one, f"{name}/axis"], f"{name}/first{i}"))
        gives = [f"{name}/all", f"{name}/last", *([f"{name}/cell"] if op == "lstm" else [])]
        more = {"linear_before_reset": 1} if op == "gru" else {}
        way = "reverse" if node.attributes["reverse"] else "forward"
        nodes.append(wire.node(op.upper(), given, gives, hidden_size=units, direction=way, **more))
        states = f"{name}/states"
        nodes.append(wire.node("Squeeze", [f"{name}/all", f"{name}/way"], states))
        if whole and op == "lstm":
            nodes.append(wire.node("Concat", [states, f"{name}/cell"], name, axis=0))
        elif whole:
            nodes.append(wire.node("Identity", [states], name))
        return nodes, made

    def _turned(self, rows: Array) -> Array:
        """Rows by gates, in ONNX's order, with the dimension of directions before."""
        parts = np.split(rows, len(_ORDER[self.node.op]))
        return np.concatenate([parts[i] for i in _ORDER[self.node.op]])[None]


def inside(graph: Graph, loops: Iterable[Loop]) -> frozenset[str]:
    """The nodes before loops whose values nobody else reads."""
    read = users(graph)
    found = set()
    for loop in loops:
        linear, shaped = loop.before
        if len(read[shaped.name]) == 1:
            found.add(shaped.name)
            if len(read[linear.name]) == 1:
                found.add(linear.name)
    return frozenset(found)
