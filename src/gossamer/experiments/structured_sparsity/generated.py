"""Shrinking is right: 10,000 generated networks with random zero groups, each shrunk and compared.

Random graphs of convolutions (grouped, depthwise, transposed, strided, dilated, of one to three
dimensions), norms, sums, concatenations, splits, gates, pools and flattens; recurrent networks of
one to three levels; transformers; perceptrons with tied and functional layers and constants to
fold. How a network was made tells which of its sizes must fall; the shrunk network is compared
with the masked one on fresh inputs in double precision.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.structured_sparsity.graphs import Generated, graph
from gossamer.experiments.structured_sparsity.sequences import perceptron, recurrent, transformer
from gossamer.structure import shrink

__all__ = ["KINDS", "checked", "generated", "network"]

TOLERANCE = 1e-5  # of the largest output
KINDS: tuple[Callable[[int], Generated], ...] = (graph, graph, recurrent, transformer, perceptron)
PARTS = {"plain": "plain", "residual": "add", "concatenating": "cat", "grouped": "grouped",
         "depthwise": "depthwise"}  # fmt: skip
_PART = 250  # networks of one part


def network(seed: int) -> Generated:
    """The network of a seed; the kinds take turns."""
    return KINDS[seed % len(KINDS)](seed)


def _fresh(example: Tensor, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    if example.is_floating_point():
        return torch.randn(example.shape, generator=source, dtype=torch.float64)
    return torch.randint(0, 9, example.shape, generator=source)


def checked(seed: int) -> tuple[str, str, float, tuple[str, ...]]:
    """Kind of a network, what came of it, the difference of outputs on fresh inputs, and its parts.

    What came of it: ``shrunk`` (all that was zeroed has gone), ``whole`` (nothing was to go),
    ``left: ...`` and ``refused: ...`` with the names, ``silent`` (something stayed without a word)
    or ``wrong``.
    """
    made = network(seed)
    before = {n: tuple(p.shape) for n, p in made.model.named_parameters()}
    needed = {n: s for n, s in made.sizes.items() if before.get(n, s) != s}
    try:
        result = shrink(made.model, made.example)
    except ArgumentError as e:
        return made.kind, f"refused: {e}", 0.0, made.parts
    after = {n: tuple(p.shape) for n, p in result.model.named_parameters()}
    off = _difference(made.model, result.model, _fresh(made.example, seed))
    if not off <= TOLERANCE:
        return made.kind, "wrong", off, made.parts
    sizes = ((n, after.get(n, s), s) for n, s in needed.items())  # or gone with its module
    stayed = [n for n, got, s in sizes if any(a > b for a, b in zip(got, s, strict=True))]
    if not stayed:
        return made.kind, "shrunk" if needed else "whole", off, made.parts
    named = "; ".join(map(str, result.pinned))
    return made.kind, f"left: {named}" if named else "silent", off, made.parts


@torch.no_grad()
def _difference(one: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    a, b = (m.double().eval()(inputs.clone()) for m in (one, other))
    if a.shape != b.shape or not bool(b.isfinite().all()):
        return math.inf
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))


def _part(first: int, last: int) -> list[tuple[int, str, str, float, tuple[str, ...]]]:
    torch.set_num_threads(1)
    return [(seed, *checked(seed)) for seed in range(first, last)]


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    counts, total = raw["counts"], raw["networks"]
    to_go = total - counts.get("whole", 0)
    wrong = counts.get("wrong", 0) + counts.get("silent", 0)
    return [
        Claim(
            "structured-sparsity.3",
            "generated networks of which the shrunk one gives another output, or something stayed "
            "without being named",
            wrong,
            "<=",
            0,
        ),
        Claim(
            "structured-sparsity.3",
            "part of the generated networks with zero groups that lost all of them",
            counts.get("shrunk", 0) / max(1, to_go),
            ">=",
            0.95,
        ),
        Claim(
            "structured-sparsity.3",
            "largest difference of outputs of generated networks, relative to the largest output",
            raw["largest"],
            "<=",
            TOLERANCE,
        ),
        *(
            Claim(
                "survey.2",
                f"largest difference of outputs of {name} generated networks whose channels went",
                raw["built_of"][name]["largest"],
                "<=",
                TOLERANCE,
            )
            for name in PARTS
        ),
    ]


def _of(rows: list[Any], part: str) -> dict[str, float]:
    """Of the networks with a part: how many were shrunk, and the largest difference."""
    some = [row for row in rows if part in row[4] and row[2] in ("shrunk", "wrong")]
    return {"networks": len(some), "largest": max((row[3] for row in some), default=math.nan)}


@experiment("shrink-generated", judge=_judge)
def generated(context: Context) -> dict[str, Any]:
    """10,000 networks (500 when quick), shrunk and compared."""
    total = 500 if context.quick else 10_000
    jobs = [(first, first + _PART) for first in range(0, total, _PART)]
    rows = [row for part in context.map(_part, jobs) for row in part]
    counts = Counter(what.partition(":")[0] for _, _, what, *_ in rows)
    kinds: dict[str, Counter[str]] = {}
    for _, kind, what, *_ in rows:
        kinds.setdefault(kind, Counter())[what.partition(":")[0]] += 1
    reasons = Counter(what for _, _, what, *_ in rows if ":" in what)
    return {
        "networks": total,
        "counts": dict(counts),
        "kinds": {k: dict(v) for k, v in sorted(kinds.items())},
        "built_of": {name: _of(rows, part) for name, part in PARTS.items()},
        "largest": max(row[3] for row in rows),
        "reasons": dict(reasons.most_common(40)),
        "wrong": [row for row in rows if row[2] in ("wrong", "silent")],
    }
