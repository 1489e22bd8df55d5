"""The compiled float32 sparse kernels: zeros are left out, whatever their pattern.

``conv`` is a direct convolution over shifted copies of the map, and of a linear layer on a batch;
``rows`` multiplies one example after the other by compressed rows. Bias, the added value and the
clamp are computed as sums leave the kernel. Any other activation follows, compiled where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gossamer.core.kernels import kernel
from gossamer.runtime.kernels import conv
from gossamer.runtime.kernels.arrays import MOST_INPUTS
from gossamer.runtime.plan import small
from gossamer.runtime.plan.chains import chained
from gossamer.runtime.plan.graph import Graph, Node
from gossamer.runtime.plan.portable import finished
from gossamer.runtime.plan.stored import density, entries, once

__all__ = [
    "bias_of",
    "bind",
    "bind_rows",
    "both",
    "ends",
    "pack",
    "pack_rows",
    "refuses",
    "refuses_rows",
]

Call = Callable[[], object]
_DENSEST = 0.7  # beyond it dense kernels have always won, and packing takes time


class _Packed(NamedTuple):
    weight: Any
    bias: np.ndarray | None
    threads: int


def refuses(graph: Graph, node: Node) -> str:
    """Why a layer is not for the sparse convolution; "" for one that is."""
    if kernel("sparse_conv") is None:
        return "the compiled kernels are not built"
    if node.op == "conv" and (rank := len(graph.kind(node.inputs[1]).shape)) != 4:
        return f"a convolution of {rank - 2} dimensions"
    return _refuses(graph, node)


def refuses_rows(graph: Graph, node: Node) -> str:
    """Why a linear layer is not for compressed rows; "" for one that is."""
    if kernel("sparse_gemv") is None:
        return "the compiled kernels are not built"
    if node.inputs[3]:
        return "a value is added to its result"
    if (inputs := graph.kind(node.inputs[1]).shape[1]) > MOST_INPUTS:
        return f"{inputs} inputs"
    return _refuses(graph, node)


def _refuses(graph: Graph, node: Node) -> str:
    kind, weight = (graph.kind(name).dtype for name in node.inputs[:2])
    if (kind, weight) != ("float32", "float32"):
        return f"of {kind} and {weight}"
    kept = density(graph.constants, node.inputs[1])
    return f"density {kept:.2f} is above {_DENSEST}" if kept > _DENSEST else ""


def bias_of(graph: Graph, node: Node) -> np.ndarray | None:
    """A layer's bias."""
    return np.ascontiguousarray(graph.constants[node.inputs[2]]) if node.inputs[2] else None


def pack(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], threads: int
) -> _Packed:
    """The taps that are not zero, and the bias."""
    node, a = nodes[0], nodes[0].attributes

    def made() -> conv.SparseConv:
        weight = entries(graph.constants, node.inputs[1])
        if node.op == "linear":
            return conv.pack_conv(weight.reshaped(*weight.shape, 1, 1))
        (top, bottom), (left, right) = a["padding"]
        return conv.pack_conv(
            weight,
            stride=a["stride"],
            padding=[top, left, bottom, right],
            dilation=a["dilation"],
            groups=a["groups"],
            image=graph.kind(node.inputs[0]).shape[2:],
        )

    weight = once(graph.constants, node.name, conv.SparseConv, made)
    return _Packed(weight, bias_of(graph, node), threads)


def pack_rows(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], threads: int
) -> _Packed:
    """The rows' entries that are not zero, and the bias."""
    from gossamer.runtime.kernels import gemv  # a plan of convolutions loads without it

    node, held = nodes[0], graph.constants
    weight = once(
        held, node.name, gemv.SparseRows, lambda: gemv.pack_rows(entries(held, node.inputs[1]))
    )
    return _Packed(weight, bias_of(graph, node), threads)


def ends(a: Mapping[str, Any]) -> tuple[float, float, bool]:
    """The clamp that a kernel applies, and whether it is all of the activation."""
    name, *settings = a["activation"] or ["none"]
    known = {"none": (-np.inf, np.inf), "relu": (0.0, np.inf), "clamp": tuple(settings)}
    low, high = known.get(name, (-np.inf, np.inf))
    return low, high, name in known


def bind(
    packed: _Packed,
    nodes: Sequence[Node],
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    batch: int,
) -> Call:
    """The call on these arrays."""
    node, x, y = nodes[0], inputs[0], outputs[0]
    low, high, whole = ends(node.attributes)
    added = inputs[-1] if node.inputs[3] else None
    if node.op == "linear":
        x, y = (a.reshape(-1, a.shape[-1]) for a in (x, y))
        added = None if added is None else added.reshape(y.shape)

    def run(x: np.ndarray, y: np.ndarray, added: np.ndarray | None) -> Call:
        return conv.bound(
            packed.weight, x, y, bias=packed.bias, added=added, ends=(low, high),
            threads=packed.threads,
        )  # fmt: skip

    if node.op == "conv":
        call = run(x, y, added)
    elif len(x) == 1:  # the arrays as they are
        more = None if added is None else added.reshape(1, -1, 1, 1)
        call = run(x.reshape(1, -1, 1, 1), y.reshape(1, -1, 1, 1), more)
    else:
        call = _across(run, x, y, added)
    return call if whole else both(call, node.attributes, y)


def _across(run: Any, x: np.ndarray, y: np.ndarray, added: np.ndarray | None) -> Call:
    """A linear layer on several examples: a convolution of 1 x 1 with the examples as its map."""
    across = np.empty((1, x.shape[1], 1, len(x)), np.float32)
    over = np.empty((1, y.shape[1], 1, len(x)), np.float32)
    more = None if added is None else np.empty_like(over)
    inner = run(across, over, more)

    def call() -> None:
        across[0, :, 0] = x.T
        if more is not None and added is not None:
            more[0, :, 0] = added.T
        inner()
        np.copyto(y, over[0, :, 0].T)

    return call


def bind_rows(
    packed: _Packed,
    nodes: Sequence[Node],
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    batch: int,
) -> Call:
    """The call on these arrays, one example after the other."""
    weight = packed.weight
    x, y = (a.reshape(-1, a.shape[-1]) for a in (inputs[0], outputs[0]))
    if x.shape != (len(y), weight.shape[1]) or y.shape[1] != weight.shape[0]:
        raise ValueError(f"a linear layer of {x.shape} does not give {y.shape}")
    low, high, whole = ends(nodes[0].attributes)
    module: Any = kernel("sparse_gemv")
    calls = [
        module.Rows(weight.starts, weight.columns, weight.values, row, packed.bias, low, high, out,
                    packed.threads)
        for row, out in zip(x, y, strict=True)
    ]  # fmt: skip
    call = chained(calls)[0]
    return call if whole else both(call, nodes[0].attributes, y)


def both(first: Call, a: Mapping[str, Any], y: np.ndarray, *added: np.ndarray | None) -> Call:
    """A call, then additions to what it gives and the activation, in place."""
    compiled = small.finish(a, y, *added)
    if compiled is not None and hasattr(first, "step"):
        return chained([first, *compiled])[0]
    second = finished(a, y, *added)

    def call() -> None:
        first()
        second()

    return call
