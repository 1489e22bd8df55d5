"""The time that a layer must take: its multiplications and its bytes over what this machine does.

S. Williams, A. Waterman and D. Patterson, *Roofline: An Insightful Visual Performance Model for
Multicore Architectures*, CACM 52(4), 2009. Peaks are measured once a process: multiply-adds of a
product of float32 in cache, and bytes read from arrays of three sizes; a layer's bytes come at the
rate of the least array that holds them, as when it runs right after itself. Integer layers get four
times the multiply-adds, which processors with VNNI reach. It is a bound: gathering what is not
zero, looking codes up and calls (a microsecond or two each) come on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.runtime.plan.arrays import aligned
from gossamer.runtime.plan.choose import timed
from gossamer.runtime.plan.graph import LAYERS, Graph, Node, Value, resolved
from gossamer.runtime.plan.kernels import KERNELS

__all__ = ["peaks", "predicted"]

_SIDE = 256
_SIZES = (1 << 18, 1 << 22, 1 << 26)  # bytes: of a second-level cache, of a third-level, of memory
_INTEGERS = 4.0


@cache
def peaks(threads: int) -> dict[str, float]:
    """Per millisecond: ``multiply-adds``, and bytes read from arrays of so many bytes."""
    x = Value((_SIDE, _SIDE))
    node = Node("linear", ("x", "@w", "", ""), ("y",), {"activation": None})
    weight = {"@w": np.ones((_SIDE, _SIDE), np.float32)}
    graph = Graph(("x",), ("y",), (node,), {"x": x, "y": x}, weight)
    calls = []
    for name in ("numpy", "onnxruntime"):
        arrays = [aligned(np.ones((_SIDE, _SIDE), np.float32)) for _ in "xy"]
        try:
            packed = KERNELS[name].pack(graph, [node], ["x"], ["y"], threads)
        except (ArgumentError, ImportError):
            continue
        calls.append(KERNELS[name].bind(packed, [node], arrays[:1], arrays[1:], 1))
    found = {"multiply-adds": _SIDE**3 / min(timed(calls, threads, 20, 0.05))}
    for size in _SIZES:
        array = np.ones(size // 4, np.float32)
        (ms,) = timed([lambda array=array: np.dot(array, array)], threads, 20, 0.05)  # type: ignore[misc]
        found[str(size)] = size / ms
    return found


def predicted(
    graph: Graph, node: Node, kernel: str, batch: int, peak: Mapping[str, float]
) -> dict[str, Any]:
    """``least`` milliseconds of a node by a kernel, and what is its ``bound``.

    That is ``arithmetic`` or ``memory``. Nothing of reshapes and of what runs in torch.
    """
    if node.op in ("reshape", "torch"):
        return {}
    names = dict.fromkeys((*node.inputs, *node.outputs))
    if node.op == "embedding":  # the rows that it takes are its result
        del names[node.inputs[0]]
    kinds = [graph.kind(n) for n in names if n]
    held = float(sum(
        math.prod(resolved(k.shape, batch)) * np.dtype(k.dtype).itemsize for k in kinds
    ))  # fmt: skip
    products, moved = 0.0, held
    if node.op in LAYERS:
        weight = graph.constants[node.inputs[1]]
        entries, read = KERNELS[kernel].work(weight)
        times, loops = _places(graph, node, batch)
        products = entries * times / (_INTEGERS if node.op.endswith(("int8", "_w8")) else 1)
        held += read - weight.nbytes
        moved = held + read * (loops - 1)
    if node.op == "matmul":
        products = math.prod(resolved(graph.values[node.name].shape, batch)) * float(
            graph.kind(node.inputs[0]).shape[-1]
        )
    sizes = sorted(int(s) for s in peak if s.isdigit())
    rate = max(peak[str(s)] for s in sizes if s >= min(held, sizes[-1]))
    arithmetic, memory = products / peak["multiply-adds"], moved / rate
    return {"least": max(arithmetic, memory),
            "bound": "arithmetic" if arithmetic > memory else "memory"}  # fmt: skip


def _places(graph: Graph, node: Node, batch: int) -> tuple[int, int]:
    """How often each weight is multiplied, and read."""
    shape = resolved(graph.values[node.name].shape, batch)
    if node.op in ("lstm", "gru"):
        steps = resolved(graph.values[node.inputs[0]].shape, batch)[0]
        return steps * shape[1], steps
    if node.op.startswith("linear"):
        return math.prod(shape[:-1]), 1
    codes = node.op == "conv_int8" and len(shape) == 5  # in quads of channels
    return shape[0] * math.prod(shape[2:4] if codes else shape[2:]), 1
