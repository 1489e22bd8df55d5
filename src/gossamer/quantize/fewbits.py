"""The table of few-bit quantizers: how each is built, and the axes it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from gossamer.core.errors import one_of
from gossamer.core.quantizer import Quantizer, on_kept
from gossamer.core.tables import Table
from gossamer.quantize import loss_aware, projected
from gossamer.quantize.fixed_training import FixedWeights
from gossamer.quantize.loss_aware import LossAware
from gossamer.quantize.lsq import LSQ
from gossamer.quantize.projected import Projected
from gossamer.quantize.ttq import TTQ

__all__ = ["QUANTIZERS", "FewBits"]

_NEVER = 1 << 40  # optimizer steps between two rows of a quantizer's own log
_SEARCHED = 100  # optimizer steps between two searches of fractional lengths
_THRESHOLD = 0.05  # of TTQ, the authors'


@dataclass(frozen=True)
class FewBits:
    """A method of weights of a few values a layer.

    Attributes:
        build: ``build(layers, **axes, trained=, generator=)`` -> a quantizer of these layers
            (clean names). ``axes`` are those below; ``bits`` is an int. ``trained``: whether a
            training follows; ``generator()``: a ``torch.Generator`` for what is drawn.
        values: of a layer, in words.
        axes: settings it has beside its layers.
        bits: the least and the most; None where it has no such axis.
        second_moment: it reads the optimizer's, unless ``beta`` is given.
    """

    build: Callable[..., Quantizer]
    values: str
    axes: tuple[str, ...] = ()
    bits: tuple[int, int] | None = None
    second_moment: bool = False


def _ttq(
    layers: Sequence[str],
    *,
    threshold: float | None,
    density: float | None,
    start: Literal["ones", "fit"],
    lr_factor: float,
    **_: Any,
) -> Quantizer:
    return TTQ(
        threshold=_THRESHOLD if threshold is None and density is None else threshold,
        density=density,
        start=start,
        weight_decay=0.0,
        lr_factor=lr_factor,
        every=_NEVER,
        include=layers,
    )


def _lsq(layers: Sequence[str], *, bits: int, **_: Any) -> Quantizer:
    return LSQ(bits=bits, weight_decay=0.0, include=layers)


def _fixed(layers: Sequence[str], *, bits: int, **_: Any) -> Quantizer:
    return FixedWeights(bits, every=_SEARCHED, include=layers)


def _project(name: str, layers: Sequence[str], **_: Any) -> Quantizer:
    return Projected(on_kept(projected.PROJECTIONS[name]), clip=None, include=layers)


def _widths(name: str, layers: Sequence[str], *, bits: int, **rest: Any) -> Quantizer:
    return _project(f"{name}-{bits}", layers, **rest)


def _bwn(layers: Sequence[str], *, per_filter: bool, **rest: Any) -> Quantizer:
    if per_filter:
        rule = projected.PROJECTIONS["bwn, per filter"]
        return Projected(rule, clip=None, include=layers)
    return _project("bwn", layers, **rest)


def _binary_connect(
    layers: Sequence[str],
    *,
    stochastic: bool,
    generator: Callable[[], torch.Generator],
    **_: Any,
) -> Quantizer:
    name = "binaryconnect" + (", stochastic" if stochastic else "")
    drawn = generator() if stochastic else None
    rule = on_kept(projected.PROJECTIONS[name])
    return Projected(rule, clip=1.0, generator=drawn, include=layers)


def _loss_aware(
    rule: Callable[..., Any],
    layers: Sequence[str],
    *,
    beta: float | None,
    clip: float,
    trained: bool,
    **_: Any,
) -> Quantizer:
    # without training nothing has moments: every weight counts the same
    beta = beta if trained else 0.0
    return LossAware(on_kept(rule), beta=beta, clip=clip or None, include=layers)


def _lab(layers: Sequence[str], **rest: Any) -> Quantizer:
    return _loss_aware(loss_aware.binary, layers, **rest)


def _lat(layers: Sequence[str], *, scales: Literal[1, 2], exact: bool, **rest: Any) -> Quantizer:
    rule = partial(loss_aware.ternary, scales=scales)
    if not exact:
        rule = partial(loss_aware.linear, bits=2, scales=scales)
    return _loss_aware(rule, layers, **rest)


def _laq(
    layers: Sequence[str],
    *,
    bits: int,
    levels: Literal["linear", "logarithmic"],
    scales: Literal[1, 2],
    **rest: Any,
) -> Quantizer:
    one_of("levels", levels, ("linear", "logarithmic"))
    rule = loss_aware.logarithmic if levels == "logarithmic" else loss_aware.linear
    return _loss_aware(partial(rule, bits=bits, scales=scales), layers, **rest)


QUANTIZERS: Table[FewBits] = Table(
    "quantizer",
    {
        "ttq": FewBits(
            _ttq, "0, Wp, -Wn, both trained", ("threshold", "density", "start", "lr_factor")
        ),
        "twn": FewBits(partial(_project, "twn"), "0, ±alpha"),
        "bwn": FewBits(_bwn, "±alpha", ("per_filter",)),
        "binary-connect": FewBits(_binary_connect, "±1", ("stochastic",)),
        "dorefa": FewBits(partial(_widths, "dorefa"), "2^bits in [-1, 1]", ("bits",), (1, 8)),
        "lsq": FewBits(_lsq, "multiples of a trained step", ("bits",), (2, 8)),
        "lab": FewBits(_lab, "±alpha, loss-aware", ("beta", "clip"), second_moment=True),
        "lat": FewBits(
            _lat,
            "0, ±alpha, loss-aware",
            ("scales", "exact", "beta", "clip"),
            second_moment=True,
        ),
        "laq": FewBits(
            _laq,
            "2^bits - 1, loss-aware",
            ("bits", "levels", "scales", "beta", "clip"),
            (2, 8),
            second_moment=True,
        ),
        "fixed": FewBits(_fixed, "a power-of-two grid", ("bits",), (2, 16)),
        "uniform": FewBits(partial(_widths, "uniform"), "a plain grid", ("bits",), (2, 8)),
    },
)
