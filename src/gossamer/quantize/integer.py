"""Fixed-point networks on integers alone: the same results as the simulated pass, bit for bit.

Qiu et al., FPGA 2016, sections 5 and 6: after the input's conversion every value is an integer
code. A layer sums integer products, adds its bias shifted to the left by f_in + f_w - f_bias, and
shifts the sum to the right by f_in + f_w - f_out, rounding ties to even; shorter by a negative
amount is a shift to the left. Values beyond the format saturate. Terms of a residual add are
shifted to the longer of their lengths. An average is an integer sum, divided by an integer with
the remainder deciding the rounding.

The sums of products run through float64 convolutions: codes and their products are integers, and
:func:`~gossamer.quantize.calibration.calibrate` has bounded every partial sum below 2^53, where
float64 addition and multiplication of integers are exact in any order. So this is integer
arithmetic on the floating-point unit, tens of times faster than int64 convolution. With
``oracle=True`` int64 multiplications and additions do it instead; they give the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.quantize.fixed_point import Format, to_codes
from gossamer.quantize.network import FixedPoint, Layer, schedule
from gossamer.quantize.steps import Step, choose, sums

__all__ = ["IntegerNetwork", "divide_round", "shift_round"]


def shift_round(codes: Tensor, shift: int) -> Tensor:
    """int64 codes times ``2^-shift``, rounded to nearest, ties to even.

    >>> shift_round(torch.tensor([1, 3, 5, -1, -3, 7]), 1).tolist()
    [0, 2, 2, 0, -2, 4]

    A negative shift moves to the left; beyond 40 places or 2^22 in size, where any result of 16
    bits has saturated, more changes nothing.
    """
    if shift <= 0:
        return codes.clamp(-(1 << 22), 1 << 22) << min(-shift, 40)
    shift = min(shift, 62)  # codes stay below 2^53: all of them are zero by then
    down = codes >> shift  # floor
    rest = codes - (down << shift)
    half = 1 << (shift - 1)
    return down + ((rest > half) | ((rest == half) & (down & 1 == 1))).long()


def divide_round(codes: Tensor, count: Tensor, shift: int) -> Tensor:
    """int64 codes times ``2^-shift`` over counts, rounded to nearest, ties to even.

    >>> divide_round(torch.tensor([3, 5, -3, 7]), torch.tensor(2), 0).tolist()
    [2, 2, -2, 4]
    """
    over = codes << max(-shift, 0)
    under = count << max(shift, 0)
    down = torch.div(over, under, rounding_mode="floor")
    twice = 2 * (over - down * under)
    return down + ((twice > under) | ((twice == under) & (down & 1 == 1))).long()


class IntegerNetwork(nn.Module):
    """A fixed-point network on integers.

    Args:
        net: from :func:`~gossamer.quantize.calibration.calibrate`.
        oracle: multiply and add in int64; slow, for tests.
    """

    def __init__(self, net: FixedPoint, *, oracle: bool = False) -> None:
        super().__init__()
        self.net, self.oracle = net, oracle

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) float -> what the simulated network gives, float32: the one conversion back."""
        form = self.net.formats[self.net.program.output]
        return (self.codes(self.encode(x)).double() * form.step).float()

    def encode(self, x: Tensor) -> Tensor:
        """Codes of an input, int64: the one conversion from float."""
        return to_codes(x, self.net.formats[self.net.program.steps[0].name]).long()

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Input codes -> output codes, int64, in the format of the last step.

        Raises :class:`ArgumentError` for codes of another dtype or outside the input's format.
        """
        first = self.net.formats[self.net.program.steps[0].name]
        if x.dtype != torch.int64:
            raise ArgumentError(f"codes are {x.dtype}; encode() gives the int64 they must be")
        if x.numel() and not first.low <= int(x.min()) <= int(x.max()) <= first.high:
            raise ArgumentError(f"codes leave {first.low} to {first.high}; use encode()")
        held: dict[str, Tensor] = {}
        for step, last in schedule(self.net.program):
            inputs = [held[n] for n in step.inputs]
            held[step.name] = x if step.kind == "input" else self._step(step, inputs)
            for name in last:
                del held[name]
        return held[self.net.program.output]

    def _step(self, step: Step, inputs: list[Tensor]) -> Tensor:
        forms = [self.net.formats[n] for n in step.inputs]
        form = self.net.formats[step.name]
        layer = self.net.layer(step.name)
        if layer is not None:
            shift = forms[0].frac + layer.form.frac
            out = shift_round(self._layer(step, layer, inputs[0], forms[0]), shift - form.frac)
        elif step.kind == "add":
            finest = max(f.frac for f in forms)
            total = sum(x << (finest - f.frac) for x, f in zip(inputs, forms, strict=True))
            assert isinstance(total, Tensor)  # an add has two inputs
            out = shift_round(total, finest - form.frac)
        elif step.kind == "average":
            total, count = sums(step, inputs[0].double())  # whole numbers below 2^53
            out = divide_round(total.long(), count.long(), forms[0].frac - form.frac)
        elif step.kind == "cat":
            parts = zip(inputs, forms, strict=True)
            out = torch.cat(
                [shift_round(x, f.frac - form.frac) for x, f in parts], step.settings["dim"]
            )
        elif step.kind in ("max_pool", "adaptive_max"):
            # comparing integers is exact in float64; torch has no such kernel for int64
            return choose(step, inputs[0].double()).long()
        else:
            return choose(step, inputs[0])
        # rounding and saturating keep the sign, so the ReLU may come after them
        return out.clamp(0 if step.relu else form.low, form.high)

    def _layer(self, step: Step, layer: Layer, x: Tensor, form: Format) -> Tensor:
        """Sums at length f_in + f_w, bias included."""
        if self.oracle:
            total = _products(step, x, layer.weight.long())
        elif step.kind == "conv":
            total = F.conv2d(x.double(), layer.weight.double(), **step.settings).long()
        else:
            total = F.linear(x.double(), layer.weight.double()).long()
        if layer.bias is None:
            return total
        bias = layer.bias.long() << (form.frac + layer.form.frac - layer.bias_form.frac)
        return total + (bias.view(-1, 1, 1) if step.kind == "conv" else bias)


def _products(step: Step, x: Tensor, weight: Tensor) -> Tensor:
    """Convolution or linear layer by int64 multiplication and addition, one tap at a time."""
    if step.kind == "linear":
        return (x.unsqueeze(-2) * weight).sum(-1)
    s = step.settings
    (ph, pw), (sh, sw), (dh, dw) = s["padding"], s["stride"], s["dilation"]
    x = F.pad(x, (pw, pw, ph, ph))
    out, per, kh, kw = weight.shape
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    grouped = x.view(x.shape[0], s["groups"], 1, per, *x.shape[2:])
    taps = weight.view(1, s["groups"], out // s["groups"], per, kh, kw)
    total = torch.zeros(x.shape[0], out, height, width, dtype=torch.int64)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dh, i * dh + (height - 1) * sh + 1, sh)
            columns = slice(j * dw, j * dw + (width - 1) * sw + 1, sw)
            part = (grouped[..., rows, columns] * taps[..., i, j, None, None]).sum(3)
            total += part.view(total.shape)
    return total
