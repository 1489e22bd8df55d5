"""What a plan knows of itself, and all of it that a file holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gossamer.runtime.plan.graph import Graph

__all__ = ["Contents", "Facts", "Probe"]

Probe = tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]
"""An example: inputs, and what torch gave for them."""


class Facts:
    """What a plan knows of itself, as plain values.

    Attributes:
        engine: what runs: ``plan``, or the engine that runs the whole network.
        processor, threads, batch: where, and how, it was measured.
        chosen: node's name -> its kernel; empty where torch runs the whole network.
        rows: a row a node: layer, op, shape, density, weights, kernel, ms, refused.
        whole: whole network's candidate -> least milliseconds.
        check: how near it is to torch, in words.
        notes: what else is to be said.
        precision: ``int8`` where layers of what runs compute in integers.
        errors: layer -> its error in integers on the calibration inputs
            (:mod:`gossamer.runtime.plan.calibration`); empty where none were asked for.
        kept: layer that stays float32 -> why.
    """

    def __init__(
        self,
        engine: str,
        processor: str,
        threads: int,
        batch: int,
        chosen: dict[str, str] | None = None,
        rows: list[dict[str, Any]] | None = None,
        whole: dict[str, float] | None = None,
        check: str = "",
        notes: list[str] | None = None,
        precision: str = "float32",
        errors: dict[str, float] | None = None,
        kept: dict[str, str] | None = None,
    ) -> None:
        self.engine, self.processor, self.threads, self.batch = engine, processor, threads, batch
        self.chosen = {} if chosen is None else chosen
        self.rows = [] if rows is None else rows
        self.whole = {} if whole is None else whole
        self.check, self.precision = check, precision
        self.notes = [] if notes is None else notes
        self.errors = {} if errors is None else errors
        self.kept = {} if kept is None else kept

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Facts) and vars(self) == vars(other)


class Contents(NamedTuple):
    """A plan's parts.

    Attributes:
        graph: what is computed.
        facts: what was measured.
        forms: of what it takes and gives (:mod:`~gossamer.runtime.plan.forms`).
        names: of the inputs.
        probe: an example; of none, ``((), ())``.
    """

    graph: Graph
    facts: Facts
    forms: tuple[Any, Any]
    names: Sequence[str]
    probe: Probe
