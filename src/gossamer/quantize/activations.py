"""Quantized activations, trained with straight-through estimators.

Yin, Lyu, Zhang, Osher, Qi, Xin, *Understanding Straight-Through Estimator in Training Activation
Quantized Neural Nets*, ICLR 2019, arXiv 1903.05662, section 4.

- Forward, b bits: sigma(x) = 0 for x <= 0, k alpha for (k-1) alpha < x <= k alpha, and
  (2^b - 1) alpha beyond; ``form="ceil"``. ``form="round"`` takes the nearest level instead.
- Backward: the derivative of sigma is replaced by 1 (identity), 1{x > 0} (relu), or
  1{0 < x < (2^b - 1) alpha} (clipped).
- alpha minimises E(sigma(x) - x)^2 over positive x, for the half-normal distribution
  (:func:`~gossamer.quantize.levels.half_normal_step`) or for data
  (:func:`~gossamer.quantize.levels.best_step`), before training, and stays.
- Each activation is preceded by batch-norm without scale and shift: :func:`normalize_`.

Deviations: the paper runs Lloyd's algorithm for alpha. With the ceil form codes are not nearest
levels, and its alternation neither descends nor ends at the minimum (.41 at 2 bits, where the
minimum is at the published .49), so the squared error is minimised directly. ``learned=True``
(not in the paper) trains alpha by the derivative of alpha k(x / alpha) with k passed straight
through (Esser et al., *Learned Step Size Quantization*, ICLR 2020, equation 3).

There is no method to attach: a quantized network keeps its quantized activations. The modules are
put in once, before the optimizer is made, and any loop trains the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.quantize import capture
from gossamer.quantize.levels import (
    best_step,
    check_distance,
    check_levels,
    codes,
    half_normal_step,
)

__all__ = [
    "ESTIMATORS",
    "QuantizedReLU",
    "normalize_",
    "quantize_activations_",
    "quantized_relu",
]

ESTIMATORS = ("identity", "relu", "clipped")

_SAMPLE = 1 << 16  # values a layer that decide its alpha


class _Quantize(torch.autograd.Function):
    """The level forward; backward the estimator, and for alpha the learned step's derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, bits: int, form: str, estimator: str) -> Tensor:
        k = codes(x, bits, alpha, form=form)
        ctx.estimator, ctx.top = estimator, 2**bits - 1
        wanted = ctx.needs_input_grad
        inside = None
        if wanted[0] and estimator == "relu":
            inside = x > 0
        elif wanted[0] and estimator == "clipped":
            inside = (x > 0) & (x < ctx.top * alpha)
        # the codes hold the level, x the place within it; only a learned alpha needs them
        ctx.save_for_backward(inside, *((x, alpha, k.clone()) if wanted[1] else ()))
        return k.mul_(alpha)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        inside, *rest = ctx.saved_tensors
        below, slope = None, None
        if ctx.needs_input_grad[0]:
            below = grad if inside is None else grad * inside
        if rest:
            x, alpha, k = rest
            within = (x > 0) & (x < ctx.top * alpha)
            change = torch.where(within, k - x / alpha, k)
            slope = (grad * change).sum().reshape(alpha.shape)
        return below, slope, None, None, None


def quantized_relu(
    x: Tensor, bits: int, alpha: float | Tensor, *, estimator: str, form: str
) -> Tensor:
    """sigma(x): exactly ``k * alpha`` in the dtype of x, with a named straight-through derivative.

    Args:
        x: any shape.
        bits: 2 to 8; levels 0 to 2^bits - 1.
        alpha: distance of two levels, in the unit of x; a tensor of one value that requires a
            gradient is trained.
        estimator: "identity", "relu" or "clipped".
        form: "ceil" (the paper's) or "round".

    >>> x = torch.tensor([-1.0, 0.2, 1.0, 7.0], requires_grad=True)
    >>> y = quantized_relu(x, 2, 0.5, estimator="clipped", form="ceil")
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.0, 0.5, 1.0, 1.5], [0.0, 1.0, 1.0, 0.0])

    Raises :class:`ArgumentError` for bits outside 2 to 8, an alpha that is not positive, an
    unknown estimator or form.
    """
    check_levels(bits, form)
    _check_estimator(estimator)
    if not isinstance(alpha, Tensor):
        check_distance(alpha)
    step = torch.as_tensor(alpha, dtype=x.dtype, device=x.device)
    result: Tensor = _Quantize.apply(x, step, bits, form, estimator)
    return result


def _check_estimator(estimator: str) -> None:
    if estimator not in ESTIMATORS:
        raise ArgumentError(f"estimator {estimator!r} is not one of {', '.join(ESTIMATORS)}")


class QuantizedReLU(nn.Module):
    """:func:`quantized_relu` in place of ``nn.ReLU``.

    ``alpha`` is a buffer, or with ``learned=True`` a parameter, of no dimensions; it travels with
    ``state_dict``. A learned alpha is taken by its size, so that a step past 0 does no harm.

    Raises :class:`ArgumentError` as :func:`quantized_relu` does.
    """

    alpha: Tensor

    def __init__(
        self, bits: int, alpha: float, *, estimator: str, form: str, learned: bool = False
    ) -> None:
        super().__init__()
        check_levels(bits, form)
        _check_estimator(estimator)
        check_distance(alpha)
        self.bits, self.estimator, self.form, self.learned = bits, estimator, form, learned
        if learned:
            self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        else:
            self.register_buffer("alpha", torch.tensor(float(alpha)))

    def _alpha(self) -> Tensor:
        return self.alpha.abs() if self.learned else self.alpha

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept."""
        return quantized_relu(x, self.bits, self._alpha(), estimator=self.estimator, form=self.form)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Level numbers as uint8; ``codes * alpha`` is the output."""
        return codes(x, self.bits, self._alpha().to(x.dtype), form=self.form).to(torch.uint8)

    def extra_repr(self) -> str:
        """Settings and the present alpha."""
        kind = "learned " if self.learned else ""
        return (
            f"bits={self.bits}, {kind}alpha={float(self.alpha.detach()):.4g}, "
            f"estimator={self.estimator!r}, form={self.form!r}"
        )


def quantize_activations_(
    model: nn.Module,
    bits: int,
    *,
    estimator: str,
    form: str,
    alpha: float | None = None,
    calibration: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    learned: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    functional: bool = True,
) -> nn.Module:
    """Put :class:`QuantizedReLU` in the place of ReLUs (and ReLU6s); make the optimizer after it.

    Modules are replaced in the model, which is returned. Where its forward calls ``F.relu``,
    ``torch.relu`` or ``.relu()``, the graph is captured by ``torch.fx`` and a ``GraphModule`` over
    the same parameters, under the same names, is returned in its place; the model stays as it was.

    Args:
        bits: 2 to 8.
        estimator, form: as for :func:`quantized_relu`.
        alpha: for all layers; None: from ``calibration``, or without it of the half-normal
            distribution, which fits inputs normalised without scale and shift.
        calibration: batches; each layer's alpha is ``best_step`` of at most 65,536 of its
            inputs, run in evaluation mode; of a tuple or list the first entry. A captured graph
            is compared with the model on the first batch, in both modes.
        forward: ``forward(model, batch)`` where ``model(batch)`` is not the way to run it.
        learned: train alpha.
        include, exclude: patterns of activations (:func:`gossamer.core.names.select`), by module
            name, or by node name (``relu``, ``relu_1``) for functional calls.
        functional: False replaces modules only, without looking at the graph: for networks that
            cannot be captured.

    Raises :class:`ArgumentError` before anything is changed: for settings outside what is allowed,
    a network that cannot be captured or has no ReLU, a module that hides one (named), a ReLU in
    place on a tensor that is read elsewhere, a captured graph that differs from the model or by
    its mode, a pattern that matches nothing, or a layer that calibration does not reach.
    """
    check_levels(bits, form)
    _check_estimator(estimator)
    if alpha is not None:
        check_distance(alpha)
        if calibration is not None:
            raise ArgumentError(f"alpha={alpha} and calibration: give one of the two")
    target, found = capture.activations(model, functional, include, exclude)
    if calibration is not None:
        batches = capture.checked(model, target, calibration, forward)
        inputs = capture.inputs(target, found, batches, forward, _SAMPLE)
        steps = {name: _step_of(name, values, bits, form) for name, values in inputs.items()}
    else:
        fixed = half_normal_step(bits, form=form) if alpha is None else alpha
        steps = dict.fromkeys(found, fixed)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, places in found.items():
        made = QuantizedReLU(bits, steps[name], estimator=estimator, form=form, learned=learned).to(
            device
        )
        made.train(target.training)
        for owner, attribute in places:
            setattr(owner, attribute, made)
    return target


def _step_of(name: str, values: Tensor, bits: int, form: str) -> float:
    try:
        return best_step(values, bits, form=form)
    except ArgumentError as e:
        raise ArgumentError(f"inputs of activation {name!r}: {e}") from e


def normalize_(
    model: nn.Module,
    batch: Any,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    functional: bool = True,
) -> nn.Module:
    """Put batch-norm without scale and shift before each ReLU, as the paper's networks have it.

    Inputs of a ReLU then have mean 0 and variance 1, which the half-normal alpha is made for. Each
    ReLU becomes ``Sequential(norm, relu)`` under its name; call it before training, and
    :func:`quantize_activations_` after.

    Args:
        batch: one batch, from which the layers' channels are read; nothing is learned from it.
        forward, include, exclude, functional: as for :func:`quantize_activations_`, which
            returns the same.

    Raises :class:`ArgumentError`, before anything is changed, as there, for inputs that are not
    2- to 5-dimensional, and for a ReLU that is used at several places or widths.
    """
    target, found = capture.activations(model, functional, include, exclude)
    (batch,) = capture.checked(model, target, [batch], forward)
    shapes = capture.shapes(target, found, batch, forward)
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    made: dict[str, nn.Module] = {}
    for name, seen in shapes.items():
        if len(seen) != 1 or len(found[name]) != 1:
            raise ArgumentError(
                f"activation {name!r} is used at {max(len(seen), len(found[name]))} places; each "
                "needs statistics of its own: give each its own nn.ReLU"
            )
        shape = seen[0]
        if len(shape) not in kinds:
            raise ArgumentError(
                f"activation {name!r} has inputs of shape {shape}; batch-norm takes (N, C) to "
                "(N, C, D, H, W)"
            )
        made[name] = kinds[len(shape)](shape[1], affine=False)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, norm in made.items():
        ((owner, attribute),) = found[name]
        relu = getattr(owner, attribute)
        pair = nn.Sequential(norm.to(device), relu)
        pair.train(target.training)
        setattr(owner, attribute, pair)
    return target
