"""The compiled float32 sparse kernels: zeros are left out, whatever their pattern.

Bias, the added value and the clamp are computed as sums leave the kernel. Any other activation
follows in numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from gossamer.core.kernels import kernel
from gossamer.runtime.plan.graph import Graph, Node
from gossamer.runtime.plan.portable import finished

__all__ = ["SERVES", "bind", "pack", "refuses"]

Call = Callable[[], object]
SERVES = frozenset({"conv", "linear"})
_DENSEST = 0.7  # beyond it dense kernels have always won, and packing takes time


@dataclass(frozen=True)
class _Packed:
    weight: Any
    bias: np.ndarray | None
    threads: int


def refuses(graph: Graph, node: Node) -> str:
    """Why a layer is not for the sparse kernels; "" for one that is."""
    if kernel("sparse_conv") is None:
        return "the compiled kernels are not built"
    weight = graph.constants[node.inputs[1]]
    if node.op == "conv" and weight.ndim != 4:
        return f"a convolution of {weight.ndim - 2} dimensions"
    if node.op == "linear" and len(graph.values[node.name].shape) != 2:
        return "on more than two dimensions"
    if graph.kind(node.inputs[0]).dtype != "float32":
        return f"of {graph.kind(node.inputs[0]).dtype}"
    density = np.count_nonzero(weight) / max(1, weight.size)
    return f"density {density:.2f} is above {_DENSEST}" if density > _DENSEST else ""


def pack(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], threads: int
) -> _Packed:
    """The taps that are not zero, and the bias."""
    node, a = nodes[0], nodes[0].attributes
    weight = graph.constants[node.inputs[1]]
    settings: dict[str, Any] = {}
    if node.op == "linear":
        weight = weight.reshape(*weight.shape, 1, 1)
    else:
        (top, bottom), (left, right) = a["padding"]
        settings = {
            "stride": a["stride"],
            "padding": [top, left, bottom, right],
            "dilation": a["dilation"],
            "groups": a["groups"],
        }
    made = import_module("gossamer.runtime.kernels.conv").pack_conv(
        np.ascontiguousarray(weight), **settings
    )
    bias = graph.constants[node.inputs[2]] if node.inputs[2] else None
    return _Packed(made, bias, threads)


def _clamp(a: Mapping[str, Any]) -> tuple[float, float] | None:
    """What an activation that only clamps allows; None for another."""
    name, *settings = a["activation"] or ["none"]
    ends = {"none": (-np.inf, np.inf), "relu": (0.0, np.inf), "clamp": tuple(settings)}
    return ends.get(name)


def bind(
    packed: _Packed,
    nodes: Sequence[Node],
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    batch: int,
) -> Call:
    """The call on these arrays."""
    node, clamp = nodes[0], _clamp(nodes[0].attributes)
    x, y = inputs[0], outputs[0]
    run = partial(
        import_module("gossamer.runtime.kernels.conv").convolve,
        packed.weight,
        bias=packed.bias,
        clamp=clamp or (-np.inf, np.inf),
        threads=packed.threads,
    )
    added = inputs[-1] if node.inputs[3] else None
    if node.op == "conv":
        call: Call = partial(run, x, residual=added, out=y)
    elif len(x) == 1:  # the arrays as they are
        more = None if added is None else added.reshape(1, -1, 1, 1)
        call = partial(run, x.reshape(1, -1, 1, 1), residual=more, out=y.reshape(1, -1, 1, 1))
    else:
        call = _batch(run, x, y, added)
    return call if clamp is not None else _both(call, finished(node.attributes, y))


def _batch(run: Any, x: np.ndarray, y: np.ndarray, added: np.ndarray | None) -> Call:
    """A linear layer on several examples: a convolution of 1 x 1 with the examples as its map."""
    across = np.empty((1, x.shape[1], 1, len(x)), np.float32)
    over = np.empty((1, y.shape[1], 1, len(x)), np.float32)

    def call() -> None:
        across[0, :, 0] = x.T
        run(across, out=over)
        np.copyto(y, over[0, :, 0].T)

    if added is None:
        return call
    more = np.empty_like(over)

    def call_with() -> None:
        across[0, :, 0], more[0, :, 0] = x.T, added.T
        run(across, residual=more, out=over)
        np.copyto(y, over[0, :, 0].T)

    return call_with


def _both(first: Call, second: Call) -> Call:
    def call() -> None:
        first()
        second()

    return call
