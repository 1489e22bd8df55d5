"""Recurrent layers, a step at a time: a product of the state's matrix, then all gates in one pass.

The inputs' part of every step is a linear layer before the loop. The product is dense by numpy, by
compressed rows, or by rows of few values; gates are numpy's or compiled ones. Formulas are those of
``torch.nn.LSTM`` (gates i, f, g, o) and ``torch.nn.GRU`` (r, z, n).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels import gemv, row_books
from gossamer.runtime.kernels.arrays import MOST_INPUTS
from gossamer.runtime.plan.arrays import arranged, sigmoid
from gossamer.runtime.plan.chains import chained
from gossamer.runtime.plan.graph import Graph, Node
from gossamer.runtime.plan.stored import density, entries, once

__all__ = ["DENSEST", "FEWEST", "RULES", "Product", "bind", "pack", "refuses"]

Array = np.ndarray
Call = Callable[[], object]
Product = Callable[[Array, Array], Call]
"""State (N, H), result (N, gates * H) -> the call that multiplies."""

DENSEST, FEWEST = 0.7, 64  # as of linear layers
_GATES = {"lstm": 4, "gru": 3}


def _dense(weight: Array) -> Product:
    turned = weight.T
    return lambda h, g: partial(np.matmul, h, turned, out=g)


def _lstm_gates(x: Array, t: int, g: Array, c: Array, h: Array, y: Array) -> None:
    i, f, n, o = np.split(x[t] + g, 4, axis=1)
    np.multiply(c, sigmoid(f), out=c)
    c += sigmoid(i) * np.tanh(n)
    np.multiply(sigmoid(o), np.tanh(c), out=h)
    y[t] = h


def _gru_gates(x: Array, t: int, g: Array, bias: Array | None, h: Array, y: Array) -> None:
    (xr, xz, xn), (gr, gz, gn) = np.split(x[t], 3, axis=1), np.split(g, 3, axis=1)
    own = gn if bias is None else gn + bias
    fresh = np.tanh(xn + sigmoid(xr + gr) * own)
    np.copyto(h, fresh + sigmoid(xz + gz) * (h - fresh))
    y[t] = h


def _lstm(
    a: Mapping[str, Any], y: Array, x: Array, w: Array, h0: Array | None, c0: Array | None,
    product: Product | None = None, gates: Callable[..., None] = _lstm_gates,
) -> Call:  # fmt: skip
    """Every step's state, and in the last row the final cell."""
    steps, h, g = _begun("lstm", a, y, x, w, h0)
    c = np.empty_like(h)
    _state(c0, h.shape)
    multiply = (product or _dense(w))(h, g)

    def call() -> None:
        np.copyto(h, 0 if h0 is None else h0)
        np.copyto(c, 0 if c0 is None else c0)
        for t in steps:
            multiply()
            gates(x, t, g, c, h, y)
        np.copyto(y[len(x)], c)

    return call


def _gru(
    a: Mapping[str, Any], y: Array, x: Array, w: Array, bias: Array | None, h0: Array | None,
    product: Product | None = None, gates: Callable[..., None] = _gru_gates,
) -> Call:  # fmt: skip
    """Every step's state; ``bias``: of the state's part of n."""
    steps, h, g = _begun("gru", a, y, x, w, h0)
    if bias is not None and bias.shape != h.shape[1:]:
        raise ArgumentError(f"a bias of {bias.shape} for {h.shape[1]} units")
    multiply = (product or _dense(w))(h, g)

    def call() -> None:
        np.copyto(h, 0 if h0 is None else h0)
        for t in steps:
            multiply()
            gates(x, t, g, bias, h, y)

    return call


def _begun(
    op: str, a: Mapping[str, Any], y: Array, x: Array, w: Array, h0: Array | None
) -> tuple[range, Array, Array]:
    """The order of steps, memory for state and products; :class:`ArgumentError` for misfits."""
    extra = op == "lstm"
    units = w.shape[-1]
    if x.ndim != 3 or w.shape != (_GATES[op] * units, units) or x.shape[2] != w.shape[0] or (
        y.shape != (len(x) + extra, x.shape[1], units)
    ):  # fmt: skip
        raise ArgumentError(f"{op} of {x.shape} by {w.shape} does not give {y.shape}")
    _state(h0, (x.shape[1], units))
    order = range(len(x))
    h, g = (np.empty((x.shape[1], n), np.float32) for n in (units, w.shape[0]))
    return order[::-1] if a["reverse"] else order, h, g


def _state(first: Array | None, shape: tuple[int, ...]) -> None:
    if first is not None and first.shape != shape:
        raise ArgumentError(f"a first state of {first.shape}, not {shape}")


RULES: Mapping[str, Callable[..., Call]] = {"lstm": _lstm, "gru": _gru}
"""Operator -> attributes, result, inputs -> the call."""


def _rows(packed: gemv.SparseRows, threads: int) -> Product:
    module: Any = kernel("sparse_gemv")

    def product(h: Array, g: Array) -> Call:
        calls = [
            module.Rows(packed.starts, packed.columns, packed.values, row, None, -np.inf, np.inf,
                        out, threads)
            for row, out in zip(h, g, strict=True)
        ]  # fmt: skip
        return chained(calls)[0]

    return product


def _few(packed: row_books.RowBooks, threads: int) -> Product:
    module: Any = kernel("few_bits")
    return lambda h, g: module.BookFloats(
        packed.bits, packed.codes, packed.book, h, None, -np.inf, np.inf, g, threads
    )


def refuses(form: str, graph: Graph, node: Node) -> str:
    """Why a layer is not for the compiled gates with a product of this form; "" for one that is."""
    needed = {"dense": (), "rows": ("sparse_gemv",), "few": ("few_bits",)}[form]
    if any(kernel(name) is None for name in ("recurrent", *needed)):
        return "the compiled kernels are not built"
    weight, units = graph.kind(node.inputs[1]), graph.kind(node.inputs[1]).shape[-1:]
    if weight.dtype != "float32" or len(weight.shape) != 2:
        return f"a matrix of {weight.dtype} {weight.shape}"
    if form != "dense" and units[0] > MOST_INPUTS:
        return f"{units[0]} units"
    if form == "rows":
        kept = density(graph.constants, node.inputs[1])
        return f"density {kept:.2f} is above {DENSEST}" if kept > DENSEST else ""
    if form == "few" and units[0] < FEWEST:
        return f"{units[0]} units"
    if form == "few" and row_books.row_values(graph.constants[node.inputs[1]], 16, 8) is None:
        return "a row has more than 16 values"
    return ""


@dataclass(frozen=True)
class _Packed:
    constants: list[Any]  # of the weight its shape is read
    product: Product


def pack(
    form: str,
    graph: Graph,
    nodes: Sequence[Node],
    inputs: Sequence[str],
    outputs: Sequence[str],
    threads: int,
) -> _Packed:
    """The constants, and a product of this form."""
    node, held = nodes[0], graph.constants
    name = node.inputs[1]
    weight: Any
    if form == "rows":
        weight = once(held, node.name, gemv.SparseRows, lambda: gemv.pack_rows(entries(held, name)))
        product = _rows(weight, threads)
    elif form == "few":
        weight = once(
            held, node.name, row_books.RowBooks, lambda: row_books.pack_row_books(held[name])
        )
        product = _few(weight, threads)
    else:
        weight = held[name]
        product = _dense(weight)
    rest = [held.get(n) for n in node.inputs[2:]]
    return _Packed([held.get(node.inputs[0]), weight, *rest], product)


def bind(
    packed: _Packed,
    nodes: Sequence[Node],
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    batch: int,
) -> Call:
    """The loop over steps, with compiled gates."""
    node = nodes[0]
    given = arranged(node, packed.constants, inputs)
    gates = getattr(kernel("recurrent"), node.op)
    return RULES[node.op](node.attributes, outputs[0], *given, product=packed.product, gates=gates)
