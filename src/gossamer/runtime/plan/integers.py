"""The integer plan of a captured network: calibrated, its errors stated, its layers chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.runtime.plan.calibration import errors, far, scales
from gossamer.runtime.plan.capture import Captured
from gossamer.runtime.plan.explain import describe
from gossamer.runtime.plan.facts import Facts
from gossamer.runtime.plan.int8 import Lowering, able
from gossamer.runtime.plan.precision import Choice, Search

__all__ = ["integer_choice"]

Arrays = Sequence[np.ndarray]


def integer_choice(
    captured: Captured,
    calibration: Sequence[Arrays],
    inputs: Arrays,
    facts: Facts,
    *,
    measured: bool,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
    only: Callable[[str], bool] = lambda name: True,
) -> tuple[Choice, dict[str, str]]:
    """The layers in integers and their kernels; ``facts`` is told of errors and what stays.

    And the layers (their nodes' names) that lose too much in integers -> why.

    Args:
        calibration: batches of input arrays.
        inputs: the example's.
        measured: choose by times; else every layer that may, with the portable kernels.
        only: which kernels may be chosen.
        rounds, seconds, say: as for :func:`gossamer.runtime.plan.door.compile_network`.

    Raises :class:`ArgumentError` where no layer has an integer form, or the calibration inputs are
    NaN or infinite.
    """
    graph, islands = captured.graph, captured.islands
    layers = able(graph)
    if not layers:
        raise ArgumentError(
            "precision='int8': no convolution of two dimensions or linear layer of rows is in the "
            "plan's own operators; compile with precision='float32'"
        )
    say(f"calibrating {len(layers)} layers")
    lowering = Lowering(graph, scales(graph, islands, calibration))
    found = errors(lowering, islands, calibration, layers)
    apart = far(found)
    names = {node.name: describe(graph, node)["layer"] for node in layers}
    if len(set(names.values())) < len(names):  # a layer that is called more than once
        names = {node: f"{layer} ({node})" for node, layer in names.items()}
    facts.errors = {names[node]: error for node, error in found.items()}
    rest = [name for name in found if name not in apart]
    search = Search(lowering, islands, inputs, facts.batch, facts.threads, rounds, seconds, only)
    if measured:
        say(f"timing the kernels of {len(graph.nodes)} operators in float32 and int8")
        best = search.best(rest)
    else:
        mixed = lowering.graph_of(rest)
        kernels = {n.name: "torch" if n.op == "torch" else "numpy" for n in mixed.nodes}
        best = Choice(frozenset(rest), mixed, kernels, {}, 0.0)
    slow = dict.fromkeys(set(rest) - best.layers, "it is no slower so")
    facts.kept = {names[node]: why for node, why in (apart | slow).items()}
    return best, apart
