"""The compiled kernels for linear layers whose rows have few values: 2 or 4 bits a weight.

Of float32 activations with the weights as they are; of codes of seven bits with the very codes of
an integer layer. What is multiplied is the same as elsewhere, only its bytes are fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.core.kernels import kernel
from gossamer.runtime.kernels.arrays import MOST_INPUTS
from gossamer.runtime.kernels.row_books import RowBooks, pack_row_books, row_values
from gossamer.runtime.plan.graph import Graph, Node
from gossamer.runtime.plan.sparse import bias_of, both, ends
from gossamer.runtime.plan.stored import once

__all__ = ["bind", "bind_bytes", "pack", "pack_bytes", "refuses", "work"]

Array = np.ndarray
Call = Callable[[], object]
_FEWEST, _SAMPLE = 64, 8  # inputs: 16 values are few of more; rows that are looked at first


class _Packed(NamedTuple):
    weight: RowBooks
    terms: tuple[Array | None, ...]  # the bias; or factor and shift
    threads: int


def refuses(graph: Graph, node: Node) -> str:
    """Why a layer is not for these kernels; "" for one that may be: ``pack`` looks at every row."""
    if kernel("few_bits") is None:
        return "the compiled kernels are not built"
    weight = graph.constants[node.inputs[1]]
    if not _FEWEST <= weight.shape[1] <= MOST_INPUTS:
        return f"{weight.shape[1]} inputs"
    if node.op == "linear" and (
        (kind := graph.kind(node.inputs[0]).dtype) != "float32" or weight.dtype != np.float32
    ):
        return f"of {kind} and {weight.dtype}"
    return "" if row_values(weight, 16, _SAMPLE) else "a row has more than 16 values"


def work(weight: Array) -> tuple[float, float]:
    """Entries, and bytes of their codes, by the values of the first rows."""
    found = row_values(weight, 4, _SAMPLE)
    return weight.size, weight.size / (2 if found is None else 4)


def pack(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], threads: int
) -> _Packed:
    """The weight's codes and each row's values; raises :class:`ArgumentError` for more than 16."""
    weight = _books(graph, nodes[0])
    return _Packed(weight, (bias_of(graph, nodes[0]),), threads)


def pack_bytes(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], threads: int
) -> _Packed:
    """The same of an integer layer."""
    terms = tuple(np.ascontiguousarray(graph.constants[n]) for n in nodes[0].inputs[2:4])
    return _Packed(_books(graph, nodes[0]), terms, threads)


def _books(graph: Graph, node: Node) -> RowBooks:
    held = graph.constants
    return once(held, node.name, RowBooks, lambda: pack_row_books(held[node.inputs[1]]))


def bind(
    packed: _Packed,
    nodes: Sequence[Node],
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    batch: int,
) -> Call:
    """The call on these arrays, of any number of dimensions."""
    node, x, y, weight = nodes[0], inputs[0], outputs[0], packed.weight
    if x.shape != (*y.shape[:-1], weight.shape[1]) or y.shape[-1] != weight.shape[0]:
        raise ArgumentError(f"a linear layer of {x.shape} does not give {y.shape}")
    added = inputs[-1] if node.inputs[3] else None
    low, high, whole = (-np.inf, np.inf, False) if added is not None else ends(node.attributes)
    module: Any = kernel("few_bits")
    run: Call = module.BookFloats(
        weight.bits, weight.codes, weight.book, x.reshape(-1, weight.shape[1]), *packed.terms,
        low, high, y.reshape(-1, weight.shape[0]), packed.threads,
    )  # fmt: skip
    return run if whole else both(run, node.attributes, y, added)


def bind_bytes(
    packed: _Packed,
    nodes: Sequence[Node],
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    batch: int,
) -> Call:
    """The call on these codes."""
    from gossamer.runtime.plan.portable_int8 import clamps  # float32 layers do without
    from gossamer.runtime.plan.sparse_int8 import rows_of_codes

    weight, (x, y) = packed.weight, (inputs[0], outputs[0])
    module: Any = kernel("few_bits")

    def made(wide: Array, floats: Array) -> Call:
        call: Call = module.BookBytes(
            weight.bits, weight.codes, weight.book, wide, *packed.terms,
            *clamps(nodes[0].attributes, y), floats, packed.threads,
        )  # fmt: skip
        return call

    return rows_of_codes(made, weight.shape, weight.chunks * weight.columns, x, y)
