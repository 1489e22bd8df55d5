"""Graphs rewritten: batch-norm folded, activations and additions drawn into what they follow.

Every pass takes a graph and gives one that computes the same up to rounding. A value that somebody
else reads, or that the network gives, is never fused away.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gossamer.runtime.plan.capture import pruned
from gossamer.runtime.plan.graph import Graph, Node, users

__all__ = ["PASSES", "fused"]

_LAYERS = ("conv", "linear")
_WITH_ACTIVATION = (*_LAYERS, "affine", "binary")


def fused(graph: Graph) -> Graph:
    """The graph after every pass of :data:`PASSES`."""
    for one in PASSES:
        graph = one(graph)
    return graph.check()


def _pairs(graph: Graph, join: Callable[[Graph, Node, Node], Node | None]) -> Graph:
    """Replace a node and the only reader of its value by one node, as long as ``join`` gives one.

    The one stands where the second stood, so that whatever it reads is there.
    """
    constants = dict(graph.constants)
    graph = graph._replace(constants=constants)  # passes add to these
    while True:
        read = users(graph)
        for first in graph.nodes:
            readers = read.get(first.name, [])
            if len(readers) != 1 or first.name in graph.outputs or len(first.outputs) != 1:
                continue
            if (made := join(graph, first, readers[0])) is not None:
                nodes = [made if n is readers[0] else n for n in graph.nodes if n is not first]
                graph = graph._replace(nodes=tuple(nodes))
                break
        else:
            return pruned(graph)


def _vector(graph: Graph, name: str, size: int) -> np.ndarray | None:
    """A constant that is one number for each of ``size`` channels: (size,), or one for all."""
    array = graph.constants.get(name)
    if array is None or array.size not in (1, size):
        return None
    return np.broadcast_to(array.reshape(-1), (size,))


def _affine(graph: Graph, first: Node, second: Node) -> Node | None:
    """A convolution or linear layer, then scale and shift of its channels."""
    if second.op != "affine" or first.op not in _LAYERS or first.activation or first.inputs[3]:
        return None
    if first.op == "linear" and len(graph.values[first.name].shape) != 2:
        return None  # the channels of (N, C, features) are no rows of the weight
    scale, shift = (graph.constants[n].astype(np.float64) for n in second.inputs[1:])
    x, w, b, _ = first.inputs
    weight = graph.constants[w].astype(np.float64)
    bias = graph.constants[b].astype(np.float64) if b else 0.0
    made = {
        f"{w}*{second.name}": weight * scale.reshape(-1, *[1] * (weight.ndim - 1)),
        f"{w}+{second.name}": bias * scale + shift,
    }
    for name, array in made.items():
        graph.constants[name] = array.astype(np.float32)  # type: ignore[index]  # made by _pairs
    attributes = {**first.attributes, "activation": second.activation}
    return Node(first.op, (x, *made, ""), second.outputs, attributes)


def _activation(graph: Graph, first: Node, second: Node) -> Node | None:
    """Something, then a function of its result."""
    if second.op != "unary" or first.op not in _WITH_ACTIVATION or first.activation:
        return None
    attributes = {**first.attributes, "activation": second.activation}
    return first._replace(outputs=second.outputs, attributes=attributes)


def _addition(graph: Graph, first: Node, second: Node) -> Node | None:
    """A layer, then the sum with a value of the same shape: a residual connection."""
    if second.op != "binary" or second.attributes["function"] != "add" or first.op not in _LAYERS:
        return None
    if first.activation or first.inputs[3] or len(set(second.inputs)) != 2:
        return None
    other = next(n for n in second.inputs if n != first.name)
    if other in graph.constants or graph.kind(other) != graph.values[first.name]:
        return None
    attributes = {**first.attributes, "activation": second.activation}
    return Node(first.op, (*first.inputs[:3], other), second.outputs, attributes)


def _bias(graph: Graph, first: Node, second: Node) -> Node | None:
    """A layer, then a constant for each of its channels added."""
    if second.op != "binary" or second.attributes["function"] != "add" or first.op not in _LAYERS:
        return None
    other = next((n for n in second.inputs if n in graph.constants), None)
    if first.activation or first.inputs[3] or other is None:
        return None
    size, shape = len(graph.constants[first.inputs[1]]), graph.constants[other].shape
    axis = 1 if first.op == "conv" else len(graph.values[first.name].shape) - 1
    place = axis - (len(graph.values[first.name].shape) - len(shape))
    wide = [i for i, d in enumerate(shape) if d != 1]
    added = _vector(graph, other, size)
    if added is None or wide not in ([], [place]):
        return None
    if graph.values[first.name] != graph.values[second.name]:
        return None  # a constant of more dimensions, which the sum has too
    held = graph.constants[first.inputs[2]] if first.inputs[2] else np.float32(0)
    name = f"{first.inputs[1]}+{second.name}"
    graph.constants[name] = (held + added).astype(np.float32)  # type: ignore[index]  # as above
    attributes = {**first.attributes, "activation": second.activation}
    return Node(first.op, (*first.inputs[:2], name, ""), second.outputs, attributes)


def _slices(graph: Graph, first: Node, second: Node) -> Node | None:
    """Two slices, each of other dimensions."""
    if first.op != "slice" or second.op != "slice":
        return None
    whole = [None, None, None]
    index: list[Any] = []
    for one, other in zip(first.attributes["index"], second.attributes["index"], strict=True):
        if whole not in (one, other):
            return None
        index.append(other if one == whole else one)
    return first._replace(outputs=second.outputs, attributes={"index": index})


def _reshapes(graph: Graph, first: Node, second: Node) -> Node | None:
    """Two reshapes are the last one."""
    if first.op != "reshape" or second.op != "reshape":
        return None
    return second._replace(inputs=first.inputs)


def _padded(graph: Graph, first: Node, second: Node) -> Node | None:
    """Zeros around a map, then a convolution that pads."""
    if first.op != "pad" or second.op != "conv" or first.attributes["value"]:
        return None
    around = first.attributes["pads"]
    if any(sum(p) for p in around[:2]) or second.inputs[0] != first.name:
        return None
    if second.inputs[3] == first.name:
        return None
    pairs = zip(second.attributes["padding"], around[2:], strict=True)
    padding = [[a + c, b + d] for (a, b), (c, d) in pairs]
    inputs = (first.inputs[0], *second.inputs[1:])
    return second._replace(inputs=inputs, attributes={**second.attributes, "padding": padding})


def _broadcast(graph: Graph, first: Node, second: Node) -> Node | None:
    """A constant that is spread by adding it to zeros, then added: added as it is."""
    if first.op != "binary" or second.op != "binary" or second.attributes["function"] != "add":
        return None
    if first.attributes["function"] != "add" or first.activation or len(set(second.inputs)) != 2:
        return None
    filled = {n.name for n in graph.nodes if n.op == "fill" and not n.attributes["value"]}
    spread = next((n for n in first.inputs if n in graph.constants), None)
    other = next(n for n in second.inputs if n != first.name)
    if spread is None or not filled & set(first.inputs) or other in graph.constants:
        return None
    if graph.kind(other) != graph.values[second.name]:
        return None
    return second._replace(inputs=(other, spread))


def _nothing(graph: Graph, first: Node, second: Node) -> Node | None:
    """Zeros added."""
    if second.op != "binary" or second.attributes["function"] != "add" or second.activation:
        return None
    other = next((graph.constants[n] for n in second.inputs if n in graph.constants), None)
    if other is None or other.any() or graph.values[first.name] != graph.values[second.name]:
        return None
    return first._replace(outputs=second.outputs)


def _again(graph: Graph, first: Node, second: Node) -> Node | None:
    """What is no longer negative, then ReLU."""
    if second.op != "unary" or second.attributes["activation"] != ["relu"]:
        return None
    return first._replace(outputs=second.outputs) if first.activation == ["relu"] else None


PASSES: tuple[Callable[[Graph], Graph], ...] = tuple(
    partial(_pairs, join=join)
    for join in (
        _padded, _reshapes, _slices, _broadcast, _nothing, _affine, _bias, _activation, _addition,
        _activation, _again,
    )
)  # fmt: skip
"""In this order: an addition behind an activation stays an operator of its own."""
