"""What operators compute, slowly and plainly: the oracle of every kernel.

``run`` evaluates a graph with numpy in float64 where the network computes in float32, and rounds
each value once. Graphs with parts left to torch have no reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.runtime.plan.graph import Graph, Node, batch_of, resolved

__all__ = ["activated", "evaluate", "run", "windows"]

Array = np.ndarray

_erf = np.vectorize(math.erf, otypes=[np.float64])

_UNARY: Mapping[str, Callable[..., Array]] = {
    "relu": lambda x: np.where(x < 0, 0.0, x),  # NaN stays, as in torch
    "clamp": lambda x, low, high: np.where(x < low, low, np.where(x > high, high, x)),
    "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))) if x.size else x,
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "sigmoid": lambda x: _sigmoid(x),
    "tanh": np.tanh,
    "silu": lambda x: x * _sigmoid(x),
    "leaky_relu": lambda x, slope: np.where(x < 0, slope * x, x),
    "elu": lambda x, alpha: np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x),
    "exp": np.exp,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "pow": np.power,
}

_BINARY: Mapping[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
    "maximum": np.maximum, "minimum": np.minimum,
}  # fmt: skip


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


def activated(x: Array, activation: Sequence[Any] | None) -> Array:
    """The function that a node applies to its result."""
    with np.errstate(all="ignore"):  # NaN and infinity pass
        return x if activation is None else _UNARY[activation[0]](x, *activation[1:])


def windows(
    x: Array,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[Sequence[int]],
    dilation: Sequence[int],
    fill: float,
) -> Array:
    """(N, C, *spatial) -> (N, C, *places, *kernel): what each window sees, padded with ``fill``."""
    x = np.pad(x, [(0, 0), (0, 0), *map(tuple, padding)], constant_values=fill)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    axes = tuple(range(2, x.ndim))
    found = np.lib.stride_tricks.sliding_window_view(x, spans, axis=axes)
    places = tuple(slice(None, None, s) for s in stride)
    inside = tuple(slice(None, None, d) for d in dilation)
    return found[(slice(None), slice(None), *places, *inside)]


def _conv(a: Mapping[str, Any], x: Array, w: Array, b: Array | None, more: Array | None) -> Array:
    groups, rank = a["groups"], x.ndim - 2
    seen = windows(x, w.shape[2:], a["stride"], a["padding"], a["dilation"], 0.0)
    parts = []
    for g in range(groups):
        inputs = slice(g * w.shape[1], (g + 1) * w.shape[1])
        filters = slice(g * (len(w) // groups), (g + 1) * (len(w) // groups))
        # not tensordot: its BLAS leaves zeros out, and NaN times zero with them
        taps = [1, *range(12, 12 + rank)]
        sums = np.einsum(seen[:, inputs], [0, 1, *range(2, 2 + rank), *taps[1:]], w[filters],
                         [22, *taps], [0, 22, *range(2, 2 + rank)])  # fmt: skip
        parts.append(sums)
    y = np.concatenate(parts, 1)
    if b is not None:
        y = y + b.reshape(-1, *[1] * rank)
    return activated(y if more is None else y + more, a["activation"])


def _linear(a: Mapping[str, Any], x: Array, w: Array, b: Array | None, more: Array | None) -> Array:
    y = x @ w.T
    y = y if b is None else y + b
    return activated(y if more is None else y + more, a["activation"])


def _round_u8(a: Mapping[str, Any], x: Array) -> Array:
    return (np.clip(np.rint(x / a["scale"]) + a["zero"], 0, 255) - a["zero"]) * a["scale"]


def _dequantized(w: Array, scale: Array) -> Array:
    return w * scale.reshape(-1, *[1] * (w.ndim - 1))


def _affine(a: Mapping[str, Any], x: Array, scale: Array, shift: Array) -> Array:
    form = (-1, *[1] * (x.ndim - 2))
    return activated(x * scale.reshape(form) + shift.reshape(form), a["activation"])


def _max_pool(a: Mapping[str, Any], x: Array) -> Array:
    rank = x.ndim - 2
    fill = -np.inf if x.dtype.kind == "f" else 0  # the least code
    seen = windows(x, a["kernel"], a["stride"], a["padding"], a["dilation"], fill)
    return seen.max(tuple(range(2 + rank, 2 + 2 * rank)))


def _avg_pool(a: Mapping[str, Any], x: Array) -> Array:
    rank = x.ndim - 2
    seen = windows(x, a["kernel"], a["stride"], a["padding"], [1] * rank, 0.0)
    total = seen.sum(tuple(range(2 + rank, 2 + 2 * rank)))
    if a["counted"]:  # padding counts as zeros
        return total / math.prod(a["kernel"])
    ones = windows(np.ones_like(x), a["kernel"], a["stride"], a["padding"], [1] * rank, 0.0)
    return total / ones.sum(tuple(range(2 + rank, 2 + 2 * rank)))


def _softmax(a: Mapping[str, Any], x: Array) -> Array:
    e = np.exp(x - x.max(a["axis"], keepdims=True))
    return e / e.sum(a["axis"], keepdims=True)


def _layer_norm(a: Mapping[str, Any], x: Array, scale: Array | None, shift: Array | None) -> Array:
    axes = tuple(range(x.ndim - a["rank"], x.ndim))
    centred = x - x.mean(axes, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + a["eps"])
    y = y if scale is None else y * scale
    return y if shift is None else y + shift


def _quads(x: Array) -> Array:
    """(N, C, H, W) to (N, quads, H, W, 4), filled up with zeros; rows stay."""
    if x.ndim == 2:
        return x
    full = np.pad(x, [(0, 0), (0, -x.shape[1] % 4), (0, 0), (0, 0)])
    n, c, h, w = full.shape
    return full.reshape(n, c // 4, 4, h, w).transpose(0, 1, 3, 4, 2)


def _planes(x: Array, channels: int) -> Array:
    """What :func:`_quads` was given."""
    if x.ndim == 2:
        return x
    n, q, h, w, _ = x.shape
    return x.transpose(0, 1, 4, 2, 3).reshape(n, 4 * q, h, w)[:, :channels]


def _codes(a: Mapping[str, Any], x: Array) -> Array:
    inverse, zero = np.float32(1 / a["scale"]), np.float32(a["zero"])
    return _quads(np.rint(x.astype(np.float32) * inverse + zero).clip(0, 127).astype(np.uint8))


def _from_codes(a: Mapping[str, Any], x: Array) -> Array:
    codes = _planes(x, a["channels"]).astype(np.float32)
    return codes * np.float32(a["scale"]) + np.float32(-a["zero"] * a["scale"])


def _ended(a: Mapping[str, Any], sums: Array, factor: Array, shift: Array, more: Any) -> Array:
    """Integer sums to results, each operation in float32."""
    form = (-1, *[1] * (sums.ndim - 2))
    f, s = (v.astype(np.float32).reshape(form) for v in (factor, shift))
    y = sums.astype(np.int32).astype(np.float32) * f + s
    if more is not None:
        y = y + more.astype(np.float32) * np.float32(a["step"])
    return np.minimum(np.maximum(y, np.float32(a["low"])), np.float32(a["high"]))


def _conv_int8(a: Mapping[str, Any], x: Array, w: Array, factor: Array, shift: Array,
               more: Array | None) -> Array:  # fmt: skip
    codes = _planes(x, w.shape[1] * a["groups"]).astype(np.int64)
    seen = windows(codes, w.shape[2:], a["stride"], a["padding"], a["dilation"], a["zero"])
    rows, parts = len(w) // a["groups"], []
    for g in range(a["groups"]):
        mine = seen[:, g * w.shape[1] : (g + 1) * w.shape[1]]
        parts.append(np.einsum("nchwyx,ocyx->nohw", mine, w[g * rows :][:rows].astype(np.int64)))
    whole = more is not None and more.dtype == np.uint8
    added = _planes(more, len(w)) if more is not None and whole else more
    return _ended(a, np.concatenate(parts, 1), factor, shift, added)


def _lstm(a: Mapping[str, Any], x: Array, w: Array, h: Array | None, c: Array | None) -> Array:
    units = w.shape[1]
    h, c = (np.zeros((x.shape[1], units)) if v is None else v for v in (h, c))
    y = np.zeros((len(x) + 1, x.shape[1], units))
    for t in sorted(range(len(x)), reverse=a["reverse"]):
        i, f, g, o = np.split(x[t] + h @ w.T, 4, axis=1)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        y[t] = h = _sigmoid(o) * np.tanh(c)
    y[len(x)] = c
    return y


def _gru(a: Mapping[str, Any], x: Array, w: Array, b: Array | None, h: Array | None) -> Array:
    units = w.shape[1]
    h = np.zeros((x.shape[1], units)) if h is None else h
    y = np.zeros((len(x), x.shape[1], units))
    for t in sorted(range(len(x)), reverse=a["reverse"]):
        r, z, n = np.split(h @ w.T, 3, axis=1)
        xr, xz, xn = np.split(x[t], 3, axis=1)
        fresh = np.tanh(xn + _sigmoid(xr + r) * (n if b is None else n + b))
        z = _sigmoid(xz + z)
        y[t] = h = (1 - z) * fresh + z * h
    return y


_RULES: Mapping[str, Callable[..., Array]] = {
    "lstm": _lstm,
    "gru": _gru,
    "fill": lambda a: np.full(a["shape"], a["value"]),
    "quantize": _codes,
    "dequantize": _from_codes,
    "conv_int8": _conv_int8,
    "linear_int8": lambda a, x, w, f, s: _ended(
        a, x.astype(np.int64) @ w.astype(np.int64).T, f, s, None
    ),
    "max_pool_int8": lambda a, x: _quads(_max_pool(a, _planes(x, 4 * x.shape[1]))),
    "conv": _conv,
    "linear": _linear,
    "round_u8": _round_u8,
    "conv_w8": lambda a, x, w, s, b: _conv(a, x, _dequantized(w, s), b, None),
    "linear_w8": lambda a, x, w, s, b: _linear(a, x, _dequantized(w, s), b, None),
    "affine": _affine,
    "unary": lambda a, x: activated(x, a["activation"]),
    "binary": lambda a, x, y: activated(_BINARY[a["function"]](x, y), a["activation"]),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "mean": lambda a, x: x.mean(tuple(a["axes"]), keepdims=a["keep"]),
    "reshape": lambda a, x: x.reshape(a["shape"]),
    "permute": lambda a, x: x.transpose(a["axes"]),
    "slice": lambda a, x: x[tuple(slice(*part) for part in a["index"])],
    "pad": lambda a, x: np.pad(x, [tuple(p) for p in a["pads"]], constant_values=a["value"]),
    "cat": lambda a, *xs: np.concatenate(xs, a["axis"]),
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "embedding": lambda a, w, i: w[i],
    "matmul": lambda a, x, y: x @ y,
}


def evaluate(node: Node, given: Sequence[Array | None], batch: int) -> Array:
    """The result of one node, in float64 for float32 inputs."""
    attributes = dict(node.attributes)
    if "shape" in attributes:
        attributes["shape"] = resolved(tuple(attributes["shape"]), batch)
    wide = [x.astype(np.float64) if x is not None and x.dtype == np.float32 else x for x in given]
    with np.errstate(all="ignore"):
        return _RULES[node.op](attributes, *wide)


def run(graph: Graph, inputs: Sequence[Array]) -> dict[str, Array]:
    """Every value of the graph for these inputs.

    Raises :class:`ArgumentError` for a graph with parts left to torch.
    """
    if graph.islands:
        raise ArgumentError(
            f"{graph.islands[0].name} is left to torch: there is no reference of it"
        )
    held: dict[str, Array] = {**graph.constants, **dict(zip(graph.inputs, inputs, strict=True))}
    batch = batch_of(graph, inputs)
    for node in graph.nodes:
        found = evaluate(node, [held[n] if n else None for n in node.inputs], batch)
        with np.errstate(over="ignore"):
            kind = graph.values[node.name]
            if kind.dtype == "uint8" and found.dtype != np.uint8:  # results of integer operators
                found = np.rint(found)
                found = _quads(found) if found.ndim == 4 else found
            held[node.name] = found.astype(kind.dtype)
    return {name: held[name] for name in graph.values if name in held}
