"""Candidates for the whole network: kernels chosen layer by layer, and engines that run all of it.

``plan`` is the cheapest path of single nodes' times. Variants of it have recurrent layers in
onnxruntime, whose own takes the loop with the product before it, or dense runs in OpenVINO, which a
single node's time says little of. With calibration inputs ``onnxruntime-int8`` and
``openvino-int8`` are the network in eight bits as those engines want it
(:mod:`gossamer.runtime.plan.rounded`). A file holds all of them but ``torch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.runtime.flat import Flat
from gossamer.runtime.plan import onnx_recurrent
from gossamer.runtime.plan.capture import Captured
from gossamer.runtime.plan.choose import Measured, call_overhead, cheapest, measure, overhead
from gossamer.runtime.plan.facts import Facts
from gossamer.runtime.plan.graph import LAYERS, Graph, Node
from gossamer.runtime.plan.integers import integer_choice
from gossamer.runtime.plan.kernels import KERNELS, candidates
from gossamer.runtime.plan.plan import Run
from gossamer.runtime.plan.program import Program, steps_of
from gossamer.runtime.plan.rounded import rounded

__all__ = ["DENSE", "Whole", "Wholes", "copies"]

DENSE = ("onnxruntime", "openvino")
"""Kernels that are engines of whole networks."""

_SPARSE = 0.5  # density below which a layer is no part of a dense run


@dataclass(frozen=True)
class Whole:
    """A candidate for the whole network: its run, its graph, kernels and what was measured.

    Attributes:
        integers: answers are those of eight bits.
        kept: layers that stay float32 -> why, where that is another choice than the plan's.
        note: what is to be said of it.
    """

    run: Run
    graph: Graph
    chosen: dict[str, str] = field(default_factory=dict)
    found: dict[str, Measured] = field(default_factory=dict)
    integers: bool = False
    kept: dict[str, str] | None = None
    note: str = ""


@dataclass
class Wholes:
    """Makes the candidates.

    Args:
        flat, captured: the network, and its graph.
        inputs: the example's arrays.
        engine: as for :func:`gossamer.runtime.plan.door.compile_network`.
        facts: is told what was refused.
        rounds, seconds, say: as there.
    """

    flat: Flat
    captured: Captured
    inputs: Sequence[np.ndarray]
    engine: str
    facts: Facts
    rounds: int
    seconds: float
    say: Callable[[str], None]
    tried: list[dict[str, str]] = field(default_factory=list)

    def all(self, batches: Sequence[Sequence[Tensor]]) -> Iterator[tuple[str, Whole]]:
        """Names and candidates, each made when it is asked for: they hold the weights.

        ``batches``: calibration inputs, of float32 none. Raises as
        :func:`gossamer.runtime.plan.integers.integer_choice`.
        """
        graph, engine = self.captured.graph, self.engine
        lowered = not all(n.op == "torch" for n in graph.nodes)
        chosen: dict[str, str] = {}
        found: dict[str, Measured] = {}
        if batches:
            yield from self._eight_bits([[t.numpy() for t in batch] for batch in batches])
        elif engine in ("plan", "own") or (engine == "auto" and lowered):
            self.say(f"timing the kernels of {len(graph.nodes)} operators")
            found = measure(
                graph, self.captured.islands, self.inputs, self.facts.batch,
                threads=self.facts.threads, rounds=self.rounds, seconds=self.seconds,
                only=self._may,
            )  # fmt: skip
            chosen, _ = cheapest(graph, found, overhead(self.facts.threads), call_overhead())
            yield from self._program("plan", graph, chosen, found)
        for name in (*DENSE, "numpy"):
            asked = engine == name or (engine == "auto" and name in DENSE and lowered)
            if asked and not (batches and name == "numpy"):
                yield from self._served(name, name, graph)
        if engine == "auto" and chosen:
            yield from self._variants(graph, chosen, found)
        if engine in ("auto", "torch"):
            yield "torch", Whole(partial(_eager, self.flat), graph)

    def _may(self, kernel: str) -> bool:
        """Whether a kernel may be chosen: ``own`` leaves out those of other packages."""
        return self.engine != "own" or not KERNELS[kernel].package

    def _program(
        self,
        name: str,
        graph: Graph,
        chosen: Mapping[str, str],
        found: Mapping[str, Measured],
        **more: Any,
    ) -> Iterator[tuple[str, Whole]]:
        try:
            steps = steps_of(graph, chosen, self.facts.threads, self.captured.islands)
            run = Program(graph, steps)
        except ArgumentError as e:
            self.facts.notes.append(f"{name} was refused: {e}")
        else:
            self.tried.append(dict(chosen))
            yield name, Whole(run, graph, dict(chosen), dict(found), **more)

    def _served(
        self, name: str, kernel: str, graph: Graph, **more: Any
    ) -> Iterator[tuple[str, Whole]]:
        """All that a kernel serves by it, the rest by what always does."""
        if kernel in DENSE and not any(_serves(graph, n, kernel) for n in graph.nodes):
            if self.engine == kernel:
                why = next((w for n in graph.nodes if (w := candidates(graph, n).get(kernel))), "")
                raise ArgumentError(f"engine={kernel!r}: {why or 'it serves no part of this'}")
            return
        chosen = {}
        for node in graph.nodes:
            takes = _serves(graph, node, kernel)
            chosen[node.name] = "torch" if node.op == "torch" else kernel if takes else "numpy"
        if chosen not in self.tried:  # the plan may be just that
            yield from self._program(name, graph, chosen, {}, **more)

    def _variants(
        self, graph: Graph, plan: Mapping[str, str], found: Mapping[str, Measured]
    ) -> Iterator[tuple[str, Whole]]:
        """The plan with runs of it in engines whose time single nodes do not say."""
        loops: dict[str, str] = {}
        for node in graph.nodes:
            if node.op in onnx_recurrent.OPERATORS and _serves(graph, node, "onnxruntime"):
                linear, shaped = onnx_recurrent.before(graph, node)
                loops |= dict.fromkeys((linear.name, shaped.name, node.name), "onnxruntime")
        theirs = {
            n.name: "openvino"
            for n in graph.nodes
            if plan[n.name] == "onnxruntime" and _serves(graph, n, "openvino")
        }
        variants = {
            "plan, loops in onnxruntime": loops,
            "plan, its onnxruntime in openvino": theirs,
            "plan, dense runs in openvino": _dense_runs(graph),
        }
        for name, changed in variants.items():
            chosen = {**plan, **changed}
            if chosen not in self.tried:
                yield from self._program(name, graph, chosen, found)

    def _eight_bits(self, batches: Sequence[Sequence[np.ndarray]]) -> Iterator[tuple[str, Whole]]:
        engine, captured, facts = self.engine, self.captured, self.facts
        best, apart = integer_choice(
            captured, batches, self.inputs, facts, measured=engine != "numpy", rounds=self.rounds,
            seconds=self.seconds, say=self.say, only=self._may,
        )  # fmt: skip
        name = "numpy" if engine == "numpy" else "plan"
        integers = bool(best.layers)
        yield from self._program(name, best.graph, best.chosen, best.found, integers=integers)
        able = [
            n for n in DENSE if any(_serves(captured.graph, x, n) for x in captured.graph.nodes)
        ]
        if engine != "auto" or not able:
            return
        self.say(f"eight bits as {' and '.join(able)} want them")
        graph = rounded(captured.graph, captured.islands, batches, apart)
        count = sum(n.op.endswith("_w8") for n in graph.nodes)
        kept = {layer: why for layer, why in facts.kept.items() if why in apart.values()}
        for kernel in able if count else ():
            yield from self._served(
                f"{kernel}-int8", kernel, graph, integers=True, kept=kept,
                note=f"{count} layers run in {kernel}'s own eight bits: activations of eight, "
                "weights of seven; the layers' errors are those of this library's integers",
            )  # fmt: skip


def _serves(graph: Graph, node: Node, kernel: str) -> bool:
    return node.op in KERNELS[kernel].serves and candidates(graph, node)[kernel] == ""


def _dense_runs(graph: Graph) -> dict[str, str]:
    """Neighbours that OpenVINO serves, a dense layer among them and no sparse one."""
    found: dict[str, str] = {}
    run: list[str] = []
    dense = False
    for node in (*graph.nodes, None):
        layer = node is not None and node.op in LAYERS
        if node is not None and _serves(graph, node, "openvino"):
            weight = graph.constants[node.inputs[1]] if layer else None
            full = weight is None or np.count_nonzero(weight) >= _SPARSE * weight.size
            if full:
                run.append(node.name)
                dense = dense or layer
                continue
        if dense:
            found |= dict.fromkeys(run, "openvino")
        run, dense = [], False
    return found


def _eager(flat: Flat, arrays: Sequence[np.ndarray], batch: int) -> list[np.ndarray]:
    given = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    with torch.no_grad():
        return [t.numpy() for t in flat(*copies(given))]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For a network that may write its inputs."""
    return [t.clone() for t in tensors]
