"""Formats of a fixed-point network, found from weights and calibration data.

Qiu et al., FPGA 2016, section 5 (see :mod:`gossamer.quantize.network` for the pass):

- weight phase: each layer's weights, then its bias, get the fractional length of least error;
- data phase, layer by layer in order: a layer is computed from inputs and weights that are
  quantised already, and its output gets the fractional length of least sum |x_float - x(bw, f_l)|;
- dynamic: each layer's weights, bias and output, and the input, have lengths of their own; static:
  one length for all weights and biases, one for the input and all outputs: from the largest
  without overflow to neighbours, one step in either or both, while sum |x_float - x| of the
  network's output falls (the paper does not say; the summed error of all layers saturates the few
  large biases for the many small weights, and leaves nothing of a ResNet).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.graph import check_same
from gossamer.quantize.fixed_point import (
    Format,
    check_bits,
    check_finite,
    no_overflow,
    search_pairs,
)
from gossamer.quantize.network import FixedPoint, Layer, rounded, schedule
from gossamer.quantize.steps import ARITHMETIC, Floats, Program, Step, read, sums, wide

__all__ = ["Precision", "calibrate"]

_NEAR = (0, 1, -1)
_COMPARED = 64  # examples on which the steps are compared with the model
_EXACT = 1 << 53  # integers up to here are exact in float64


@dataclass(frozen=True)
class Precision:
    """Bits of weights, of biases and of data (2 to 16), and whether lengths differ by layer.

    Raises :class:`ArgumentError` for bits outside 2 to 16.
    """

    weights: int
    biases: int
    data: int
    dynamic: bool

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for name in ("weights", "biases", "data"):
            check_bits(getattr(self, name), name)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    precision: Precision,
    *,
    weight_bits: Mapping[str, int] | None = None,
) -> FixedPoint:
    """The fixed-point network of a float one, which stays as it is.

    Args:
        model: without batch-norm (:func:`gossamer.fold_batchnorm` folds it); one input.
        batches: calibration data, inputs ``(N, ...)`` or tuples that start with them; all of it
            is held in memory. Take training images: the test set must not choose formats.
        precision: the bits, dynamic or static.
        weight_bits: layer pattern (:func:`gossamer.core.names.select`) -> bits of those weights in
            place of ``precision.weights``; the paper's 4 bits in fully-connected layers.

    Raises :class:`ArgumentError` for an operation without a rule (named), one in place on what
    others read, steps that differ from the model on the first batch, bits out of range, no data,
    NaN or infinity in data, weights or activations, and sums that may pass 2^53, where
    float64 stops being exact.
    """
    program = read(model)
    bits = dict.fromkeys(program.weights, precision.weights)
    for pattern, value in (weight_bits or {}).items():
        check_bits(value, f"weight_bits[{pattern!r}]")
        for name in names.select(bits, pattern):
            bits[name] = value
    data = [b[0] if isinstance(b, (tuple, list)) and b else b for b in batches]
    for number, batch in enumerate(data):
        if not isinstance(batch, Tensor):
            raise ArgumentError(
                f"calibration batch {number} is {type(batch).__name__}; give a tensor (N, ...), or "
                "a tuple that starts with one"
            )
        check_finite(batch, f"calibration batch {number}")
    if not any(len(b) for b in data):
        raise ArgumentError("batches is empty; give training images to calibrate on")
    for name, pair in program.weights.items():
        for tensor, what in zip(pair, ("weight", "bias"), strict=True):
            if tensor is not None:
                check_finite(tensor, f"{name}.{what}")
    first = next(b for b in data if len(b))[:_COMPARED]
    like = next(model.parameters(), first)
    if first.dtype != like.dtype:
        raise ArgumentError(
            f"calibration batches are {first.dtype}, the network is {like.dtype}; give "
            f"batch.to({like.dtype})"
        )
    first = first.to(like.device)
    check_same(model, Floats(program), first, "the network as steps")
    with torch.no_grad():
        return _Calibration(program, [b.cpu() for b in data], precision, bits).run()


class _Calibration:
    """The walk: float and quantised values side by side, of all batches."""

    def __init__(
        self, program: Program, data: list[Tensor], precision: Precision, bits: dict[str, int]
    ) -> None:
        self.program, self.data, self.precision, self.bits = program, data, precision, bits
        self.weights = {
            name: (w.cpu(), None if b is None else b.cpu())
            for name, (w, b) in program.weights.items()
        }
        self.net = FixedPoint(program, {}, {}, {})
        self.layers: dict[str, Layer] = {}

    def run(self) -> FixedPoint:
        """The dynamic walk, or the best static lengths."""
        return self._walk(None) if self.precision.dynamic else self._static()

    def _walk(self, lengths: tuple[int, int] | None) -> FixedPoint:
        """Both phases; with lengths given, of weights and of data, nothing is searched."""
        self.net, self.layers = FixedPoint(self.program, {}, {}, {}), {}
        true: dict[str, list[Tensor]] = {}
        fixed: dict[str, list[Tensor]] = {}
        formats, shapes = self.net.formats, self.net.shapes
        for step, last in schedule(self.program):
            if step.name in self.weights:
                self._weigh(step, None if lengths is None else lengths[0])
            if step.kind == "input":
                raw = self.data
            else:
                layer = self.layers.get(step.name)
                values = (None, None) if layer is None else layer.values()
                raw = [
                    wide(step, list(inputs), *values)
                    for inputs in zip(*(fixed[n] for n in step.inputs), strict=True)
                ]
            if lengths is None:
                true[step.name] = self._floats(step, true)
            if step.kind == "input" or step.kind in ARITHMETIC:
                if lengths is None:
                    pairs = list(zip(raw, true[step.name], strict=True))
                    frac = search_pairs(pairs, self.precision.data)
                else:
                    frac = lengths[1]
                formats[step.name] = Format(self.precision.data, frac)
                raw = [rounded(x, formats[step.name]) for x in raw]
            else:
                formats[step.name] = formats[step.inputs[0]]
            fixed[step.name] = raw
            shapes[step.name] = tuple(raw[0].shape[1:])
            if raw[0].shape[0] != self.data[0].shape[0]:
                raise ArgumentError(f"{step.name} mixes the examples of a batch; no rule")
            self._check_sums(step)
            for name in last:
                true.pop(name, None)
                del fixed[name]
        self.off = 0.0 if lengths is None else self._off(fixed[self.program.output])
        return FixedPoint(self.program, self.layers, formats, shapes)

    def _static(self) -> FixedPoint:
        """From the lengths without overflow to neighbours, while the output's error falls."""
        self.exact, data = self._float_pass()
        every = [t for pair in self.weights.values() for t in pair if t is not None and t.numel()]
        low = min((float(t.min()) for t in every), default=0.0)
        high = max((float(t.max()) for t in every), default=0.0)
        here = (
            no_overflow(low, high, self.precision.weights),
            no_overflow(*data, self.precision.data),
        )
        tried: dict[tuple[int, int], float] = {}
        while True:
            around = [here, *((here[0] + i, here[1] + j) for i in _NEAR for j in _NEAR)]
            for lengths in around:
                if lengths not in tried:
                    self._walk(lengths)
                    tried[lengths] = self.off
            best = min(around, key=lambda lengths: tried[lengths])  # of equal ones, stay
            if best == here:
                return self._walk(here)
            here = best

    def _float_pass(self) -> tuple[list[Tensor], tuple[float, float]]:
        """The float network's outputs, and the extremes of all that gets a data format."""
        true: dict[str, list[Tensor]] = {}
        low = high = 0.0
        for step, last in schedule(self.program):
            true[step.name] = self._floats(step, true)
            if step.kind == "input" or step.kind in ARITHMETIC:
                low = min(low, *(float(t.min()) for t in true[step.name]))
                high = max(high, *(float(t.max()) for t in true[step.name]))
            for name in last:
                del true[name]
        return true[self.program.output], (low, high)

    def _off(self, outputs: list[Tensor]) -> float:
        return sum(float((a - b).abs().sum()) for a, b in zip(outputs, self.exact, strict=True))

    def _floats(self, step: Step, true: dict[str, list[Tensor]]) -> list[Tensor]:
        if step.kind == "input":
            return self.data
        weight, bias = self.weights.get(step.name, (None, None))
        found = [
            wide(step, list(inputs), weight, bias)
            for inputs in zip(*(true[n] for n in step.inputs), strict=True)
        ]
        for out in found:
            check_finite(out, f"the output of {step.name}")
        return found

    def _weigh(self, step: Step, one: int | None) -> None:
        weight, bias = self.weights[step.name]
        frac = search_pairs([(weight, weight)], self.bits[step.name]) if one is None else one
        form = Format(self.bits[step.name], frac)
        own = 0
        if bias is not None:
            own = search_pairs([(bias, bias)], self.precision.biases) if one is None else one
        # Aligned to the sums by a shift to the left, so no finer than they are.
        own = min(own, frac + self.net.formats[step.inputs[0]].frac)
        layer = Layer(weight, form, bias, Format(self.precision.biases, own))
        self.layers[step.name] = layer

    def _check_sums(self, step: Step) -> None:
        """Refuse sums beyond what float64 holds exactly."""
        forms = [self.net.formats[n] for n in step.inputs]
        low = [-f.low for f in forms]
        if step.name in self.layers:
            layer = self.layers[step.name]
            most = float(layer.weight.double().abs().flatten(1).sum(1).max()) * low[0]
            if layer.bias is not None:
                shift = layer.form.frac + forms[0].frac - layer.bias_form.frac
                most += float(layer.bias.double().abs().max()) * 2.0**shift
        elif step.kind == "add":
            finest = max(f.frac for f in forms)
            most = sum(n * 2.0 ** (finest - f.frac) for n, f in zip(low, forms, strict=True))
        elif step.kind == "average":
            shape = (1, *self.net.shapes[step.inputs[0]])
            count = float(sums(step, torch.zeros(shape))[1].max())
            # the quotient is rounded as if exact while sum and divisor, aligned, stay below 2^51
            shift = self.net.formats[step.name].frac - forms[0].frac
            most = max(4 * count * low[0] * 2.0 ** max(shift, 0), 4 * count * 2.0 ** max(-shift, 0))
        else:
            return
        if most >= _EXACT:
            raise ArgumentError(
                f"{step.name}: sums may reach {most:.3g}, exact only below 2^53; its lengths are "
                f"far apart ({', '.join(str(f.frac) for f in forms)} in): use fewer bits, or "
                "rescale the layer"
            )
