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
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from gossamer.core.tables import Table
from gossamer.runtime.plan.graph import CODES, OPERATORS, Graph, Node

__all__ = ["KERNELS", "Call", "Kernel", "candidates"]

Call = Callable[[], object]


class Kernel(NamedTuple):
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


def _call(module: str, name: str, *given: Any) -> Any:
    return getattr(import_module(f"gossamer.runtime.plan.{module}"), name)(*given)


def _row(
    serves: str | frozenset[str],
    module: str,
    *,
    pack: str = "pack",
    bind: str = "bind",
    first: tuple[str, ...] = (),
    **more: Any,
) -> Kernel:
    """A row whose module is imported when it is first used: a plan's file needs few of them.

    ``first``: what ``pack`` and ``refuses`` take before all else.
    """
    return Kernel(
        frozenset(serves.split() if isinstance(serves, str) else serves),
        partial(_call, module, pack, *first),
        partial(_call, module, bind),
        **({"refuses": partial(_call, module, "refuses", *first)} | more),
    )


_PORTABLE = frozenset(OPERATORS) - {"torch"}
# its Gather takes indices below zero, and it rounds codes in another order
_DENSE = _PORTABLE - {"embedding", "dequantize", "fill"} - CODES
_few = partial(_call, "few_bits", "work")

KERNELS: Table[Kernel] = Table(
    "kernel",
    {
        "numpy": _row(_PORTABLE, "portable"),
        "small": _row(
            "slice pad permute cat fill linear affine unary binary mean softmax layer_norm matmul "
            "embedding max_pool avg_pool", "small",
        ),
        "onnxruntime": _row(_DENSE, "dense", merges=True, package="onnxruntime"),
        "openvino": _row(
            _DENSE, "dense_openvino", merges=True, apart=False, package="openvino"
        ),
        "sparse": _row("conv linear", "sparse", work=_zeros_left_out),
        "sparse-rows": _row(
            "linear", "sparse", pack="pack_rows", bind="bind_rows", work=_zeros_left_out,
            refuses=partial(_call, "sparse", "refuses_rows"),
        ),
        "sparse-int8": _row(
            "quantize dequantize conv_int8 linear_int8 max_pool_int8", "sparse_int8",
            work=_zeros_left_out,
        ),
        "sparse-int8-pairs": _row(
            "conv_int8", "sparse_int8", pack="pack_pairs", work=_zeros_left_out
        ),
        "few-bits": _row("linear", "few_bits", work=_few),
        "few-bits-int8": _row(
            "linear_int8", "few_bits", pack="pack_bytes", bind="bind_bytes", work=_few
        ),
        "recurrent": _row("lstm gru", "recurrent", first=("dense",)),
        "recurrent-rows": _row("lstm gru", "recurrent", first=("rows",), work=_zeros_left_out),
        "recurrent-few-bits": _row("lstm gru", "recurrent", first=("few",), work=_few),
        "torch": Kernel(
            frozenset({"torch"}), partial(_call, "island", "pack"), partial(_call, "island", "bind")
        ),
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
