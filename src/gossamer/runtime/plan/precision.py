"""Which layers compute in integers: where that is faster, conversions included.

Times are those of single nodes, measured once each in the forms in which they occur. From all
layers in integers, and from none, one layer after the other is turned over as long as the cheapest
path through the graph becomes cheaper; the better end is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gossamer.runtime.plan.choose import Measured, call_overhead, cheapest, measure, overhead
from gossamer.runtime.plan.graph import Graph, Node
from gossamer.runtime.plan.int8 import Lowering

__all__ = ["Choice", "Search"]


@dataclass(frozen=True)
class Choice:
    """Layers in integers, the graph that they make, its kernels, and the measured milliseconds."""

    layers: frozenset[str]
    graph: Graph
    chosen: dict[str, str]
    found: dict[str, Measured]
    ms: float


@dataclass
class Search:
    """The measured choice.

    Args:
        lowering: of the float32 graph.
        islands, inputs, batch, threads, rounds, seconds, only:
            as for :func:`gossamer.runtime.plan.choose.measure`.
    """

    lowering: Lowering
    islands: Sequence[Any]
    inputs: Sequence[np.ndarray]
    batch: int
    threads: int
    rounds: int
    seconds: float
    only: Callable[[str], bool] = lambda name: True
    _start: float = 0.0
    _known: dict[tuple[Any, ...], Measured] = field(default_factory=dict)

    def best(self, layers: Sequence[str]) -> Choice:
        """The cheapest choice that is reached, of these layers."""
        self._start, self._call = overhead(self.threads), call_overhead()
        ends = [self._descend(self.choice(start), layers) for start in (layers, ())]
        return min(ends, key=lambda choice: choice.ms)

    def _descend(self, best: Choice, layers: Sequence[str]) -> Choice:
        turned = True
        while turned:
            turned = False
            for name in layers:
                other = self.choice(best.layers ^ {name})
                if other.ms < best.ms:
                    best, turned = other, True
        return best

    def choice(self, layers: Collection[str]) -> Choice:
        """What these layers in integers cost."""
        graph = self.lowering.graph_of(layers)
        keys = {n.name: _key(graph, n) for n in graph.nodes if n.op not in ("reshape", "torch")}
        missing = [name for name, key in keys.items() if key not in self._known]
        if missing:
            found = measure(
                graph, self.islands, self.inputs, self.batch, threads=self.threads,
                rounds=self.rounds, seconds=self.seconds, nodes=missing,
                only=self.only,
            )  # fmt: skip
            self._known |= {keys[name]: row for name, row in found.items()}
        rows = {name: self._known[key] for name, key in keys.items()}
        chosen, ms = cheapest(graph, rows, self._start, self._call)
        return Choice(frozenset(layers), graph, chosen, rows, ms)


def _key(graph: Graph, node: Node) -> tuple[Any, ...]:
    """What a node's time depends on, within one graph's variants."""
    return node.op, node.outputs, node.inputs, tuple(graph.kind(n) for n in node.inputs if n)
