"""The compiled kernels on codes of seven bits: what is zero is left out, whatever its pattern.

Bias, ReLU, the added value and the requantization are computed as sums leave the convolution. Maps
are quantized and dequantized by convolutions too, whose weight is the identity: one pass each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels import conv, conv_int8, gemv_int8
from gossamer.runtime.kernels.arrays import MOST_INPUTS
from gossamer.runtime.kernels.eight_bits import TOP, Scale
from gossamer.runtime.plan.graph import Graph, Node
from gossamer.runtime.plan.portable_int8 import affine, clamps, no_nan
from gossamer.runtime.plan.stored import entries, once

__all__ = ["bind", "pack", "pack_pairs", "refuses", "rows_of_codes"]

Array = np.ndarray
Call = Callable[[], object]


class _Packed(NamedTuple):
    weight: Any
    factor: Array
    shift: Array
    threads: int


def refuses(graph: Graph, node: Node) -> str:
    """Why a node is not for the compiled kernels; "" for one that is."""
    if kernel("sparse_gemv" if node.op == "linear_int8" else "sparse_conv") is None:
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
    if node.op in ("quantize", "dequantize"):
        return _identity(graph, node, threads)
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


def _identity(graph: Graph, node: Node, threads: int) -> _Packed:
    """Each channel as it is: ``quantize`` of floats, ``dequantize`` of quads."""
    a = node.attributes
    if node.op == "quantize":
        channels = graph.values[node.inputs[0]].shape[1]
        eye: Array = np.eye(channels, dtype=np.float32)
        weight = conv.pack_conv(eye[:, :, None, None])
        scale = Scale(a["scale"], a["zero"])
        factor, shift = np.float32(1 / scale.scale), np.float32(scale.zero)
    else:
        channels = graph.values[node.name].shape[1]
        eye = np.eye(channels, dtype=np.int8)
        weight = conv_int8.pack_codes(eye[:, :, None, None], element="quads")
        factor, shift = affine(a)
    return _Packed(weight, np.full(channels, factor), np.full(channels, shift), threads)


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
        zero, low_high = Scale(1.0, a["zero"]).zero, clamps(a, y)
        return _maps(
            packed, x, y, inputs[-1] if node.inputs[4] else None, a["step"], zero, low_high
        )
    if node.op == "dequantize":
        return _maps(packed, x, y, None, 1.0, 0, (-np.inf, np.inf))
    run = _maps(packed, x, y, None, 1.0, 0, (0.0, float(TOP)))

    def call() -> None:
        no_nan(x)
        run()

    return call


def _maps(
    packed: _Packed,
    x: Array,
    y: Array,
    added: Array | None,
    step: float,
    zero: int,
    ends: tuple[float, float],
) -> Call:
    """The convolution: shapes are looked at here, once, by the kernel's own checks."""
    weight, codes = packed.weight, y.dtype == np.uint8
    n, c, h, w = x.shape[:4]
    size = weight.output_size(h, w)
    m = weight.shape[0]
    shape = (n, -(-m // 4), *size, 4) if codes else (n, m, *size)
    if y.shape != shape or (added is not None and (added.shape, added.dtype) != (shape, y.dtype)):
        raise ArgumentError(f"a convolution of {x.shape} does not give {y.shape}")
    module: Any = kernel("sparse_conv")

    def flat(array: Array | None) -> Array | None:
        return None if array is None else array.view(np.uint32).reshape(-1)

    return partial(
        module.run, conv.sizes(weight, n, c // weight.groups, h, w, size), weight.starts,
        weight.order, weight.taps, weight.values, flat(x), zero * 0x01010101, packed.factor,
        packed.shift, flat(added), step, *ends, codes, flat(y), packed.threads,
    )  # fmt: skip


def _rows(packed: _Packed, x: Array, y: Array, low: float, high: float) -> Call:
    weight, n = packed.weight, len(x)
    module: Any = kernel("sparse_gemv")

    def made(wide: Array, floats: Array) -> Call:
        return partial(
            module.run, weight.width, weight.starts, weight.data, weight.book, weight.order, wide,
            np.ones(n, np.float32), np.zeros(n, np.int32), packed.factor, weight.sums, packed.shift,
            low, high, floats, packed.threads,
        )  # fmt: skip

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

    def call() -> None:
        if wide is not x:
            wide[:, : x.shape[1]] = x
        run()
        if floats is not y:
            np.rint(floats, out=floats)
            np.copyto(y, floats, casting="unsafe")

    return call
