"""The compiled kernels on codes of seven bits: what is zero is left out, whatever its pattern.

Bias, ReLU, the added value and the requantization are computed as sums leave the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels import conv, conv_int8, gemv_int8
from gossamer.runtime.kernels.arrays import MOST_INPUTS
from gossamer.runtime.kernels.eight_bits import Scale
from gossamer.runtime.plan.chains import Refusing, chained
from gossamer.runtime.plan.graph import Graph, Node
from gossamer.runtime.plan.portable_int8 import affine, clamps, fits, no_nan
from gossamer.runtime.plan.stored import entries, once

__all__ = ["bind", "pack", "pack_pairs", "refuses", "rows_of_codes"]

Array = np.ndarray
Call = Callable[[], object]
_MODULES = {"linear_int8": "sparse_gemv", "conv_int8": "sparse_conv"}


class _Packed(NamedTuple):
    weight: Any
    factor: Any  # a float for each channel, or for all
    shift: Any
    threads: int


def refuses(graph: Graph, node: Node) -> str:
    """Why a node is not for the compiled kernels; "" for one that is."""
    if kernel(_MODULES.get(node.op, "quads")) is None:
        return "the compiled kernels are not built"
    if node.op in ("conv_int8", "linear_int8"):
        inputs = math.prod(graph.kind(node.inputs[1]).shape[1:])
        if inputs > MOST_INPUTS:
            return f"{inputs} inputs"
    elif len(graph.values[node.name].shape) == 2:
        return "no map"
    return ""


def pack(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], threads: int
) -> _Packed:
    """The codes that are not zero, in fours."""
    return _pack(graph, nodes[0], threads, "quads")


def pack_pairs(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], threads: int
) -> _Packed:
    """The codes that are not zero, in twos of 16 bits."""
    return _pack(graph, nodes[0], threads, "pairs")


def _pack(graph: Graph, node: Node, threads: int, element: str) -> _Packed:
    a = node.attributes
    if node.op == "quantize":
        scale = Scale(a["scale"], a["zero"])
        return _Packed(None, np.float32(1 / scale.scale), np.float32(scale.zero), threads)
    if node.op == "dequantize":
        return _Packed(None, *affine(a), threads)
    if node.op == "max_pool_int8":
        return _Packed(None, None, None, threads)
    held = graph.constants
    factor, shift = (np.ascontiguousarray(held[n]) for n in node.inputs[2:4])
    weight: Any
    if node.op == "linear_int8":
        weight = once(
            held, node.name, gemv_int8.SparseBytes,
            lambda: gemv_int8.pack_codes(entries(held, node.inputs[1])),
        )  # fmt: skip
        return _Packed(weight, factor, shift, threads)

    def made() -> conv.SparseConv:
        (top, bottom), (left, right) = a["padding"]
        return conv_int8.pack_codes(
            entries(held, node.inputs[1]), stride=a["stride"], padding=[top, left, bottom, right],
            dilation=a["dilation"], groups=a["groups"], element=element,
            image=graph.kind(node.inputs[0]).shape[2:4],
        )  # fmt: skip

    weight = once(held, node.name, conv.SparseConv, made)
    return _Packed(weight, factor, shift, threads)


def bind(
    packed: _Packed,
    nodes: Sequence[Node],
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    batch: int,
) -> Call:
    """The call on these arrays."""
    node, x, y = nodes[0], inputs[0], outputs[0]
    a = node.attributes
    if node.op == "linear_int8":
        return _rows(packed, x, y, *clamps(a, y))
    if node.op == "conv_int8":
        return conv.bound(
            packed.weight, x, y, scale=packed.factor, bias=packed.shift,
            added=inputs[-1] if node.inputs[4] else None, step=a["step"],
            fill=Scale(1.0, a["zero"]).zero * 0x01010101, ends=clamps(a, y), threads=packed.threads,
        )  # fmt: skip
    if node.op == "max_pool_int8":
        return _max_pool(a, x, y, packed.threads)
    return _quantize(packed, x, y) if node.op == "quantize" else _dequantize(packed, x, y)


def _flat(x: Array) -> Array:
    return x.view(np.uint32).reshape(-1)


def _quantize(packed: _Packed, x: Array, y: Array) -> Call:
    fits(y, x)
    module: Any = kernel("quads")
    run = module.Quantize(
        x.reshape(*x.shape[:2], -1), float(packed.factor), float(packed.shift), _flat(y),
        packed.threads,
    )  # fmt: skip
    return Refusing(run, partial(no_nan, x))


def _dequantize(packed: _Packed, x: Array, y: Array) -> Call:
    fits(x, y)
    module: Any = kernel("quads")
    made: Call = module.Dequantize(
        _flat(x), float(packed.factor), float(packed.shift), y.reshape(*y.shape[:2], -1),
        packed.threads,
    )  # fmt: skip
    return made


def _max_pool(a: Mapping[str, Any], x: Array, y: Array, threads: int) -> Call:
    window = zip(x.shape[2:4], a["padding"], a["kernel"], a["stride"], a["dilation"], strict=True)
    places = [(n + sum(p) - d * (k - 1) - 1) // s + 1 for n, p, k, s, d in window]
    if y.shape != (*x.shape[:2], *places, 4):
        raise ArgumentError(f"windows over {x.shape} do not give {y.shape}")
    module: Any = kernel("quads")
    before = [p[0] for p in a["padding"]]
    sizes = [*a["kernel"], *a["stride"], *before, *a["dilation"]]
    planes = [v.view(np.uint32).reshape(-1, *v.shape[2:4]) for v in (x, y)]
    made: Call = module.MaxPool(sizes, *planes, threads)
    return made


def _rows(packed: _Packed, x: Array, y: Array, low: float, high: float) -> Call:
    weight, n = packed.weight, len(x)
    module: Any = kernel("sparse_gemv")

    def made(wide: Array, floats: Array) -> Call:
        call: Call = module.Bytes(
            weight.width, weight.starts, weight.data, weight.book, weight.order, wide,
            np.ones(n, np.float32), np.zeros(n, np.int32), packed.factor, weight.sums, packed.shift,
            low, high, floats, packed.threads,
        )  # fmt: skip
        return call

    return rows_of_codes(made, weight.shape, weight.blocks * weight.width, x, y)


def rows_of_codes(
    made: Callable[[Array, Array], Call], shape: tuple[int, int], columns: int, x: Array, y: Array
) -> Call:
    """A linear layer; its codes are what its floats are rounded to.

    Args:
        made: codes with ``columns`` columns, the last of them zeros, and float32 results -> the
            kernel's call.
        shape: (outputs, inputs).
        x: codes. y: codes or float32.

    Raises :class:`ArgumentError` where x and y are not those of the layer.
    """
    n = len(x)
    if x.shape != (len(y), shape[1]) or y.shape[1] != shape[0]:
        raise ArgumentError(f"a linear layer of {x.shape} does not give {y.shape}")
    wide = x if columns == x.shape[1] else np.zeros((n, columns), np.uint8)
    floats = np.empty(y.shape, np.float32) if y.dtype == np.uint8 else y
    run = made(wide, floats)

    module: Any = kernel("small")
    before = [] if wide is x else [module.Copy(x, wide[:, : x.shape[1]])]
    after = [] if floats is y else [module.Round(floats.reshape(-1), y.reshape(-1))]
    return chained([*before, run, *after])[0]
