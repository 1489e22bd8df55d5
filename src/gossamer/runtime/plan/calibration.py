"""Scales of activations from calibration inputs, and what each layer loses in integers.

A value's codes reach over what it was while the calibration inputs passed, or over a part of that:
the part at which the mean squared difference between values and their codes' is least (few values
lie far out, and a finer step serves all others). A layer's error is that of its result in integers,
given its true inputs in codes: the root of the squared differences' sum over that of the squared
results. **A layer stays float32 where its error is above .05 and above four times the median of all
layers'**, or where its result is not finite.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.runtime.kernels.eight_bits import TOP, Scale
from gossamer.runtime.plan.choose import values_of
from gossamer.runtime.plan.graph import Graph, Node, batch_of, resolved
from gossamer.runtime.plan.int8 import Lowering
from gossamer.runtime.plan.kernels import candidates
from gossamer.runtime.plan.program import Program, steps_of

__all__ = ["FAR", "SMALL", "errors", "far", "scales"]

FAR, SMALL = 4.0, 0.05  # times the median; of the result
_LEAST = 1e-30  # a range whose steps float32 divides by
_BINS = 2048  # of a value's histogram
_PARTS = [part / 40 for part in range(40, 7, -1)]  # of a value's ends
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
    """Of every float32 value of rows or maps, at the least squared error on the inputs.

    Raises :class:`ArgumentError` for calibration inputs that are NaN or infinite, and for a value
    that becomes so.
    """
    ends: dict[str, tuple[float, float]] = {}
    for values in _values(graph, islands, batches):
        for name, array in values.items():
            low, high = float(array.min()), float(array.max())
            if not np.isfinite(low + high):
                raise ArgumentError(
                    f"{name!r} is NaN or infinite for a calibration input; int8 has no code for it"
                )
            old = ends.get(name, (low, high))
            ends[name] = min(low, old[0]), max(high, old[1])
    wide = {n: pair for n, pair in ends.items() if pair[1] - pair[0] > _LEAST}
    counts = {n: np.zeros(_BINS, np.int64) for n in wide}
    for values in _values(graph, islands, batches):
        for name, array in values.items():
            if name in wide:
                low, high = wide[name]
                bins = ((array.reshape(-1) - low) * (_BINS / (high - low))).astype(np.int32)
                counts[name] += np.bincount(np.minimum(bins, _BINS - 1), minlength=_BINS)
    return {n: _closest(counts[n], *wide[n]) if n in wide else Scale(1.0, 0) for n in ends}


def _values(
    graph: Graph, islands: Sequence[object], batches: Sequence[Arrays]
) -> Iterator[dict[str, np.ndarray]]:
    """What may become codes, of a few examples at a time."""
    for arrays, count in _chunks(graph, batches):
        values = values_of(graph, islands, arrays, count)
        yield {
            name: array
            for name, array in values.items()
            if array.dtype == np.float32 and array.ndim in (2, 4) and array.size
        }


def _closest(counts: np.ndarray, low: float, high: float) -> Scale:
    """The scale of least squared error, of values counted in bins from ``low`` to ``high``.

    Ends are brought in together, in steps of a part of the whole; of equals the widest is taken.
    """
    at = low + (np.arange(len(counts)) + 0.5) * ((high - low) / len(counts))
    best, least = Scale.of(low, high), np.inf
    for part in _PARTS:
        scale = Scale.of(part * low, part * high)
        codes = np.clip(np.rint(at / scale.scale) + scale.zero, 0, TOP)
        off = float(counts @ np.square((codes - scale.zero) * scale.scale - at))
        if off < least:
            best, least = scale, off
    return best


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
