"""The table of scores: what each criterion ranks weights by, and what it reads for that.

A score is a function of the weights (clean name -> tensor) and of what it reads, by keyword; it
returns name -> tensor of the weight's shape, higher = keep. A budget over it makes masks
(:func:`gossamer.core.masks.keep_top`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.core.names import Tensors
from gossamer.core.tables import Table
from gossamer.prune import deconstruct, obd, snip

__all__ = ["SCORES", "Reads", "Score"]

Reads = Literal["initial", "hessian", "model", "batches", "generator"]
"""What a score may ask for beside the weights:

- ``initial``: the weights before any training, name -> tensor;
- ``hessian``: its diagonal, name -> tensor (:mod:`gossamer.training.curvature`);
- ``model``: the network, left as it is;
- ``batches``: some random training batches, (inputs, targets);
- ``generator``: a ``torch.Generator``.
"""


@dataclass(frozen=True)
class Score:
    """A criterion.

    Attributes:
        function: ``function(weights, **what it reads)`` -> name -> score, higher = keep.
        reads: what it is handed.
    """

    function: Callable[..., Tensors]
    reads: tuple[Reads, ...] = ()


def _magnitude(weights: Mapping[str, Tensor]) -> Tensors:
    return {name: w.detach().abs() for name, w in weights.items()}


def _random(weights: Mapping[str, Tensor], *, generator: torch.Generator) -> Tensors:
    return {name: torch.rand(w.shape, generator=generator) for name, w in weights.items()}


def _obd(weights: Mapping[str, Tensor], *, hessian: Mapping[str, Tensor]) -> Tensors:
    return obd.saliency(weights, hessian)


def _snip(
    weights: Mapping[str, Tensor], *, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> Tensors:
    return snip.scores(model, batches, include=list(weights))


def _criterion(
    name: str, weights: Mapping[str, Tensor], *, initial: Mapping[str, Tensor]
) -> Tensors:
    return deconstruct.scores(name, {n: initial[n] for n in weights}, weights, alpha=1.0)


SCORES: Table[Score] = Table(
    "score",
    {
        "magnitude": Score(_magnitude),
        "obd": Score(_obd, ("hessian",)),
        "snip": Score(_snip, ("model", "batches")),
        "random": Score(_random, ("generator",)),
        **{
            name: Score(partial(_criterion, name), ("initial",))
            for name in deconstruct.CRITERIA
            if name not in ("large_final",)  # which is magnitude
        },
    },
)
