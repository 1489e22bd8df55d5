"""Which kernel computes each node: what is fastest here, on the example, in one run.

Every kernel that serves a node gets the node's real inputs; one that gives something else than the
portable kernel is refused by name. Those that agree are timed in turn, and the least time of the
rounds counts. A merging kernel (onnxruntime) costs its call once for a run of neighbours, so that
the choice is the cheapest path through the nodes, not the cheapest kernel of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gossamer.core import kernels as native
from gossamer.core.errors import ArgumentError
from gossamer.core.timing import interleaved
from gossamer.runtime.plan.arrays import TOLERANCE, aligned, difference
from gossamer.runtime.plan.graph import Graph, Node, Value
from gossamer.runtime.plan.kernels import KERNELS, candidates
from gossamer.runtime.plan.program import Program, steps_of

__all__ = ["Measured", "call_overhead", "cheapest", "measure", "overhead", "timed", "values_of"]

_TIE, _LOOKS = 0.05, 3


@dataclass
class Measured:
    """A node's candidates.

    Attributes:
        ms: kernel -> least milliseconds of a call, those that agree.
        refused: kernel -> why not.
        compiled: kernels whose calls need no Python between them
            (:mod:`gossamer.runtime.plan.chains`).
    """

    ms: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    compiled: set[str] = field(default_factory=set)


def values_of(
    graph: Graph, islands: Sequence[Any], inputs: Sequence[np.ndarray], batch: int
) -> dict[str, np.ndarray]:
    """Every value of the graph, by the portable kernels."""
    names = tuple(graph.values)
    every = graph._replace(outputs=names)
    program = Program(every, steps_of(every, plain(graph), 1, islands))
    return dict(zip(names, program(inputs, batch), strict=True))


def plain(graph: Graph) -> dict[str, str]:
    """The portable kernel for every node, torch for islands."""
    return {n.name: "torch" if n.op == "torch" else "numpy" for n in graph.nodes}


def measure(
    graph: Graph,
    islands: Sequence[Any],
    inputs: Sequence[np.ndarray],
    batch: int,
    *,
    threads: int,
    rounds: int,
    seconds: float,
    only: Callable[[str], bool] = lambda name: True,
    nodes: Collection[str] | None = None,
) -> dict[str, Measured]:
    """Node's name -> its candidates, compared and timed.

    Args:
        inputs: the example's arrays, which fit the graph, with so many examples in ``batch``.
        threads: of each kernel.
        rounds, seconds: for each node, at most.
        only: which kernels are tried; the portable one stands in where none is left.
        nodes: which are measured, by name; None: all.
    """
    values = values_of(graph, islands, inputs, batch)
    found: dict[str, Measured] = {}
    for node in graph.nodes:
        if node.op in ("reshape", "torch") or (nodes is not None and node.name not in nodes):
            continue
        row, calls = Measured(), {}
        for name, why in candidates(graph, node).items():
            if not why and only(name) and KERNELS[name].apart:
                why, call = _tried(graph, node, name, values, batch, threads)
                if call is not None:
                    calls[name] = call
            if why:
                row.refused[name] = why
        with np.errstate(all="ignore"):
            taken = timed(list(calls.values()), threads, rounds, seconds)
        row.ms = dict(zip(calls, taken, strict=True))
        row.compiled = {name for name, call in calls.items() if hasattr(call, "step")}
        found[node.name] = row
    return found


def _tried(
    graph: Graph, node: Node, name: str, values: Mapping[str, np.ndarray], batch: int, threads: int
) -> tuple[str, Any]:
    """Why a kernel is refused, or the call."""
    kernel = KERNELS[name]
    names = [n for n in dict.fromkeys(node.inputs) if n and n not in graph.constants]
    wanted = values[node.name]
    out = aligned(np.full_like(wanted, np.nan) if wanted.dtype.kind == "f" else wanted)
    try:
        packed = kernel.pack(graph, [node], names, [node.name], threads)
        call = kernel.bind(packed, [node], [aligned(values[n]) for n in names], [out], batch)
        with np.errstate(all="ignore"):
            call()
    except Exception as e:  # kernels have errors of any kind, and another serves
        return f"{type(e).__name__}: {str(e)[:200]}", None
    off = difference(wanted, out)
    if not off <= TOLERANCE:
        return f"differs by {off:.2g} of the largest result", None
    return "", call


def timed(
    calls: Sequence[Callable[[], object]], threads: int, rounds: int, seconds: float
) -> list[float]:
    """Least milliseconds of each call, their runs in turn.

    Calls within :data:`_TIE` of the fastest are looked at again, up to twice and each time for no
    longer than before, so that a disturbed look does not decide between them. One thread is timed
    by its own clock, which stands still while others have the processor.
    """
    if not calls:
        return []
    clock = time.thread_time if threads == 1 else time.perf_counter
    found = [float("inf")] * len(calls)
    near = list(range(len(calls)))
    for _ in range(_LOOKS):
        taken = interleaved([calls[i] for i in near], rounds=rounds, seconds=seconds, clock=clock)
        for i, times in zip(near, taken, strict=True):
            found[i] = min(found[i], 1e3 * min(times))
        near = [i for i, ms in enumerate(found) if ms <= (1 + _TIE) * min(found)]
        if len(near) < 2:
            break
    return found


def overhead(threads: int) -> float:
    """Milliseconds of a call of the merging kernel that computes next to nothing."""
    node = Node("unary", ("x",), ("y",), {"activation": ["relu"]})
    graph = Graph(("x",), ("y",), (node,), {n: Value((1, 16)) for n in "xy"}, {})
    try:
        packed = KERNELS["onnxruntime"].pack(graph, [node], ["x"], ["y"], threads)
    except (ArgumentError, ImportError):
        return 0.0
    arrays = [aligned(np.zeros((1, 16), np.float32)) for _ in range(2)]
    call = KERNELS["onnxruntime"].bind(packed, [node], arrays[:1], arrays[1:], 1)
    return timed([call], threads, 50, 1.0)[0]


def call_overhead() -> float:
    """Milliseconds of a compiled call that computes next to nothing; 0 where none is built."""
    module: Any = native.kernel("small")
    if module is None:
        return 0.0
    return timed([module.Copy(np.zeros(1), np.zeros(1))], 1, 50, 1.0)[0]


def cheapest(
    graph: Graph, found: Mapping[str, Measured], start: float, call: float = 0.0
) -> tuple[dict[str, str], float]:
    """Node's name -> kernel, the path of least time; and its milliseconds.

    ``start``: milliseconds that every run of a merging kernel costs, within each measured time;
    ``call``: those of a compiled call, which one behind another does not cost.
    """
    # state: the kernel of the node before, where it merges, "+" of compiled ones, else "" -> cost,
    # choices so far
    paths: dict[str, tuple[float, tuple[str, ...]]] = {"": (0.0, ())}
    for node in graph.nodes:
        nexts: dict[str, tuple[float, tuple[str, ...]]] = {}
        for state, (cost, chosen) in paths.items():
            for kernel, ms in _options(graph, node, found):
                merges = KERNELS[kernel].merges
                paid = max(ms, start) if merges else ms  # a reshape costs nothing, its run does
                compiled = node.name in found and kernel in found[node.name].compiled
                if merges and state == kernel:
                    paid = max(ms - start, 0.1 * ms)
                elif compiled and state == "+":
                    paid = max(ms - call, 0.1 * ms)
                key = kernel if merges else "+" if compiled else ""
                if node.op == "reshape" and not merges:
                    key = "+" if state == "+" else ""  # another view, no call
                if key not in nexts or cost + paid < nexts[key][0]:
                    nexts[key] = cost + paid, (*chosen, kernel)
        paths = nexts
    cost, best = min(paths.values(), key=lambda p: p[0])
    return {node.name: kernel for node, kernel in zip(graph.nodes, best, strict=True)}, cost


def _options(graph: Graph, node: Node, found: Mapping[str, Measured]) -> list[tuple[str, float]]:
    if node.op == "torch":
        return [("torch", 0.0)]
    if node.op == "reshape":
        able = [n for n, why in candidates(graph, node).items() if not why]
        return [(n, 0.0) for n in able if n == "numpy" or any(n in m.ms for m in found.values())]
    return list(found[node.name].ms.items()) or [("numpy", 0.0)]
