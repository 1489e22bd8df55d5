"""Fixed-point networks: the simulated pass over codes.

Qiu et al., FPGA 2016, section 5 (see :mod:`gossamer.quantize.fixed_point` for the numbers and
:mod:`gossamer.quantize.calibration` for how the formats are found).

Within a layer everything is exact: products add up at length f_in + f_w, the bias is aligned to
it by a shift to the left (its own length is capped there), a ReLU follows, and one rounding takes
the sum to the layer's format. A residual add aligns its terms to the longer of their two lengths;
an average is an exact sum, one division and one rounding. Pooling by the largest, reshaping,
slicing and zero padding keep their input's format.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.core.names import Tensors
from gossamer.quantize.fixed_point import Format, to_codes
from gossamer.quantize.steps import ARITHMETIC, Program, Step, wide

__all__ = ["FixedPoint", "Layer", "rounded", "schedule"]


class Layer(nn.Module):
    """Codes of one layer: ``weight`` (int16) and ``bias`` (int16, or None), with their formats."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, form: Format, bias: Tensor | None, bias_form: Format):
        super().__init__()
        self.form, self.bias_form = form, bias_form
        self.register_buffer("weight", to_codes(weight, form).to(torch.int16))
        self.register_buffer(
            "bias", None if bias is None else to_codes(bias, bias_form).to(torch.int16)
        )

    def values(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, float64."""
        bias = None if self.bias is None else self.bias.double() * self.bias_form.step
        return self.weight.double() * self.form.step, bias

    def get_extra_state(self) -> list[int]:
        """The formats, for ``state_dict``."""
        return [self.form.bits, self.form.frac, self.bias_form.bits, self.bias_form.frac]

    def set_extra_state(self, state: list[int]) -> None:
        """The formats, from ``load_state_dict``."""
        self.form, self.bias_form = Format(*state[:2]), Format(*state[2:])


class FixedPoint(nn.Module):
    """A fixed-point network, simulated: float64 values on the grids, rounded after every step.

    Made by :func:`gossamer.quantize.calibration.calibrate`.
    :func:`gossamer.quantize.integer.IntegerNetwork` computes the same on integers alone.

    Attributes:
        program: the steps.
        layers: codes of weights and biases, in order of ``program.weights``.
        formats: step name -> format of its result.
        shapes: step name -> shape of its result without the batch.
    """

    def __init__(
        self,
        program: Program,
        layers: dict[str, Layer],
        formats: dict[str, Format],
        shapes: dict[str, tuple[int, ...]],
    ) -> None:
        super().__init__()
        self.program = program
        self.layers = nn.ModuleList(layers.values())
        self.formats, self.shapes = formats, shapes
        self._index = {name: i for i, name in enumerate(layers)}

    def layer(self, name: str) -> Layer | None:
        """The codes of a step; None for a step without weights."""
        found = self.layers[self._index[name]] if name in self._index else None
        assert found is None or isinstance(found, Layer)  # what __init__ was given
        return found

    def get_extra_state(self) -> dict[str, list[int]]:
        """Formats of the steps, for ``state_dict``."""
        return {name: [f.bits, f.frac] for name, f in self.formats.items()}

    def set_extra_state(self, state: dict[str, list[int]]) -> None:
        """Formats of the steps, from ``load_state_dict``; the steps must be the same."""
        if set(state) != set(self.formats):
            raise ArgumentError("the state is of another network: its steps differ")
        self.formats = {name: Format(*pair) for name, pair in state.items()}

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) float -> the network's output, on its grid; float32 holds it exactly."""
        held: dict[str, Tensor] = {}
        for step, last in schedule(self.program):
            inputs = [held[n] for n in step.inputs]
            held[step.name] = self.apply_step(step, inputs or [x])
            for name in last:
                del held[name]
        return held[self.program.output].float()

    @torch.no_grad()
    def measure(self, shape: tuple[int, ...]) -> None:
        """Fill in ``shapes``, by a pass over one input of this shape (without the batch).

        Only shapes are followed (torch's meta device), so that it takes no memory, whatever the
        shape. Raises :class:`ArgumentError` when the network does not take it.
        """
        held: dict[str, Tensor] = {}
        try:
            for step in self.program.steps:
                given = [held[n] for n in step.inputs] or [torch.empty(1, *shape, device="meta")]
                held[step.name] = self.apply_step(step, given)
        except (RuntimeError, TypeError, ValueError, IndexError) as e:
            reason = str(e).splitlines()[0][:200]
            raise ArgumentError(
                f"the network does not take an input of shape {str(shape)[:200]}: {reason}"
            ) from e
        self.shapes = {name: tuple(x.shape[1:]) for name, x in held.items()}

    def apply_step(self, step: Step, inputs: list[Tensor]) -> Tensor:
        """One step on quantised inputs, float64."""
        form = self.formats[step.name]
        if step.kind == "input":
            return rounded(inputs[0], form)
        layer = self.layer(step.name)
        weight, bias = (None, None) if layer is None else layer.values()
        if inputs[0].is_meta:
            weight, bias = (None if v is None else v.to("meta") for v in (weight, bias))
        out = wide(step, inputs, weight, bias)
        return rounded(out, form) if step.kind in ARITHMETIC else out

    def values(self) -> Tensors:
        """Weights and biases on their grids by the model's own names, float32: what a file packs.

        They load into the folded float network, ``load_state_dict(..., strict=False)``.
        """
        found: Tensors = {}
        for step, module in self.program.layers.items():
            layer = self.layer(step)
            assert layer is not None  # every name in program.layers has one
            weight, bias = layer.values()
            found[f"{module}.weight"] = weight.float()
            if bias is not None:
                found[f"{module}.bias"] = bias.float()
        return found


def rounded(x: Tensor, form: Format) -> Tensor:
    """The nearest values of a format, float64."""
    return to_codes(x, form) * form.step


def schedule(program: Program) -> list[tuple[Step, list[str]]]:
    """Steps, each with the names that nothing reads after it."""
    last = {name: step.name for step in program.steps for name in step.inputs}
    unread = [s.name for s in program.steps if s.name not in last]
    done: dict[str, list[str]] = {}
    for name, reader in last.items():
        done.setdefault(reader, []).append(name)
    for name in unread:
        done.setdefault(name, []).append(name)
    return [(s, [n for n in done.get(s.name, []) if n != program.output]) for s in program.steps]
