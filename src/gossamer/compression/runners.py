"""What each stage of a recipe does to the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.compression import run_changes, run_fewbits, run_sparse, schema
from gossamer.compression.floor import Rounds
from gossamer.compression.layers import chosen, per_layer
from gossamer.compression.recipe import Training
from gossamer.compression.state import State
from gossamer.core import access, names, schedules
from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError, one_of
from gossamer.core.masks import Masks, keep_top
from gossamer.core.method import Masked
from gossamer.prune import deconstruct, magnitude, obd, sensitivity, snip
from gossamer.quantize import RateAware, SharedWeights, ecsq, share, uniform
from gossamer.structure import absorb_batchnorm, dead
from gossamer.training.curvature import hessian_diagonal

__all__ = ["run_stage"]

# Patterns per Hessian diagonal: its noise falls with their square root, its cost is linear.
_CURVATURE_PATTERNS = 4096


def run_stage(state: State, stage: Any) -> None:
    """Do what the stage says to ``state``."""
    _RUNNERS[type(stage)](state, stage)


def _train(state: State, stage: schema.Train) -> None:
    state.train(stage, state.others(()))


def _scan(state: State, weights: Mapping[str, Any], densities: Sequence[float]) -> Any:
    found = sensitivity.scan(
        state.model,
        state.data.validation,
        densities=densities,
        include=list(weights),
        progress=lambda done, total: state.progress.count(f"{state.name} scan", done, total),
    )
    state.scan = found.as_dict()
    return found


def _sensitivity(state: State, stage: schema.Sensitivity) -> None:
    _scan(state, chosen(state.model, stage.include, stage.exclude), stage.densities)


def _scores(
    state: State, stage: schema.Prune, weights: Mapping[str, nn.Parameter], part: int
) -> dict[str, Tensor]:
    include = list(weights)
    if stage.method == "snip":
        return snip.scores(state.model, run_sparse.batches(state, part), include=include)
    if stage.method in deconstruct.CRITERIA:
        initial = state.initial()
        return deconstruct.scores(
            stage.method, {n: initial[n] for n in weights}, weights, alpha=1.0
        )
    if stage.method == "random":
        return magnitude.random_scores(state.model, state.generator(part), include=include)
    if stage.method == "obd":
        patterns = state.data.train.take(slice(0, _CURVATURE_PATTERNS))
        diagonal = hessian_diagonal(
            state.model,
            patterns,
            include=include,
            progress=lambda done, total: state.progress.count(f"{state.name} Hessian", done, total),
        )
        return obd.saliency(weights, diagonal)
    one_of("method", stage.method, ("magnitude", "random", "snip", "obd", *deconstruct.CRITERIA))
    return magnitude.scores(state.model, include=include)


def _budgets(
    state: State, stage: schema.Prune, weights: Mapping[str, Any]
) -> Iterator[float | dict[str, float]]:
    """The density, or the densities by layer, of each round."""
    final: float | dict[str, float]
    if stage.density == "auto":
        final = _scan(state, weights, sensitivity.DENSITIES).suggest(stage.max_drop)
    elif isinstance(stage.density, float) and stage.scope == "global":
        final = stage.density
    else:
        # a layer that no pattern names stays as it is
        final = dict.fromkeys(weights, 1.0) | per_layer(state.model, weights, stage.density or 1.0)

    def at(end: float, part: float) -> float:
        if part == 1:
            return end
        if stage.schedule == "geometric":
            return float(end**part)
        return schedules.make(stage.schedule, 1.0, end)(part)

    for number in range(1, stage.rounds + 1):
        part = number / stage.rounds
        if isinstance(final, dict):
            yield {name: at(end, part) for name, end in final.items()}
        else:
            yield at(final, part)


def _prune(state: State, stage: schema.Prune) -> None:
    weights = chosen(state.model, stage.include, stage.exclude)
    within = Masks({n: m for n, m in state.masks.items() if n in weights})
    quality = stage.quality
    rounds = Rounds(state, stage.rounds)
    with _dropout(state.model, stage.dropout) as rescale:
        for number, budget in enumerate(_budgets(state, stage, weights), 1):
            if quality is not None:
                masks = magnitude.threshold_masks(
                    state.model,
                    per_layer(state.model, weights, quality),
                    within=within,
                    include=list(weights),
                )
            else:
                scores = _scores(state, stage, weights, number)
                masks = keep_top(
                    scores, budget, scope=stage.scope, within=within or None, floor=stage.floor
                )
                magnitude.warn_empty(masks)
            masks.apply_(state.model)
            state.masks.update(masks)
            within = masks
            last = number == stage.rounds
            settings = stage.retrain if last else stage.between or stage.retrain
            if settings is not None and settings.epochs:
                rescale(state.masks)
                state.train(settings, [Masked(state.masks)], number)
            rounds.ended(number)
    rounds.back()


@contextmanager
def _dropout(model: nn.Module, rate: float | None) -> Iterator[Callable[[Masks], None]]:
    """Rescale dropout for each round's masks; every layer gets its own rate back at the end."""
    own = {m: m.p for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)}

    def rescale(masks: Masks) -> None:
        for module, p in own.items():
            module.p = p if rate is None else rate
        magnitude.rescale_dropout(model, masks)

    try:
        yield rescale
    finally:
        for module, p in own.items():
            module.p = p


def _quantized(state: State, found: dict[str, Quantized], finetune: Training | None) -> None:
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
    _mask_zeros(state, found)


def _mask_zeros(state: State, weights: Mapping[str, Any]) -> None:
    # A quantizer may round weights to zero; they count as pruned from here on.
    parameters = names.parameters(state.model)
    zeros = Masks.of({n: parameters[n] for n in weights if n in state.masks})
    state.masks.update(zeros)


def _share(state: State, stage: schema.Share) -> None:
    weights = chosen(state.model, stage.include, stage.exclude)
    generator = state.generator()
    found = {
        name: share(weights[name], bits=bits, init=stage.init, generator=generator, name=name)
        for name, bits in per_layer(state.model, weights, stage.bits).items()
    }
    _quantized(state, found, stage.finetune)


def _ecsq(state: State, stage: schema.Ecsq) -> None:
    weights = chosen(state.model, stage.include, stage.exclude)
    found = {}
    for name, lam in per_layer(state.model, weights, stage.lam).items():
        w = weights[name].detach()
        kept = w[w != 0]
        scale = float(kept.var(correction=0)) if kept.numel() else 0.0
        found[name] = ecsq(w, lam * scale, name=name)
    _quantized(state, found, stage.finetune)


def _rate_aware(state: State, stage: schema.RateAware) -> None:
    weights = chosen(state.model, stage.include, stage.exclude)
    steps = per_layer(state.model, weights, stage.step)
    state.fixed -= set(steps)
    updates = stage.retrain.epochs * math.ceil(len(state.data.train) / stage.retrain.batch_size)
    method = RateAware.relative(
        state.model,
        step=steps,
        lam=stage.lam,
        ramp=int(stage.ramp * updates),
        dead_zone=stage.dead_zone,
        masks=state.masks,
        include=list(steps),
    )
    state.train(stage.retrain, [method, *state.others(steps)])
    method.finish()
    _mask_zeros(state, steps)


@torch.no_grad()
def _quantize_biases(state: State, stage: schema.QuantizeBiases) -> None:
    weights = names.weights(state.model)
    found = {
        name: p
        for name, p in names.parameters(state.model).items()
        if name not in weights and p.is_floating_point() and p.ndim <= 1
    }
    access.check_weights(state.model, found)
    for name, p in found.items():
        p.copy_(uniform(p, bits=stage.bits, name=name).dequantize())


def _remove_dead(state: State, stage: schema.RemoveDead) -> None:
    found = dead.remove_dead(state.model, state.masks, state.example())
    if found.count:
        state.progress.say(found.table())
    state.notes["dead_units"] = {
        "without_inputs": {n: len(u) for n, u in found.without_inputs.items()},
        "without_outputs": {n: len(u) for n, u in found.without_outputs.items()},
        "not_examined": found.not_examined,
    }


def _absorb_batchnorm(state: State, stage: schema.AbsorbBatchnorm) -> None:
    absorb_batchnorm(state.model, state.example())


_RUNNERS: dict[type, Callable[[State, Any], None]] = {
    schema.Train: _train,
    schema.Sensitivity: _sensitivity,
    schema.Prune: _prune,
    schema.Share: _share,
    schema.Ecsq: _ecsq,
    schema.RateAware: _rate_aware,
    schema.Quantize: run_fewbits.quantize,
    schema.Activations: run_changes.activations,
    schema.FixedPoint: run_changes.fixed_point,
    schema.Svd: run_changes.svd,
    schema.Rewind: run_sparse.rewind,
    schema.SparseTrain: run_sparse.sparse_train,
    schema.Supermask: run_sparse.supermask,
    schema.Tickets: run_sparse.tickets,
    schema.RemoveDead: _remove_dead,
    schema.QuantizeBiases: _quantize_biases,
    schema.AbsorbBatchnorm: _absorb_batchnorm,
}
