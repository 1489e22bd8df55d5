"""The ranks that a layer may have, with the energy kept and the cost of each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import nest
from gossamer.core.errors import ArgumentError
from gossamer.core.modes import device_of, evaluating
from gossamer.core.timing import best_of, one_thread
from gossamer.structure.factors import build, macs, parameters, spectrum
from gossamer.structure.low_rank import Pairs, energies
from gossamer.structure.responses import Layer

__all__ = ["Levels", "costs", "levels", "milliseconds", "whole_milliseconds"]

_MEASURED = 8  # ranks of a layer that are timed; between them time is taken for linear
_ROUNDS = 20


@dataclass(frozen=True)
class Levels:
    """What a layer may become, the lowest rank first.

    Attributes:
        form: of :data:`gossamer.structure.factors.FORMS`.
        ranks: as the form takes them, by level; the last (of Tucker-2 the first) number is that
            of components of the outputs.
        energies: part kept, in [0, 1].
    """

    form: str
    ranks: Sequence[tuple[int, ...]]
    energies: Sequence[float]


def levels(
    layer: Layer, pairs: Pairs, form: str, *, weights: bool = False, multiple: int = 1
) -> Levels:
    """The levels of a layer; none where no rank is a ``multiple``, of which kernels like 8 or 16.

    The energy is that of principal components of the responses; of ``weights``, of the kernel's
    singular values. Forms of two ranks take the least second rank that keeps as large a part of
    its own spectrum (the separable one, or that of the input channels), and the product of both
    counts. CP has no spectrum: what counts for it is the smaller of both sides' at its rank, which
    no CP of that rank exceeds.
    """
    d = len(layer.module.weight)
    if weights or form in ("tucker", "cp"):
        main = _kept(spectrum(layer.module, "outputs"))
    else:
        main = _kept(energies(pairs))
    if form == "cp":
        other = _kept(spectrum(layer.module, "inputs"))
        most = min(d * 2, layer.module.weight.numel() // max(layer.module.weight.shape))
        kept = [
            min(main[min(i, len(main) - 1)], other[min(i, len(other) - 1)]) for i in range(most)
        ]
        at = range(multiple - 1, most, multiple)
        return Levels(form, [(i + 1,) for i in at], [kept[i] for i in at])
    main = [*main, *[1.0] * (d - len(main))] if form == "tucker" else main
    at = range(multiple - 1, len(main), multiple)
    if form == "channel":
        return Levels(form, [(i + 1,) for i in at], [main[i] for i in at])
    second = _kept(spectrum(layer.module, "inputs" if form == "tucker" else "spatial"))
    least = [next((j for j, e in enumerate(second) if e >= main[i]), len(second) - 1) for i in at]
    # up to a multiple, where there is one
    least = [min(-(-(j + 1) // multiple) * multiple, len(second)) - 1 for j in least]
    kept = [main[i] * second[j] for i, j in zip(at, least, strict=True)]
    if form == "tucker":
        return Levels(form, [(i + 1, j + 1) for i, j in zip(at, least, strict=True)], kept)
    return Levels(form, [(j + 1, i + 1) for i, j in zip(at, least, strict=True)], kept)


def _kept(values: Tensor) -> list[float]:
    """Part of the sum up to each; the last is all of it, whatever rounding says of the others."""
    total = float(values.sum())
    if total <= 0:
        return [1.0] * len(values)
    part = (values.cumsum(0) / total).clamp(max=1.0).tolist()
    return [*part[:-1], 1.0]


def costs(
    layer: Layer,
    found: Levels,
    budget: str,
    clock: Callable[[Layer, Levels], tuple[list[float], float]] | None = None,
) -> tuple[list[float], float]:
    """Of each level, and of the layer as it is.

    Args:
        budget: ``flops`` (multiply-adds of one example), ``bytes`` (of the parameters as they
            lie in memory), or ``latency``, which ``clock`` measures (:func:`milliseconds`).

    Raises :class:`ArgumentError` for another budget.
    """
    this, where = layer.module, layer.geometry
    if budget == "latency":
        return (clock or milliseconds)(layer, found)
    if budget == "bytes":
        size = this.weight.element_size()
        # with the bias that a fit gives where the layer has none
        each = [size * parameters(this, found.form, r, bias=True) for r in found.ranks]
        return [float(v) for v in each], float(size * sum(p.numel() for p in this.parameters()))
    if budget != "flops":
        raise ArgumentError(f"budget {budget!r} is not one of flops, bytes, latency")
    each = [macs(this, found.form, r, where.before, where.after) for r in found.ranks]
    whole = macs(this, None, (), where.before, where.after)
    return [float(where.calls * v) for v in each], float(where.calls * whole)


def whole_milliseconds(model: nn.Module, example: Any) -> float:
    """A network's, measured as :func:`milliseconds` measures layers; ``example``: one of them."""
    with torch.inference_mode(), one_thread(), evaluating(model):
        (least,) = best_of([lambda: nest.feed(model, example)], _ROUNDS, device=device_of(model))
    return 1e3 * least


def milliseconds(layer: Layer, found: Levels) -> tuple[list[float], float]:
    """Measured, batch 1 on one thread in torch: some levels, and what lies between them.

    The least of several interleaved runs each.
    """
    top = len(found.ranks) - 1
    at = sorted({round(i * top / (_MEASURED - 1)) for i in range(_MEASURED)})
    at = at if found.ranks else []
    this: Any = layer.module
    x = torch.randn(1, *layer.geometry.shape, generator=torch.Generator().manual_seed(0))
    x = x.to(this.weight)
    modules: list[nn.Module] = [copy.deepcopy(this)]
    for level in at:
        made = build(this, found.form, found.ranks[level], bias=this.bias is not None)
        modules.append(made)
    with torch.inference_mode(), one_thread():
        runs = [lambda m=m: m(x) for m in modules]
        best_of(runs, 2)
        whole, *some = best_of(runs, _ROUNDS, device=this.weight.device)
    each = [_between(level, at, some) for level in range(top + 1)]
    calls = 1e3 * layer.geometry.calls
    return [calls * v for v in each], calls * whole


def _between(level: int, at: Sequence[int], values: Sequence[float]) -> float:
    for (a, x), (b, y) in zip(
        zip(at, values, strict=True), list(zip(at, values, strict=True))[1:], strict=False
    ):
        if a <= level <= b:
            return x + (y - x) * (level - a) / (b - a)
    return values[0]
