"""What can compute a node: one table, a row a kernel.

A kernel packs a node's weights once, from dense arrays, and binds the packed form to the arrays of
one memory plan; what it binds is called without arguments. Another row is enough for another
kernel::

    KERNELS.register("mine", Kernel(serves=frozenset({"conv"}), pack=my_pack, bind=my_bind))

:mod:`gossamer.runtime.plan.choose` offers each node to every row, compares what it computes with
the reference kernel on the example, and times those that agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gossamer.core.tables import Table
from gossamer.runtime.plan import (
    dense,
    dense_openvino,
    few_bits,
    island,
    portable,
    recurrent,
    sparse,
    sparse_int8,
)
from gossamer.runtime.plan.graph import Graph, Node

__all__ = ["KERNELS", "Call", "Kernel", "candidates"]

Call = Callable[[], object]


@dataclass(frozen=True)
class Kernel:
    """One way to compute nodes.

    Attributes:
        serves: operators that it may be offered.
        pack: graph, nodes (one, or a run of neighbours where ``merges``), the inputs and outputs
            that the rest of the graph sees, threads -> whatever ``bind`` takes. Dense constants
            are in the graph.
        bind: packed, nodes, input arrays, output arrays, the size of the batch -> the call. Arrays
            are C-contiguous, 64-byte aligned and stay where they are; the kernel writes every
            element of its outputs at each call, and never its inputs.
        refuses: graph, node -> why it cannot be used here; "" where it can.
        merges: one call computes a run of neighbours at once.
        apart: it is offered single nodes; else runs alone, whose time a node's does not say.
        package: of others, that it needs.
        work: weight -> how many of its entries are multiplied, and how many bytes it is read as.
    """

    serves: frozenset[str]
    pack: Callable[[Graph, Sequence[Node], Sequence[str], Sequence[str], int], Any]
    bind: Callable[[Any, Sequence[Node], Sequence[np.ndarray], Sequence[np.ndarray], int], Call]
    refuses: Callable[[Graph, Node], str] = lambda graph, node: ""
    merges: bool = False
    apart: bool = True
    package: str = ""
    work: Callable[[np.ndarray], tuple[float, float]] = lambda weight: (weight.size, weight.nbytes)


def _zeros_left_out(weight: np.ndarray) -> tuple[float, float]:
    """Values that are not zero, each with a place of 16 bits."""
    live = float(np.count_nonzero(weight))
    return live, live * (weight.itemsize + 2)


KERNELS: Table[Kernel] = Table(
    "kernel",
    {
        "numpy": Kernel(portable.SERVES, portable.pack, portable.bind, portable.refuses),
        "onnxruntime": Kernel(
            dense.SERVES, dense.pack, dense.bind, dense.refuses, merges=True, package="onnxruntime"
        ),
        "openvino": Kernel(
            dense.SERVES, dense_openvino.pack, dense_openvino.bind, dense_openvino.refuses,
            merges=True, apart=False, package="openvino",
        ),
        "sparse": Kernel(
            sparse.LAYERS, sparse.pack, sparse.bind, sparse.refuses, work=_zeros_left_out
        ),
        "sparse-rows": Kernel(
            sparse.ROWS, sparse.pack_rows, sparse.bind_rows, sparse.refuses_rows,
            work=_zeros_left_out,
        ),
        "sparse-int8": Kernel(
            sparse_int8.SERVES, sparse_int8.pack, sparse_int8.bind, sparse_int8.refuses,
            work=_zeros_left_out,
        ),
        "sparse-int8-pairs": Kernel(
            sparse_int8.PAIRS, sparse_int8.pack_pairs, sparse_int8.bind, sparse_int8.refuses,
            work=_zeros_left_out,
        ),
        "few-bits": Kernel(
            few_bits.FLOATS, few_bits.pack, few_bits.bind, few_bits.refuses, work=few_bits.work
        ),
        "few-bits-int8": Kernel(
            few_bits.BYTES, few_bits.pack_bytes, few_bits.bind_bytes, few_bits.refuses,
            work=few_bits.work,
        ),
        **{
            name: Kernel(
                recurrent.SERVES, recurrent.packer(form), recurrent.bind, recurrent.refuses(form),
                work=work,
            )
            for name, form, work in (
                ("recurrent", "dense", Kernel.work),
                ("recurrent-rows", "rows", _zeros_left_out),
                ("recurrent-few-bits", "few", few_bits.work),
            )
        },
        "torch": Kernel(frozenset({"torch"}), island.pack, island.bind),
    },
)  # fmt: skip
"""Kernel -> how it packs and binds. ``numpy`` serves everything but islands, anywhere."""


def candidates(graph: Graph, node: Node) -> dict[str, str]:
    """The kernels that serve a node's operator -> why each cannot be used; "" for one that can."""
    return {
        name: kernel.refuses(graph, node)
        for name, kernel in KERNELS.items()
        if node.op in kernel.serves
    }
