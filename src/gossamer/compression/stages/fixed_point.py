"""The whole network in fixed point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.compression.layers import check_setting, chosen, per_layer
from gossamer.compression.measure import integer_figures
from gossamer.compression.parts import examples
from gossamer.compression.records import OnGrid
from gossamer.compression.settings import ByLayer, Width
from gossamer.compression.stage import Stage
from gossamer.compression.state import State
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.quantize import Precision, calibrate
from gossamer.quantize.emulated import Emulated
from gossamer.quantize.network import FixedPoint as Network
from gossamer.structure import fold_batchnorm

__all__ = ["FixedPoint"]


_COMPARED = (16, 8, 6, 4)


class FixedPoint(Stage):
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

    only_before: ClassVar[tuple[str, ...] | None] = ("pack", "evaluate")
    otherwise: ClassVar[str] = (
        "{} after fixed_point would leave its grids; move fixed_point to the end, before pack"
    )

    def check(self, model: nn.Module) -> None:
        """Try the patterns of ``bits``."""
        check_setting(model, chosen(model), "bits", self.bits)

    def run(self, state: State) -> None:
        """Weights, biases and data on power-of-two grids, found by calibration."""
        split = getattr(state.data, self.calibrate_on)
        given = examples(split, self.calibration, state.generator(98))
        folded = fold_batchnorm(state.model, state.example())
        biases = self.bias_bits or self.activation_bits
        base = self.activation_bits if isinstance(self.bits, Mapping) else self.bits
        precision = Precision(base, biases, self.activation_bits, self.mode == "dynamic")
        widths = self._widths(state.model)
        net = calibrate(folded, given, precision, weight_bits=widths)
        parameters = names.parameters(folded)
        with torch.no_grad():
            for name, value in net.values().items():
                parameters[name].copy_(value)
        codes = {n: t.clone() for n, t in net.named_buffers()}
        model = Emulated(folded, net)
        for name, value in model.net().named_buffers():
            if not torch.equal(value, codes[name]):
                raise ArgumentError(
                    f"stage {state.name}: a layer that is used in several places needs one format "
                    "for its bias; give bias_bits more bits, or each place its own layer"
                )
        notes: dict[str, Any] = {
            "mode": self.mode,
            "activation_bits": self.activation_bits,
            "float_score": state.judge().score,
            "input_length": net.formats[net.program.steps[0].name].frac,
            "layers": _lengths(net),
        }
        if self.compare:
            notes["compare"] = _compared(state, folded, given)
        state.change(model, _record(net))
        state.masks = Masks({n: parameters[n].detach() != 0 for n in state.masks})
        notes["integer"] = integer_figures(model, state.data.validation)
        state.notes["fixed_point"] = notes

    def _widths(self, model: nn.Module) -> dict[str, int]:
        """Bits of the layers that the recipe names."""
        if not isinstance(self.bits, Mapping):
            return {}
        found: dict[str, int] = per_layer(model, chosen(model), self.bits)
        return {name.removesuffix(".weight"): bits for name, bits in found.items()}


def _lengths(net: Network) -> list[dict[str, Any]]:
    rows = []
    for step in net.program.weights:
        layer = net.layer(step)
        assert layer is not None  # every step of program.weights has one
        rows.append(
            {
                "name": step,
                "bits": layer.form.bits,
                "weight": layer.form.frac,
                "bias": None if layer.bias is None else layer.bias_form.frac,
                "output": net.formats[step].frac,
            }
        )
    return rows


def _record(net: Network) -> OnGrid:
    layers = {}
    for step in net.program.weights:
        layer = net.layer(step)
        assert layer is not None  # every step of program.weights has one
        form, bias = layer.form, layer.bias_form
        layers[step] = (form.bits, form.frac, bias.bits, bias.frac)
    first = net.program.steps[0].name
    return OnGrid(
        bits=net.formats[first].bits,
        data={step.name: net.formats[step.name].frac for step in net.program.steps},
        layers=layers,
        shape=net.shapes[first],
    )


def _compared(state: State, folded: nn.Module, given: list[Tensor]) -> list[dict[str, Any]]:
    """Validation score of both modes at each width, weights, biases and data alike."""
    rows = []
    for i, bits in enumerate(_COMPARED):
        row: dict[str, Any] = {"bits": bits}
        for j, mode in enumerate(("dynamic", "static")):
            net = calibrate(folded, given, Precision(bits, bits, bits, mode == "dynamic"))
            row[mode] = state.judge(net).score
            state.progress.count(f"{state.name} compare", 2 * i + j + 1, 2 * len(_COMPARED))
        rows.append(row)
    return rows
