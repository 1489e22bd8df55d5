"""Scales of activations from calibration inputs, and what each layer loses in integers.

A value's codes reach from the least to the greatest that it had while the calibration inputs
passed, as in the export's int8. A layer's error is that of its result in integers, given its true
inputs in codes: the root of the squared differences' sum over that of the squared results. **A
layer stays float32 where its error is above .05 and above four times the median of all layers'**,
or where its result is not finite.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.runtime.kernels.eight_bits import Scale
from gossamer.runtime.plan.choose import values_of
from gossamer.runtime.plan.graph import Graph, Node, batch_of, resolved
from gossamer.runtime.plan.int8 import Lowering
from gossamer.runtime.plan.kernels import candidates
from gossamer.runtime.plan.program import Program, steps_of

__all__ = ["FAR", "SMALL", "errors", "far", "scales"]

FAR, SMALL = 4.0, 0.05  # times the median; of the result
_LEAST = 1e-30  # a range whose steps float32 divides by
_ROWS = 8  # examples at a time: every value of theirs is held

Arrays = Sequence[np.ndarray]


def _chunks(graph: Graph, batches: Sequence[Arrays]) -> Iterator[tuple[Arrays, int]]:
    """Batches in parts of a few examples where the graph takes any number."""
    firsts = [graph.values[name].shape[0] for name in graph.inputs if graph.values[name].shape]
    for arrays in batches:
        shapes = [resolved(graph.values[name].shape, 1) for name in graph.inputs]
        if not graph.free and shapes != [a.shape for a in arrays]:
            raise ArgumentError(
                f"calibration holds a batch of {[a.shape for a in arrays]}; this network takes the "
                f"example's shapes alone: {shapes}"
            )
        count = batch_of(graph, arrays)
        if not graph.free or len(firsts) < len(arrays) or max(firsts) >= 0:
            yield arrays, count
            continue
        for start in range(0, count, _ROWS):
            end = min(start + _ROWS, count)
            parts = [a[start * -f : end * -f] for a, f in zip(arrays, firsts, strict=True)]
            yield parts, end - start


def scales(graph: Graph, islands: Sequence[object], batches: Sequence[Arrays]) -> dict[str, Scale]:
    """Of every float32 value of rows or maps: its codes reach over all that it was.

    Raises :class:`ArgumentError` for calibration inputs that are NaN or infinite, and for a value
    that becomes so.
    """
    ends: dict[str, tuple[float, float]] = {}
    for arrays, count in _chunks(graph, batches):
        for name, array in values_of(graph, islands, arrays, count).items():
            if array.dtype != np.float32 or array.ndim not in (2, 4) or not array.size:
                continue
            low, high = float(array.min()), float(array.max())
            if not np.isfinite(low + high):
                raise ArgumentError(
                    f"{name!r} is NaN or infinite for a calibration input; int8 has no code for it"
                )
            old = ends.get(name, (low, high))
            ends[name] = min(low, old[0]), max(high, old[1])
    return {n: Scale.of(*pair) if pair[1] - pair[0] > _LEAST else Scale(1.0, 0)
            for n, pair in ends.items()}  # fmt: skip


def errors(
    lowering: Lowering, islands: Sequence[object], batches: Sequence[Arrays], nodes: Sequence[Node]
) -> dict[str, float]:
    """Layer's name -> its error on the calibration inputs, of those that ``nodes`` are."""
    graph = lowering.graph
    alone = {node.name: _alone(lowering, node) for node in nodes}
    off, size = dict.fromkeys(alone, 0.0), dict.fromkeys(alone, 0.0)
    for arrays, count in _chunks(graph, batches):
        values = values_of(graph, islands, arrays, count)
        for name, program in alone.items():
            (got,) = program([values[n] for n in program.graph.inputs], count)
            wanted = values[name].astype(np.float64)
            off[name] += float(np.square(wanted - got).sum())
            size[name] += float(np.square(wanted).sum())
    return {n: float(np.sqrt(off[n] / size[n])) if size[n] else float(off[n] > 0) for n in alone}


def _alone(lowering: Lowering, node: Node) -> Program:
    """One layer in integers, from floats to floats."""
    mixed = lowering.alone(node).graph_of({node.name})
    chosen = {}
    for one in mixed.nodes:
        able = [n for n, why in candidates(mixed, one).items() if not why]
        chosen[one.name] = "sparse-int8" if "sparse-int8" in able else "numpy"
    return Program(mixed, steps_of(mixed, chosen, 1))


def far(found: Mapping[str, float]) -> dict[str, str]:
    """Layers that stay float32 -> why."""
    if not found:
        return {}
    middle = statistics.median(found.values())
    most = max(SMALL, FAR * middle)
    return {
        name: f"its int8 error of {error:.2g} is above {most:.2g}"
        for name, error in found.items()
        if not error <= most
    }
