"""Stages that leave weights, activations or whole networks of a few bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gossamer.recipe.base import Bits, Fraction, Layers, NotNegative, Training

__all__ = ["METHODS", "Quantize"]

METHODS: dict[str, tuple[str, ...]] = {
    "ttq": ("threshold", "density", "start"),
    "twn": (),
    "bwn": ("per_filter",),
    "binary-connect": ("stochastic",),
    "dorefa": ("bits",),
    "lsq": ("bits",),
    "lab": ("beta", "clip"),
    "lat": ("scales", "exact", "beta", "clip"),
    "laq": ("bits", "levels", "scales", "beta", "clip"),
    "uniform": ("bits",),
}
"""Method of the stage ``quantize`` -> the axes it has."""

_WIDTHS = {"dorefa": (1, 8), "lsq": (2, 8), "laq": (2, 8), "uniform": (2, 8)}
_LOSS_AWARE = ("lab", "lat", "laq")


class Quantize(Layers):
    """Weights of a few values a layer, trained through latent float weights.

    What is pruned stays zero. The layers keep their values in later trainings, until another
    stage acts on them.

    Attributes:
        method: ``ttq`` (trained ternary), ``twn`` (ternary weight network), ``bwn`` (binary, one
            scale), ``binary-connect`` (-1 and 1), ``dorefa``, ``lsq`` (learned step), ``lab``,
            ``lat`` and ``laq`` (loss-aware binary, ternary and m bits), ``uniform`` (a plain
            grid).
        bits: of dorefa, lsq, laq and uniform; one number, or one by layer pattern (a layer that
            none names stays float).
        ends: without ``include``, the first and the last layer too.
        threshold: ttq: weights within this part of the largest one are zero; or ``density``, the
            fraction that is not.
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
    method: Literal[
        "ttq",
        "twn",
        "bwn",
        "binary-connect",
        "dorefa",
        "lsq",
        "lab",
        "lat",
        "laq",
        "uniform",
    ]
    bits: Bits | None = None
    ends: bool = False
    threshold: Annotated[float, Field(ge=0, lt=1)] | None = None
    density: Fraction | None = None
    start: Literal["ones", "fit"] = "fit"
    per_filter: bool = False
    stochastic: bool = False
    scales: Literal[1, 2] = 1
    exact: bool = True
    levels: Literal["linear", "logarithmic"] = "linear"
    beta: Annotated[float, Field(ge=0, lt=1)] | None = None
    clip: NotNegative = 0.0
    train: Training | None = None

    @model_validator(mode="after")
    def _one_method(self) -> Quantize:
        axes = METHODS[self.method]
        every = {axis for found in METHODS.values() for axis in found}
        for axis in sorted(every - set(axes)):
            if getattr(self, axis) != type(self).model_fields[axis].default:
                owners = ", ".join(m for m, found in METHODS.items() if axis in found)
                own = ", ".join(axes) or "none"
                raise ValueError(f"{axis} is an axis of {owners}; {self.method} takes {own}")
        if self.method in _WIDTHS:
            self._check_bits()
        if self.threshold is not None and self.density is not None:
            raise ValueError("give threshold or density (the fraction that is not zero), not both")
        bare = self.method in _LOSS_AWARE and self.beta is None
        if bare and self.train is not None and self.train.optimizer == "sgd":
            raise ValueError(
                f"{self.method} reads the optimizer's second moment, and sgd keeps none; use "
                "optimizer: adam, or give beta, such as 0.999"
            )
        return self

    def _check_bits(self) -> None:
        low, high = _WIDTHS[self.method]
        if self.levels == "logarithmic":
            high = 5
        if self.bits is None:
            raise ValueError(f"{self.method} needs bits, {low} to {high}")
        for bits in self.bits.values() if isinstance(self.bits, dict) else (self.bits,):
            if not low <= bits <= high:
                raise ValueError(f"bits {bits} is outside {low} to {high}, of {self.method}")
