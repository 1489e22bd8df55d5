"""What was left to torch, run in torch: an exported subgraph between arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.runtime.plan.graph import Graph, Node

__all__ = ["bind", "pack"]


def pack(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], threads: int
) -> Any:
    """Never called: a program is given the modules of its islands."""
    raise ArgumentError(
        f"{nodes[0].name} runs in torch, and a plan's file holds no module of torch"
    )


def bind(
    packed: Any,
    nodes: Sequence[Node],
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    batch: int,
) -> Callable[[], object]:
    """The call: arrays are shared with torch, results copied."""
    import torch

    given = [torch.from_numpy(a) for a in inputs]
    wanted = [torch.from_numpy(a) for a in outputs]
    sizes = [d if d >= 0 else -d * batch for d in nodes[0].attributes["sizes"]]

    def call() -> None:
        with torch.no_grad():
            for have, want in zip(packed(*given, *sizes), wanted, strict=True):
                want.copy_(have)

    return call
