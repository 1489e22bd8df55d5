"""What the stages do that leave few-bit weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gossamer.compression.layers import per_layer, quantized_weights
from gossamer.compression.schema_fewbits import Quantize
from gossamer.compression.state import State, ends_of
from gossamer.core import names
from gossamer.core.errors import ArgumentError, one_of
from gossamer.core.masks import Masks
from gossamer.core.method import Masked, Method
from gossamer.core.quantizer import Quantizer, Trajectory, on_kept
from gossamer.quantize import LSQ, TTQ, FixedWeights, LossAware, Projected, loss_aware, projected
from gossamer.quantize.ttq import SparsityWarning

__all__ = ["quantize"]

_ROWS = 60  # of a trajectory
_SEARCHED = 100  # optimizer steps between two searches of fractional lengths
_FALLEN = 1e-4  # of the other scale
_THRESHOLD = 0.05  # of TTQ, the authors'


def quantize(state: State, stage: Quantize) -> None:
    """Train few-bit weights, and leave them as plain tensors that later trainings hold."""
    weights = list(quantized_weights(state.model, stage))
    bits: dict[str, int | None] = dict.fromkeys(weights)
    if stage.bits is not None:
        bits = dict(per_layer(state.model, weights, stage.bits))
    if not bits:
        raise ArgumentError(f"stage {state.name} names no layer; give bits for some")
    within = Masks({n: m for n, m in state.masks.items() if n in bits})
    _check_filters(stage, within)
    methods: list[Quantizer] = [
        _quantizer(state, stage, width, [n for n, b in bits.items() if b == width])
        for width in dict.fromkeys(bits.values())
    ]
    state.fixed -= set(bits)
    notes: dict[str, Any] = {"method": stage.method, "warnings": []}
    with _told(state, notes["warnings"]):
        if stage.train is None or not stage.train.epochs:
            for method in methods:
                method.attach(state.model)
        else:
            updates = stage.train.epochs * math.ceil(len(state.data.train) / stage.train.batch_size)
            log = Trajectory(methods, every=math.ceil(updates / _ROWS))
            kept: list[Method] = [Masked(within)] if within else []
            history = state.train(stage.train, [*methods, log, *kept, *state.others(bits)])
            log.finish()
            notes["trajectory"] = [_short(row) for row in log.rows]
            notes |= ends_of(history)
    for method in methods:
        method.finish()
    parameters = names.parameters(state.model)
    within.apply_(state.model)
    if stage.method == "ttq":
        notes["warnings"] += _fallen(methods)
    notes["layers"] = [_row(n, parameters[n].detach(), b) for n, b in bits.items()]
    state.fixed |= set(bits)
    state.notes["quantize"] = notes


def _check_filters(stage: Quantize, within: Masks) -> None:
    pruned = [n for n, m in within.items() if not m.all()]
    if stage.per_filter and pruned:
        raise ArgumentError(
            f"per_filter: true needs whole filters, and {pruned[0]} is pruned; leave it out, or "
            "exclude the layer"
        )


def _quantizer(state: State, stage: Quantize, bits: int | None, layers: list[str]) -> Quantizer:
    """The stage's method on some of its layers."""
    method: str = stage.method
    if method == "ttq":
        given = stage.threshold is not None or stage.density is not None
        return TTQ(
            threshold=stage.threshold if given else _THRESHOLD,
            density=stage.density,
            start=stage.start,
            weight_decay=0.0,
            lr_factor=stage.lr_factor,
            every=1 << 40,  # Trajectory logs for all methods
            include=layers,
        )
    if method in ("lsq", "fixed"):
        assert bits is not None  # the recipe has checked it
        if method == "fixed":
            return FixedWeights(bits, every=_SEARCHED, include=layers)
        return LSQ(bits=bits, weight_decay=0.0, include=layers)
    if method in ("lab", "lat", "laq"):
        # without training nothing has moments: every weight counts the same
        beta = 0.0 if stage.train is None else stage.beta
        return LossAware(
            on_kept(_loss_aware(stage, bits)), beta=beta, clip=stage.clip or None, include=layers
        )
    one_of("method", method, ("twn", "bwn", "binary-connect", "dorefa", "uniform"))
    name = {
        "twn": "twn",
        "bwn": "bwn, per filter" if stage.per_filter else "bwn",
        "binary-connect": "binaryconnect" + (", stochastic" if stage.stochastic else ""),
    }.get(method, f"{method}-{bits}")
    draws = stage.stochastic
    rule = projected.PROJECTIONS[name]
    return Projected(
        rule if stage.per_filter else on_kept(rule),
        clip=1.0 if method == "binary-connect" else None,
        generator=state.generator(99) if draws else None,
        include=layers,
    )


def _loss_aware(stage: Quantize, bits: int | None) -> Callable[[Tensor, Tensor], Tensor]:
    one_of("levels", stage.levels, ("linear", "logarithmic"))
    if stage.method == "lab":
        return loss_aware.binary
    if stage.method == "lat" and stage.exact:
        return partial(loss_aware.ternary, scales=stage.scales)
    rule = loss_aware.logarithmic if stage.levels == "logarithmic" else loss_aware.linear
    return partial(rule, bits=2 if bits is None else bits, scales=stage.scales)


def _fallen(methods: Sequence[Quantizer]) -> list[str]:
    """Of trained scales that have fallen to next to nothing: their gradient is a sum."""
    told = []
    for method in methods:
        for name, quantized in method.quantized().items():
            book = quantized.codebook[quantized.codebook != 0].abs()
            if len(book) and float(book.min()) < _FALLEN * float(book.max()):
                told.append(
                    f"{name}: one of its two scales has fallen to {float(book.min()):.2g}; the "
                    "gradient of a scale sums over all its weights: give lr_factor, such as "
                    "0.01, or use optimizer: adam"
                )
    return told


@contextmanager
def _told(state: State, told: list[str]) -> Iterator[None]:
    """Say and keep a method's own warnings; others go where they went."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", SparsityWarning)
        show = warnings.showwarning

        def say(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, SparsityWarning):
                told.append(str(message))
                state.progress.say(f"  warning: {message}")
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = say
        yield


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the trajectory with numbers as long as a plot can show."""
    return {
        key: {n: float(f"{v:.5g}") for n, v in found.items()} if key != "step" else found
        for key, found in row.items()
    }


@torch.no_grad()
def _row(name: str, value: Tensor, bits: int | None) -> dict[str, Any]:
    """What a layer holds now."""
    low, high = torch.aminmax(value)
    distinct = len(value.unique())
    return {
        "name": name,
        "weights": value.numel(),
        "bits": math.log2(distinct) if bits is None else bits,
        "values": distinct,
        "low": float(low),
        "high": float(high),
        "density": float(torch.count_nonzero(value)) / value.numel(),
    }
