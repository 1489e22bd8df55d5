"""A graph ready to run: steps of kernels over one block of memory, planned once a batch size.

Values that live at different times share memory (:func:`layout`). Calls from several threads run
side by side, each on a block of its own; blocks are kept for the next call, so many and no more.
"""

from __future__ import annotations

import _thread
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gossamer.runtime.plan.arrays import LINE
from gossamer.runtime.plan.chains import chained
from gossamer.runtime.plan.graph import Graph, Node, Value, resolved, users
from gossamer.runtime.plan.kernels import KERNELS, Call

__all__ = ["Program", "Step", "layout", "steps_of"]

_SIZES, _BLOCKS = 4, 8  # batch sizes that are kept, and blocks of each


class Step(NamedTuple):
    """One call: a kernel, the nodes it computes, what it reads and gives, its packed weights."""

    kernel: str
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    packed: Any


def steps_of(
    graph: Graph, chosen: Mapping[str, str], threads: int, islands: Sequence[Any] = ()
) -> list[Step]:
    """The graph's nodes packed by their kernels, runs of a merging kernel as one step.

    ``chosen``: node's name -> kernel. A reshape is no step where no kernel merges it: it is another
    view of the same memory, and ends a run, which could not read what it gives itself. Raises as a
    kernel's ``pack`` does.
    """
    runs: list[tuple[str, list[Node]]] = []
    open_run = False
    for node in graph.nodes:
        name = chosen[node.name]
        merges = KERNELS[name].merges
        if open_run and merges and runs[-1][0] == name:
            runs[-1][1].append(node)
        elif node.op != "reshape" or merges:
            runs.append((name, [node]))
        open_run = merges
    made = []
    readers = users(graph)
    for name, nodes in runs:
        inside = {out for n in nodes for out in n.outputs}
        own = set(map(id, nodes))
        read = {n for n in inside if any(id(r) not in own for r in readers.get(n, ()))}
        inputs = dict.fromkeys(
            i for n in nodes for i in n.inputs if i and i not in inside and i not in graph.constants
        )
        outputs = [o for n in nodes for o in n.outputs if o in read or o in graph.outputs]
        if name == "torch":
            packed = islands[nodes[0].attributes["island"]]
            outputs = list(nodes[0].outputs)
        else:
            packed = KERNELS[name].pack(graph, nodes, list(inputs), outputs, threads)
        made.append(Step(name, tuple(nodes), tuple(inputs), tuple(outputs), packed))
    return made


def _bytes(value: Value, batch: int) -> int:
    size = math.prod(resolved(value.shape, batch)) * np.dtype(value.dtype).itemsize
    return -(-max(1, size) // LINE) * LINE


def _roots(graph: Graph, steps: Sequence[Step]) -> dict[str, str]:
    """Value -> the value whose memory it is: a reshape without a step is its input's."""
    computed = {n.name for step in steps for n in step.nodes}
    roots: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "reshape" and node.name not in computed and node.inputs[0] in graph.values:
            roots[node.name] = roots.get(node.inputs[0], node.inputs[0])
    return roots


def layout(graph: Graph, steps: Sequence[Step], batch: int) -> tuple[dict[str, int], int]:
    """Where each value begins in the block, in bytes, and how long the block is.

    Larger values are placed first, each at the lowest place that is free while it lives: from the
    step that gives it to the last that reads it. What the network takes and gives lives throughout.
    """
    roots = _roots(graph, steps)
    lives: dict[str, list[int]] = {name: [0, len(steps)] for name in graph.inputs}
    for number, step in enumerate(steps):
        for name in step.outputs:
            lives.setdefault(roots.get(name, name), [number, number])
        for name in step.inputs:
            root = roots.get(name, name)
            lives.setdefault(root, [number, number])[1] = max(number, lives[root][1])
    for name in graph.outputs:
        lives[roots.get(name, name)][1] = len(steps)
    sizes = {name: _bytes(graph.values[name], batch) for name in lives}
    placed: dict[str, int] = {}
    for name in sorted(lives, key=lambda n: (-sizes[n], lives[n])):
        begin, end = lives[name]
        busy = sorted(
            (placed[o], placed[o] + sizes[o])
            for o in placed
            if lives[o][0] <= end and lives[o][1] >= begin
        )
        at = 0
        for low, high in busy:
            if at + sizes[name] <= low:
                break
            at = max(at, high)
        placed[name] = at
    total = max((placed[n] + sizes[n] for n in placed), default=0)
    return {**placed, **{n: placed[r] for n, r in roots.items() if r in placed}}, total


class _Block:
    """The memory of one call, and the calls bound to it.

    ``given``: arrays in place of what the network takes, C-contiguous and 64-byte aligned.
    """

    def __init__(
        self,
        graph: Graph,
        steps: Sequence[Step],
        batch: int,
        given: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        places, total = layout(graph, steps, batch)
        raw = np.zeros(total + LINE, np.uint8)
        start = -raw.ctypes.data % LINE
        self.arrays: dict[str, np.ndarray] = {}
        roots = _roots(graph, steps)
        for name, place in places.items():
            value = graph.values[name]
            shape = resolved(value.shape, batch)
            if given and (held := given.get(roots.get(name, name))) is not None:
                self.arrays[name] = held.reshape(shape)
                continue
            size = math.prod(shape) * np.dtype(value.dtype).itemsize
            held = raw[start + place : start + place + size]
            self.arrays[name] = held.view(value.dtype).reshape(shape)
        bound = [
            KERNELS[s.kernel].bind(
                s.packed, s.nodes, [self.arrays[n] for n in s.inputs],
                [self.arrays[n] for n in s.outputs], batch,
            )
            for s in steps
        ]  # fmt: skip
        self.calls: list[Call] = chained(bound)
        # not those of other engines, nor compiled ones
        self.warns = any(
            not (KERNELS[s.kernel].package or hasattr(call, "step"))
            for s, call in zip(steps, bound, strict=True)
        )
        self.inputs = [self.arrays[n] for n in graph.inputs]
        self.outputs = [self.arrays[n] for n in graph.outputs]

    def run(self) -> None:
        """All calls, from what lies in ``inputs`` to ``outputs``."""
        if self.warns:
            with np.errstate(all="ignore"):  # NaN passes without a warning, as in torch
                for call in self.calls:
                    call()
        else:
            for call in self.calls:
                call()


class Program:
    """A graph with a kernel for every node, which several threads may call at once.

    Args:
        graph: what is computed.
        steps: of :func:`steps_of`.
    """

    def __init__(self, graph: Graph, steps: Sequence[Step]) -> None:
        self.graph, self.steps = graph, tuple(steps)
        self._free: OrderedDict[int, list[_Block]] = OrderedDict()
        self._lock = _thread.allocate_lock()  # what threading's is

    def block(self, batch: int) -> _Block:
        """Memory for one call; a fresh one where all are at work."""
        with self._lock:
            waiting = self._free.get(batch)
            if waiting:
                return waiting.pop()
        return _Block(self.graph, self.steps, batch)

    def give_back(self, batch: int, block: _Block) -> None:
        """Keep the memory for a later call."""
        with self._lock:
            waiting = self._free.setdefault(batch, [])
            self._free.move_to_end(batch)
            if len(waiting) < _BLOCKS:
                waiting.append(block)
            while len(self._free) > _SIZES:
                self._free.popitem(last=False)

    def __call__(self, inputs: Sequence[np.ndarray], batch: int) -> list[np.ndarray]:
        """The outputs, in arrays of their own, for inputs of the shapes that the graph says."""
        if batch == 0:
            values = [self.graph.values[n] for n in self.graph.outputs]
            return [np.zeros(resolved(v.shape, 0), v.dtype) for v in values]
        block = self.block(batch)
        for have, want in zip(inputs, block.inputs, strict=True):
            want[...] = have
        block.run()
        found = [a.copy() for a in block.outputs]
        self.give_back(batch, block)
        return found

    def bound(self, inputs: Sequence[np.ndarray], batch: int) -> Callable[[], Sequence[np.ndarray]]:
        """The program on these very arrays: what it gives is overwritten by the next call.

        Arrays that no kernel can read where they lie are copied at each call. ``batch``: above 0.
        """
        able = {
            name: array
            for name, array in zip(self.graph.inputs, inputs, strict=True)
            if array.flags.c_contiguous and not array.ctypes.data % LINE
        }
        block = _Block(self.graph, self.steps, batch, able)
        copied = [
            pair for pair in zip(inputs, block.inputs, strict=True)
            if not np.shares_memory(*pair)
        ]  # fmt: skip

        def call() -> Sequence[np.ndarray]:
            for have, want in copied:
                want[...] = have
            block.run()
            return block.outputs

        return call

    def bytes(self, batch: int = 1) -> int:
        """Of the memory of one call, weights and kernels' own not counted."""
        return layout(self.graph, self.steps, batch)[1]
