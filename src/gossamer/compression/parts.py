"""What several stages do: scans, random examples, values put in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.compression.settings import Training
from gossamer.compression.state import State
from gossamer.core import names, nest
from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.datasets import Split
from gossamer.prune import sensitivity
from gossamer.quantize import SharedWeights
from gossamer.training.curvature import hessian_diagonal
from gossamer.training.fisher import fisher_diagonal

__all__ = [
    "Importance",
    "curvature",
    "examples",
    "importance_labels",
    "importances",
    "mask_zeros",
    "put_quantized",
    "random_batches",
    "scan",
]

_BATCH = 64  # examples of a calibration batch
_TOKENS = 1024  # of one for a language model, whose outputs are large
# Batches whose gradients a score averages; SNIP's paper takes one of 100 to 128 patterns.
_BATCHES, _PATTERNS = 4, 128
# Their noise falls with the square root; the Fisher takes examples one at a time.
_FISHER, _CURVATURE = 512, 4096

Importance = Literal["equal", "fisher", "hessian"]
"""What a weight's squared error costs."""


def scan(
    state: State, weights: Mapping[str, object], densities: Sequence[float]
) -> sensitivity.Sensitivity:
    """Score against density, one layer at a time; kept for the report."""
    found = sensitivity.scan(
        state.model,
        state.data.validation,
        task=state.task,
        densities=densities,
        include=list(weights),
        progress=lambda done, total: state.progress.count(f"{state.name} scan", done, total),
    )
    state.scan = found.as_dict()
    return found


def random_batches(state: State, part: int) -> Iterator[tuple[Any, Any]]:
    """A few random training batches."""
    split, generator = state.data.train, state.generator(part)
    order = torch.randperm(len(split), generator=generator)[: _BATCHES * _PATTERNS]
    for rows in order.split(_PATTERNS):
        yield split.batch(rows, None, generator)


def examples(split: Split, count: int, generator: torch.Generator) -> list[Any]:
    """Random examples of a split, in batches; fewer in each where the examples are long texts."""
    rows = torch.randperm(len(split), generator=generator)[:count]
    size, one = _BATCH, nest.leaves(split.one()[0])
    if not any(t.is_floating_point() for t in one):
        size = max(1, min(size, _TOKENS // max(1, *(t.numel() for t in one))))
    return [split.batch(part)[0] for part in rows.split(size)]


def importance_labels(kind: Importance) -> str:
    """Why an importance cannot do without labels; empty where it can."""
    reads = "importance: hessian is of a loss against them (fisher does without)"
    return reads if kind == "hessian" else ""


def importances(state: State, kind: Importance, layers: Iterable[str]) -> dict[str, Tensor]:
    """How much the squared error of each weight costs, by layer, in parts of the layer's mean."""
    if kind == "equal":
        return {}
    chosen = list(layers)
    if kind == "fisher":
        found = fisher_diagonal(
            state.model,
            state.data.train,
            state.task,
            examples=_FISHER,
            generator=state.generator(98),
            include=chosen,
            progress=lambda *now: state.progress.count(f"{state.name} Fisher", *now),
        )
    else:
        found = curvature(state, chosen)
    return {n: t / t.mean() for n, t in found.items() if t.any()}


def curvature(state: State, layers: Sequence[str]) -> dict[str, Tensor]:
    """The Hessian's diagonal on the first training examples."""
    return hessian_diagonal(
        state.model,
        state.data.train.take(slice(0, _CURVATURE)),
        include=layers,
        progress=lambda *now: state.progress.count(f"{state.name} Hessian", *now),
    )


def put_quantized(state: State, found: dict[str, Quantized], finetune: Training | None) -> None:
    """Fine-tune the shared values, or just put them in."""
    if not found:
        raise ArgumentError(f"stage {state.name} names no layer; give bits or lam for some")
    state.fixed -= set(found)
    if finetune is not None and finetune.epochs:
        method = SharedWeights(found)
        state.train(finetune, [method, *state.others(found)])
        method.finish()
    else:
        parameters = names.parameters(state.model)
        with torch.no_grad():
            for name, quantized in found.items():
                parameters[name].copy_(quantized.dequantize())
    state.fixed |= set(found)
    mask_zeros(state, found)


def mask_zeros(state: State, weights: Mapping[str, object]) -> None:
    """Count weights that a quantizer rounded to zero as pruned from here on."""
    parameters = names.parameters(state.model)
    zeros = Masks.of({n: parameters[n] for n in weights if n in state.masks})
    state.masks.update(zeros)
