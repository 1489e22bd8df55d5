"""What is measured of the file."""

from __future__ import annotations

from typing import ClassVar, Literal

from gossamer.compression.stage import Stage
from gossamer.compression.state import State

__all__ = ["Evaluate"]


class Evaluate(Stage):
    """What is measured of the finished file; the last stage where it is given.

    ``latency``: time the network before and after, batch 1, in the same engine. ``plan``: both
    compiled (:mod:`gossamer.runtime.plan`), which leaves zeros out; that takes some seconds more.
    ``int8``: the file's network in the plan that is fastest, eight bits allowed, against the dense
    network in eight bits, in onnxruntime where it is installed, and the plan's score on test data.
    """

    stage: Literal["evaluate"] = "evaluate"
    latency: bool = True
    plan: bool | Literal["int8"] = False

    only_before: ClassVar[tuple[str, ...] | None] = ()
    otherwise: ClassVar[str] = "evaluate comes last"

    def run(self, state: State) -> None:
        """Nothing: the run measures at its end, with or without this stage."""
