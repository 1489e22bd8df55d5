"""Stages that leave weights, activations or whole networks of a few bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gossamer.compression.settings import (
    Alpha,
    Bits,
    ByLayer,
    Fraction,
    LayerDensity,
    Layers,
    NotNegative,
    Positive,
    Strict,
    Training,
)

__all__ = ["METHODS", "Activations", "FixedPoint", "Quantize", "Svd"]

Width = Annotated[int, Field(ge=2, le=16)]

METHODS: dict[str, tuple[str, ...]] = {
    "ttq": ("threshold", "density", "start", "lr_factor"),
    "twn": (),
    "bwn": ("per_filter",),
    "binary-connect": ("stochastic",),
    "dorefa": ("bits",),
    "lsq": ("bits",),
    "lab": ("beta", "clip"),
    "lat": ("scales", "exact", "beta", "clip"),
    "laq": ("bits", "levels", "scales", "beta", "clip"),
    "fixed": ("bits",),
    "uniform": ("bits",),
}
"""Method of the stage ``quantize`` -> the axes it has."""

_WIDTHS = {"dorefa": (1, 8), "lsq": (2, 8), "laq": (2, 8), "fixed": (2, 16), "uniform": (2, 8)}
_LOSS_AWARE = ("lab", "lat", "laq")


class Quantize(Layers):
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
        "fixed",
        "uniform",
    ]
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


class Activations(Strict):
    """ReLUs of few levels, trained through a straight-through estimator.

    The file holds each alpha and tells of the changed modules; :func:`gossamer.load` makes them.

    Attributes:
        bits: levels 0 to 2^bits - 1.
        estimator: what stands for the derivative.
        form: the level above (``ceil``, the paper's), or the nearest one (``round``).
        alpha: distance of two levels: of least squared error on training data (``lloyd``) or for
            normal inputs (``half-gaussian``), the former as the start of a trained one
            (``learned``), or a number for all layers.
        functional: replace called ReLUs too, in a captured graph.
        include, exclude: patterns of activations, by module or node name.
        train: the training.
    """

    stage: Literal["activations"] = "activations"
    bits: Annotated[int, Field(ge=2, le=8)]
    estimator: Literal["identity", "relu", "clipped"] = "clipped"
    form: Literal["ceil", "round"] = "ceil"
    alpha: Alpha = "lloyd"
    functional: bool = True
    include: list[str] | None = None
    exclude: list[str] | None = None
    train: Training | None = None


class FixedPoint(Strict):
    """The whole network in fixed point, batch-norm folded; the last stage before ``pack``.

    Attributes:
        bits: of the weights, one number or by layer pattern; a layer that none names has
            ``activation_bits``.
        activation_bits, bias_bits: of data and of biases (left out: as the data).
        mode: fractional lengths differ by layer (``dynamic``), or are one for all weights and one
            for all data (``static``).
        calibration: how many examples decide the lengths.
        calibrate_on: of which split; the test split decides nothing.
        compare: measure both modes at 16, 8, 6 and 4 bits besides, for the report.
    """

    stage: Literal["fixed_point"] = "fixed_point"
    bits: ByLayer[Width] = 8
    activation_bits: Width = 8
    bias_bits: Width | None = None
    mode: Literal["dynamic", "static"] = "dynamic"
    calibration: Annotated[int, Field(ge=1)] = 256
    calibrate_on: Literal["train", "validation"] = "train"
    compare: bool = False


class Svd(Layers):
    """Linear layers as products of two smaller ones, by truncated singular value decomposition.

    Layers that would not get smaller stay as they are. Later stages name the factors ``LAYER.0``
    and ``LAYER.1``; patterns such as ``LAYER`` or ``LAYER*`` hold for both.

    Attributes:
        rank: one number, or one by layer pattern (a layer that none names is left alone).
        energy: in place of a rank: the least that keeps this part of the squared singular values.
        train: the training of the factors.
    """

    stage: Literal["svd"] = "svd"
    rank: ByLayer[Annotated[int, Field(ge=1)]] | None = None
    energy: LayerDensity | None = None
    train: Training | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Svd:
        if (self.rank is None) == (self.energy is None):
            raise ValueError("give either rank or energy (the part that is kept)")
        return self
