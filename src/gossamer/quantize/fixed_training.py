"""Training in fixed point: weights and activations on power-of-two grids, straight through.

Qiu et al., FPGA 2016, quantize a trained network and report retraining in one sentence of
section 5; this is that retraining. Forward, weights and activations are what
:mod:`gossamer.quantize.fixed_point` makes of them: ``code * 2^-f`` in two's complement of a number
of bits, each layer with a length f of its own. Backward is straight-through: a weight gets its
quantized value's gradient, an activation its gradient where it lies in the range.

Batch-norm stays as it is and is folded afterwards, when
:func:`gossamer.quantize.calibration.calibrate` chooses the formats of the network that is deployed:
folded weights are other numbers, and what training under noise of this size buys is that they may
be rounded. Sums before a ReLU are not rounded here, only what the next layer multiplies.

Two parts, to be used together or alone::

    model = fixed_activations_(model, 8, calibration)      # before the optimizer is made
    method = FixedWeights(8, every=None).attach(model, optimizer)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.core.latent import Computed, Latent
from gossamer.core.quantizer import Quantizer, Straight
from gossamer.quantize import capture
from gossamer.quantize.fixed_point import MOST_BITS, Format, check_bits, quantize, search

__all__ = ["FixedReLU", "FixedWeights", "fixed_activations_", "fixed_relu"]

_SAMPLE = 1 << 16  # values a layer that decide its length
_HELD = {torch.bfloat16: 9, torch.float16: 12}  # bits of a code whose size is a whole number there


class _FixedReLU(torch.autograd.Function):
    """Round and saturate forward; the clipped ReLU's derivative back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float, top: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.most = step * top
        # exact, as fixed_point.to_codes is in double precision: powers of two scale exactly
        return (x * (1 / step)).round_().clamp_(0, top).mul_(step)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        # one pass: the gradient where 0 < x < most
        return torch.ops.aten.hardtanh_backward(grad, x, 0.0, ctx.most), None, None


def fixed_relu(x: Tensor, form: Format) -> Tensor:
    """The fixed-point number nearest to ``max(x, 0)``; its gradient where ``0 < x`` fits.

    Args:
        x: any shape; float32 or float64, of few bits float16 and bfloat16 too.
        form: bits and fractional length.

    >>> x = torch.tensor([-1.0, 0.3, 5.0], requires_grad=True)
    >>> y = fixed_relu(x, Format(4, 2))
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.0, 0.25, 1.75], [0.0, 1.0, 0.0])

    Raises :class:`ArgumentError` for a dtype that does not hold the codes: bfloat16 beyond 9
    bits, float16 beyond 12.
    """
    most = _HELD.get(x.dtype, MOST_BITS)
    if form.bits > most:
        raise ArgumentError(
            f"{x.dtype} holds fixed-point activations of at most {most} bits, not of {form.bits}; "
            "run the network in float32"
        )
    result: Tensor = _FixedReLU.apply(x, form.step, form.high)
    return result


class FixedReLU(nn.Module):
    """:func:`fixed_relu` in place of ``nn.ReLU``.

    Args:
        bits: of an activation, 2 to 16.
        frac: fractional length; a buffer, it travels with ``state_dict``.

    Raises :class:`ArgumentError` for bits outside 2 to 16.
    """

    frac: Tensor

    def __init__(self, bits: int, frac: int) -> None:
        super().__init__()
        check_bits(bits, "bits")
        self.bits = bits
        self.register_buffer("frac", torch.tensor(frac, dtype=torch.int32))

    @property
    def form(self) -> Format:
        """Bits and fractional length."""
        return Format(self.bits, int(self.frac))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept."""
        return fixed_relu(x, self.form)

    def extra_repr(self) -> str:
        """Bits and length."""
        return f"bits={self.bits}, frac={int(self.frac)}"


def fixed_activations_(
    model: nn.Module,
    bits: int,
    calibration: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    functional: bool = True,
) -> nn.Module:
    """Put :class:`FixedReLU` in the place of ReLUs; make the optimizer after it.

    Args:
        bits: 2 to 16.
        calibration: batches of training data; a layer's length is the one of least error
            (:func:`gossamer.quantize.fixed_point.search`) on at most 65,536 of its values.
        forward, include, exclude, functional: as for
            :func:`gossamer.quantize.activations.quantize_activations_`, which returns the same.

    Raises :class:`ArgumentError` as there, before anything is changed.
    """
    check_bits(bits, "bits")
    target, found = capture.activations(model, functional, include, exclude)
    batches = capture.checked(model, target, calibration, forward)
    inputs = capture.inputs(target, found, batches, forward, _SAMPLE)
    lengths = {}
    for name, values in inputs.items():
        try:
            lengths[name] = search(values.detach().cpu().clamp(min=0), bits)
        except ArgumentError as e:
            raise ArgumentError(f"inputs of activation {name!r}: {e}") from e
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, places in found.items():
        made = FixedReLU(bits, lengths[name]).to(device)
        made.train(target.training)
        for owner, attribute in places:
            setattr(owner, attribute, made)
    return target


class FixedWeights(Quantizer):
    """Train weights in fixed point, a fractional length a layer.

    Args:
        bits: of a weight, 2 to 16.
        every: optimizer steps between two searches of the lengths; None: those found on attach
            stay, and a weight that outgrows them saturates.
        include, exclude, ends: what is quantized (:func:`gossamer.core.quantizer.chosen`); unlike
            the methods of few bits, the paper has both ends in fixed point too.

    Raises :class:`ArgumentError` as :class:`gossamer.core.quantizer.Quantizer` does, and for
    arguments out of range.
    """

    def __init__(
        self,
        bits: int,
        *,
        every: int | None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        ends: bool = True,
    ) -> None:
        super().__init__(clip=None, include=include, exclude=exclude, ends=ends)
        check_bits(bits, "bits")
        if every is not None and every < 1:
            raise ArgumentError(f"every={every} must be at least 1, or None to keep the lengths")
        self.bits, self.every = bits, every
        self.lengths: dict[str, int] = {}
        self._steps = 0

    def _module(self, name: str, weight: Tensor) -> Computed:
        self.lengths[name] = search(weight, self.bits)
        return Straight(weight, quantize(weight, self.bits, self.lengths[name]), None)

    def _update(self, name: str, held: Latent) -> None:
        weight = held.parameter.detach()
        if self.every is not None and self._steps % self.every == 0:
            self.lengths[name] = search(weight, self.bits)
        held.module.take(quantize(weight, self.bits, self.lengths[name]), None)

    def after_step(self) -> None:
        """Quantize the weights that the step has moved, every so often with lengths anew."""
        self._steps += 1
        super().after_step()

    def _state(self) -> dict[str, Any]:
        """Steps and lengths; weights and values are in the model's ``state_dict``."""
        return {"steps": self._steps, "lengths": dict(self.lengths)}

    def _load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`_state` returned."""
        self._steps, self.lengths = int(state["steps"]), dict(state["lengths"])
