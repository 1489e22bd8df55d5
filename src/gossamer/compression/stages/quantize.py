"""Weights of a few values a layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.compression.layers import per_layer
from gossamer.compression.settings import Bits, Fraction, NotNegative, OneOf, Positive, Training
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State, ends_of
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.core.method import Masked, Method
from gossamer.core.quantizer import Quantizer, Trajectory
from gossamer.quantize.fewbits import QUANTIZERS
from gossamer.quantize.ttq import SparsityWarning

__all__ = ["Quantize"]


_ROWS = 60  # of a trajectory
_FALLEN = 1e-4  # of the other scale


class Quantize(LayerStage):
    """Weights of a few values a layer, trained through latent float weights.

    What is pruned stays zero. The layers keep their values in later trainings, until another
    stage acts on them.

    Attributes:
        method: ``ttq`` (trained ternary), ``twn`` (ternary weight network), ``bwn`` (binary, one
            scale), ``binary-connect`` (-1 and 1), ``dorefa``, ``lsq`` (learned step), ``lab``,
            ``lat`` and ``laq`` (loss-aware binary, ternary and m bits), ``fixed`` (power-of-two
            grids), ``uniform`` (a plain grid).
        bits: of dorefa, lsq, laq, fixed and uniform; one number, or one by layer pattern (a layer
            that none names stays float).
        ends: without ``include``, the first and the last layer too.
        threshold: ttq: weights within this part of the largest one are zero; or ``density``, the
            fraction that is not.
        lr_factor: ttq: the scales' learning rate over that of the weights; their gradients are
            sums, so SGD without batch-norm takes about 0.01, Adam 1.
        start: ttq: both scales begin at 1 (``ones``), or where they fit the weights (``fit``).
        per_filter: bwn: a scale for each filter.
        stochastic: binary-connect: draw the signs.
        scales: lat, laq: one for all, or 2: one for the positive weights and one for the negative.
        exact: lat: by sorting, or by alternation.
        levels: laq: ``linear`` or ``logarithmic``.
        beta: lab, lat, laq: curvature from a moving average of squared gradients with this factor,
            in place of the optimizer's own.
        clip: lab, lat, laq: latent weights stay in [-clip, clip]; 0: free.
        train: the training; left out: the values are found once, from the weights as they are.
    """

    stage: Literal["quantize"] = "quantize"
    method: Annotated[str, OneOf(QUANTIZERS)]
    bits: Bits | None = None
    ends: bool = False
    threshold: Annotated[float, Field(ge=0, lt=1)] | None = None
    density: Fraction | None = None
    start: Literal["ones", "fit"] = "fit"
    lr_factor: Positive = 1.0
    per_filter: bool = False
    stochastic: bool = False
    scales: Literal[1, 2] = 1
    exact: bool = True
    levels: Literal["linear", "logarithmic"] = "linear"
    beta: Annotated[float, Field(ge=0, lt=1)] | None = None
    clip: NotNegative = 0.0
    train: Training | None = None

    rebuilds: ClassVar[bool] = True
    by_layer: ClassVar[tuple[str, ...]] = ("bits",)

    @model_validator(mode="after")
    def _one_method(self) -> Quantize:
        own = QUANTIZERS[self.method]
        every = {axis for found in QUANTIZERS.values() for axis in found.axes}
        for axis in sorted(every - set(own.axes)):
            if getattr(self, axis) != type(self).model_fields[axis].default:
                owners = ", ".join(m for m, found in QUANTIZERS.items() if axis in found.axes)
                axes = ", ".join(own.axes) or "none"
                raise ValueError(f"{axis} is an axis of {owners}; {self.method} takes {axes}")
        if own.bits is not None:
            self._check_bits(*own.bits)
        if self.threshold is not None and self.density is not None:
            raise ValueError("give threshold or density (the fraction that is not zero), not both")
        bare = own.second_moment and self.beta is None
        if bare and self.train is not None and self.train.optimizer == "sgd":
            raise ValueError(
                f"{self.method} reads the optimizer's second moment, and sgd keeps none; use "
                "optimizer: adam, or give beta, such as 0.999"
            )
        return self

    def _check_bits(self, low: int, high: int) -> None:
        if self.levels == "logarithmic":
            high = 5
        if self.bits is None:
            raise ValueError(f"{self.method} needs bits, {low} to {high}")
        for bits in self.bits.values() if isinstance(self.bits, dict) else (self.bits,):
            if not low <= bits <= high:
                raise ValueError(f"bits {bits} is outside {low} to {high}, of {self.method}")

    @property
    def retrains(self) -> bool:
        """Where it trains at all."""
        return self.train is not None

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights that it acts on: the two ends stay float unless asked for."""
        found = super().weights(model)
        if self.include is None and not self.ends:
            apart = set(names.ends(model))
            found = {name: p for name, p in found.items() if name not in apart}
        if not found:
            raise ArgumentError(
                "no weight is left to quantize: the first and the last layer stay float; ends: "
                "true takes them too, include: names layers"
            )
        return found

    def run(self, state: State) -> None:
        """Train few-bit weights, and leave them as plain tensors that later trainings hold."""
        weights = list(self.weights(state.model))
        bits: dict[str, int | None] = dict.fromkeys(weights)
        if self.bits is not None:
            bits = dict(per_layer(state.model, weights, self.bits))
        if not bits:
            raise ArgumentError(f"stage {state.name} names no layer; give bits for some")
        within = Masks({n: m for n, m in state.masks.items() if n in bits})
        self._check_filters(within)
        methods: list[Quantizer] = [
            self._quantizer(state, width, [n for n, b in bits.items() if b == width])
            for width in dict.fromkeys(bits.values())
        ]
        state.fixed -= set(bits)
        notes: dict[str, Any] = {"method": self.method, "warnings": []}
        with _told(state, notes["warnings"]):
            if self.train is None or not self.train.epochs:
                for method in methods:
                    method.attach(state.model)
            else:
                updates = self.train.epochs * math.ceil(
                    len(state.data.train) / self.train.batch_size
                )
                log = Trajectory(methods, every=math.ceil(updates / _ROWS))
                kept: list[Method] = [Masked(within)] if within else []
                history = state.train(self.train, [*methods, log, *kept, *state.others(bits)])
                log.finish()
                notes["trajectory"] = [_short(row) for row in log.rows]
                notes |= ends_of(history)
        for method in methods:
            method.finish()
        parameters = names.parameters(state.model)
        within.apply_(state.model)
        if self.method == "ttq":
            notes["warnings"] += _fallen(methods)
        notes["layers"] = [_row(n, parameters[n].detach(), b) for n, b in bits.items()]
        state.fixed |= set(bits)
        state.notes["quantize"] = notes

    def _check_filters(self, within: Masks) -> None:
        pruned = [n for n, m in within.items() if not m.all()]
        if self.per_filter and pruned:
            raise ArgumentError(
                f"per_filter: true needs whole filters, and {pruned[0]} is pruned; leave it out, "
                "or exclude the layer"
            )

    def _quantizer(self, state: State, bits: int | None, layers: list[str]) -> Quantizer:
        """The method on some of the layers."""
        entry = QUANTIZERS[self.method]
        axes = {axis: getattr(self, axis) for axis in entry.axes}
        if "bits" in axes:
            axes["bits"] = bits
        return entry.build(
            layers,
            **axes,
            trained=self.train is not None and self.train.epochs > 0,
            generator=lambda: state.generator(99),
        )


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
