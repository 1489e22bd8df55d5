"""Kernels of numpy alone: for everything but islands, on any processor.

Maps are unrolled (im2col) and multiplied; the rest is what numpy does in place. Convolutions and
linear layers multiply in numpy's own BLAS, which takes as many threads as its environment says.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gossamer.runtime.plan.arrays import arranged, sigmoid
from gossamer.runtime.plan.frames import framed, taps
from gossamer.runtime.plan.graph import Graph, Node

__all__ = ["bind", "blas_threads", "finished", "pack", "refuses"]

Array = np.ndarray
Call = Callable[[], object]


def refuses(graph: Graph, node: Node) -> str:
    """Nothing."""
    return ""


def blas_threads() -> int:
    """How many threads numpy's products take, as its environment says."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if (found := os.environ.get(name, "")).isdigit():
            return max(1, int(found))
    return os.cpu_count() or 1


def pack(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], threads: int
) -> list[Array | None]:
    """The node's constants at their places; None for what is computed, or left out."""
    return [graph.constants.get(name) for name in nodes[0].inputs]


def bind(
    packed: list[Array | None],
    nodes: Sequence[Node],
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    batch: int,
) -> Call:
    """The call for one node."""
    node = nodes[0]
    return _rule(node.op)(node.attributes, outputs[0], *arranged(node, packed, inputs))


def _erf(x: Array) -> Array:
    """Abramowitz and Stegun 7.1.26: within 1.5e-7."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    terms = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    total = np.zeros_like(x)
    for term in terms:
        total = (total + term) * t
    return np.copysign(1 - total * np.exp(-x * x), x)


def _gelu(y: Array) -> None:
    y *= 0.5 * (1 + _erf(y * np.float32(math.sqrt(0.5))))


def _gelu_tanh(y: Array) -> None:
    y *= 0.5 * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (y + 0.044715 * (y * y * y))))


def _hardsigmoid(y: Array) -> None:
    np.clip(y + 3, 0, 6, out=y)
    y *= np.float32(1 / 6)


def _hardswish(y: Array) -> None:
    y *= np.clip(y + 3, 0, 6) * np.float32(1 / 6)


def _silu(y: Array) -> None:
    y /= 1 + np.exp(-y)  # as torch has it: of minus infinity NaN


def _elu(y: Array, alpha: float) -> None:
    np.copyto(y, alpha * np.expm1(np.minimum(y, 0)), where=y < 0)


_IN_PLACE: Mapping[str, Callable[..., Any]] = {
    "relu": lambda y: np.maximum(y, 0, out=y),
    "clamp": lambda y, low, high: np.clip(y, low, high, out=y),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "hardswish": _hardswish,
    "hardsigmoid": _hardsigmoid,
    "sigmoid": lambda y: np.copyto(y, sigmoid(y)),
    "tanh": lambda y: np.tanh(y, out=y),
    "silu": _silu,
    "leaky_relu": lambda y, slope: np.multiply(y, slope, out=y, where=y < 0),
    "elu": _elu,
    "exp": lambda y: np.exp(y, out=y),
    "neg": lambda y: np.negative(y, out=y),
    "sqrt": lambda y: np.sqrt(y, out=y),
    "abs": lambda y: np.abs(y, out=y),
    "rsqrt": lambda y: np.divide(1, np.sqrt(y), out=y),
    "pow": lambda y, exponent: np.power(y, exponent, out=y),
}


def finished(a: Mapping[str, Any], y: Array, *added: Array | None) -> Call:
    """Additions and the activation, in place."""
    more = [x for x in added if x is not None]
    name, *settings = a["activation"] or [""]
    if y.dtype.kind in "iu":  # numpy takes no fractions for these
        most = np.iinfo(y.dtype)
        settings = [max(most.min, min(most.max, int(v))) for v in settings]
    function = _IN_PLACE.get(name)

    def call() -> None:
        for x in more:
            np.add(y, x, out=y)
        if function is not None:
            function(y, *settings)

    return call


def _conv(
    a: Mapping[str, Any], y: Array, x: Array, w: Array, b: Array | None, more: Array | None
) -> Call:
    groups, (n, c), places = a["groups"], x.shape[:2], y.shape[2:]
    frame, fill = framed(x, a["padding"], 0.0)
    seen = taps(frame, {**a, "kernel": w.shape[2:]}, places)
    columns = np.empty((c, len(seen), *places), np.float32)  # of one example: bounded memory
    matrix = w.reshape(groups, len(w) // groups, -1)
    unrolled = columns.reshape(groups, -1, math.prod(places))
    result = y.reshape(n, groups, len(w) // groups, -1)
    bias = None if b is None else b.reshape(-1, *[1] * len(places))
    finish = finished(a, y, bias, more)

    def call() -> None:
        fill()
        for example in range(n):
            for i, tap in enumerate(seen):
                columns[:, i] = tap[example]
            np.matmul(matrix, unrolled, out=result[example])
        finish()

    return call


def _linear(
    a: Mapping[str, Any], y: Array, x: Array, w: Array, b: Array | None, more: Array | None
) -> Call:
    turned, finish = w.T, finished(a, y, b, more)

    def call() -> None:
        np.matmul(x, turned, out=y)
        finish()

    return call


def _dequantized(w: Array, scale: Array) -> Array:
    return w.astype(np.float32) * scale.reshape(-1, *[1] * (w.ndim - 1))


def _round_u8(a: Mapping[str, Any], y: Array, x: Array) -> Call:
    from gossamer.runtime.plan.portable_int8 import no_nan  # few plans have it

    scale, zero = np.float32(a["scale"]), a["zero"]

    def call() -> None:
        no_nan(x)
        np.divide(x, scale, out=y)
        np.rint(y, out=y)
        np.clip(y, -zero, 255 - zero, out=y)
        np.multiply(y, scale, out=y)

    return call


def _affine(a: Mapping[str, Any], y: Array, x: Array, scale: Array, shift: Array) -> Call:
    form = (-1, *[1] * (x.ndim - 2))
    factor, finish = scale.reshape(form), finished(a, y, shift.reshape(form))

    def call() -> None:
        np.multiply(x, factor, out=y)
        finish()

    return call


def _unary(a: Mapping[str, Any], y: Array, x: Array) -> Call:
    finish = finished(a, y)

    def call() -> None:
        np.copyto(y, x)
        finish()

    return call


def _binary(a: Mapping[str, Any], y: Array, one: Array, other: Array) -> Call:
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
                "maximum": np.maximum, "minimum": np.minimum}[a["function"]]  # fmt: skip
    finish = finished(a, y)

    def call() -> None:
        function(one, other, out=y)
        finish()

    return call


def _max_pool(a: Mapping[str, Any], y: Array, x: Array) -> Call:
    frame, fill = framed(x, a["padding"], -np.inf)
    first, *rest = taps(frame, a, y.shape[2:])

    def call() -> None:
        fill()
        np.copyto(y, first)
        for tap in rest:
            np.maximum(y, tap, out=y)

    return call


def _avg_pool(a: Mapping[str, Any], y: Array, x: Array) -> Call:
    frame, fill = framed(x, a["padding"], 0.0)
    first, *rest = taps(frame, a, y.shape[2:])
    factor: Any = np.float32(1 / math.prod(a["kernel"]))
    if not a["counted"]:
        ones, paint = framed(np.ones((1, 1, *x.shape[2:]), np.float32), a["padding"], 0.0)
        paint()
        factor = 1 / sum(taps(ones, a, y.shape[2:]))

    def call() -> None:
        fill()
        np.copyto(y, first)
        for tap in rest:
            np.add(y, tap, out=y)
        np.multiply(y, factor, out=y)

    return call


def _mean(a: Mapping[str, Any], y: Array, x: Array) -> Call:
    axes = tuple(a["axes"])
    factor = np.float32(1 / math.prod(x.shape[i] for i in axes)) if x.size else np.float32(0)

    def call() -> None:
        np.add.reduce(x, axes, out=y, keepdims=a["keep"])
        np.multiply(y, factor, out=y)

    return call


def _copied(y: Array, view: Array) -> Call:
    if view.shape != y.shape:
        raise ValueError(f"a value of {view.shape} where {y.shape} was planned")
    y, view = _words(y), _words(view)
    return lambda: np.copyto(y, view)


def _words(x: Array) -> Array:
    """Bytes in fours, side by side, as words: numpy copies them one element at a time."""
    fours = x.dtype == np.uint8 and x.ndim == 5 and x.shape[-1] == 4 and x.strides[-1] == 1
    return x.view(np.uint32)[..., 0] if fours else x


def _pad(a: Mapping[str, Any], y: Array, x: Array) -> Call:
    inside = y[tuple(slice(b, b + s) for (b, _), s in zip(a["pads"], x.shape, strict=True))]
    copy = _copied(inside, x)

    def call() -> None:
        y.fill(a["value"])
        copy()

    return call


def _softmax(a: Mapping[str, Any], y: Array, x: Array) -> Call:
    axis = a["axis"]

    def call() -> None:
        np.subtract(x, x.max(axis, keepdims=True), out=y)
        np.exp(y, out=y)
        np.divide(y, y.sum(axis, keepdims=True), out=y)

    return call


def _layer_norm(
    a: Mapping[str, Any], y: Array, x: Array, scale: Array | None, shift: Array | None
) -> Call:
    axes = tuple(range(x.ndim - a["rank"], x.ndim))

    def call() -> None:
        np.subtract(x, x.mean(axes, keepdims=True), out=y)
        spread = np.square(y).mean(axes, keepdims=True)
        np.divide(y, np.sqrt(spread + np.float32(a["eps"])), out=y)
        if scale is not None:
            np.multiply(y, scale, out=y)
        if shift is not None:
            np.add(y, shift, out=y)

    return call


def _embedding(a: Mapping[str, Any], y: Array, w: Array, indices: Array) -> Call:
    def call() -> None:
        if indices.size and not 0 <= indices.min() <= indices.max() < len(w):
            raise IndexError(f"an index beyond the {len(w)} rows of an embedding")
        np.take(w, indices, axis=0, out=y, mode="clip")  # the mode that writes without a copy

    return call


_RULES: Mapping[str, Callable[..., Call]] = {
    "fill": lambda a, y: lambda: y.fill(a["value"]),
    "conv": _conv,
    "linear": _linear,
    "round_u8": _round_u8,
    "conv_w8": lambda a, y, x, w, s, b: _conv(a, y, x, _dequantized(w, s), b, None),
    "linear_w8": lambda a, y, x, w, s, b: _linear(a, y, x, _dequantized(w, s), b, None),
    "affine": _affine,
    "unary": _unary,
    "binary": _binary,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "mean": _mean,
    "reshape": lambda a, y, x: _copied(y, x.reshape(y.shape)),
    "permute": lambda a, y, x: _copied(y, x.transpose(a["axes"])),
    "slice": lambda a, y, x: _copied(y, x[tuple(slice(*part) for part in a["index"])]),
    "pad": _pad,
    "cat": lambda a, y, *xs: lambda: np.concatenate(xs, a["axis"], out=y),
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "embedding": _embedding,
    "matmul": lambda a, y, one, other: lambda: np.matmul(one, other, out=y),
}


def _rule(op: str) -> Callable[..., Call]:
    if op in _RULES:
        return _RULES[op]
    from gossamer.runtime.plan import portable_int8, recurrent  # few plans have these operators

    return {**portable_int8.RULES, **recurrent.RULES}[op]
