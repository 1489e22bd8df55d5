"""Loss-aware weights: quantized where the loss's curvature says it costs least.

Hou, Yao, Kwok, *Loss-aware Binarization of Deep Networks* (LAB), ICLR 2017, arXiv 1611.01600;
Hou, Kwok, *Loss-aware Weight Quantization of Deep Networks* (LAT, LAQ), ICLR 2018,
arXiv 1802.08635. A proximal Newton step: the curvature is taken as d = sqrt(v), with v the running
mean of squared gradients at the *quantized* weight that Adam and RMSprop keep, and after each step

    minimise over alpha > 0 and codes b:   sum d (w - alpha b)^2 / 2.

- LAB: b = sign(w), alpha = sum d|w| / sum d.
- LAT: b in {-1, 0, 1}; exactly, by sorting (:func:`ternary`), or approximately, by alternation
  (:func:`linear` with 2 bits). LAT2: a scale for the positive weights and one for the negative.
- LAQ: m bits, n = 2^(m-1) - 1 levels on each side: linear k/n, or logarithmic 2^-k. Alternation
  between nearest codes and alpha = sum d b w / sum d b^2, which never raises the objective. The
  authors' code divides by sum d|b| instead, the same for ternary codes only: ``scale="authors"``.

Deviations: codes change once an optimizer step. The alternation starts anew at each step, from
min(max|w|, .75 m mean|w|), near the best scale of Gaussian weights at every m; so a projection
depends on w and d alone. v is without Adam's bias correction, a common factor that cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.core.latent import Computed, Latent
from gossamer.core.optimizers import require_second_moment, second_moment
from gossamer.core.quantizer import Quantizer, Straight, checked, fitting, rule_of

__all__ = ["PROJECTIONS", "LossAware", "binary", "linear", "logarithmic", "objective", "ternary"]

Scale = Literal["least-squares", "authors"]
_FLOOR = 1e-8  # added to sqrt(v), which is 0 before the first step
_NAMES = ("least-squares", "authors")


def objective(weight: Tensor, d: Tensor, value: Tensor) -> float:
    """sum d (w - q)^2, what the projections minimise, in double precision."""
    return float((d.double() * (weight.double() - value.double()).square()).sum())


def _both(weight: Tensor, d: Tensor) -> tuple[Tensor, Tensor] | None:
    """Flat weight and d in single precision or better; None where all weights are zero."""
    if weight.shape != d.shape:
        raise ArgumentError(
            f"d has shape {tuple(d.shape)}, the weight {tuple(weight.shape)}; give one each"
        )
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w = checked(weight.detach()).reshape(-1).to(wide)
    flat = checked(d.detach(), "d").reshape(-1).to(wide)
    if w.numel() and not flat.min() > 0:
        raise ArgumentError("d must be positive; add a small number, such as 1e-8, to sqrt(v)")
    return (w, flat) if torch.count_nonzero(w) else None


@torch.no_grad()
def binary(weight: Tensor, d: Tensor) -> Tensor:
    """LAB: sign(w) sum d|w| / sum d, of the weight's shape and dtype; sign(0) is +1.

    >>> binary(torch.tensor([1.0, -3.0]), torch.tensor([3.0, 1.0])).tolist()
    [1.5, -1.5]

    Raises :class:`ArgumentError`, as all of these do, for NaN and infinity, another shape of d,
    and d that is not positive.
    """
    both = _both(weight, d)
    if both is None:
        return torch.zeros_like(weight)
    alpha = (torch.dot(both[0].abs(), both[1]) / both[1].sum()).to(weight.dtype)
    return torch.where(weight < 0, -alpha, alpha)


def _kept(size: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest kept magnitude and alpha of the best ternary code of magnitudes >= 0.

    The codes of the best alpha are those of the largest magnitudes, whatever d is. With the i
    largest, alpha = A / D (A = sum d|w|, D = sum d) lowers the objective by A^2 / D; the paper's
    test of a sign change only picks candidates for the same maximum.
    """
    order = size.argsort(descending=True)
    ranked, weights = size[order].double(), d[order].double()
    products, sums = (ranked * weights).cumsum(0), weights.cumsum(0)
    best = (products.square() / sums).argmax()
    return ranked[best], products[best] / sums[best]


@torch.no_grad()
def ternary(weight: Tensor, d: Tensor, *, scales: Literal[1, 2]) -> Tensor:
    """LAT, exact; with two scales LAT2: the positive and the negative weights each exactly.

    >>> d = torch.ones(4)
    >>> ternary(torch.tensor([1.0, 0.5, -0.75, 0.1]), d, scales=1).tolist()
    [0.75, 0.75, -0.75, 0.0]
    >>> ternary(torch.tensor([1.0, 0.5, -0.7, 0.1]), d, scales=2).tolist()
    [0.75, 0.75, -0.699999988079071, 0.0]
    """
    if scales not in (1, 2):
        raise ArgumentError(f"scales={scales} is not 1 or 2")
    both = _both(weight, d)
    if both is None:
        return torch.zeros_like(weight)
    w, flat = both
    value = torch.zeros_like(w)
    for side in (w,) if scales == 1 else (w.clamp(min=0), w.clamp(max=0)):
        least, alpha = _kept(side.abs(), flat)
        if least > 0:
            on = side.abs().double() >= least
            value[on] = torch.where(side[on] < 0, -alpha, alpha).to(w.dtype)
    return value.reshape(weight.shape).to(weight.dtype)


def _alternate(
    w: Tensor,
    d: Tensor,
    bits: int,
    snap: Callable[[Tensor], Tensor],
    top: int,
    iterations: int,
    tolerance: float,
    scale: Scale,
) -> Tensor:
    """Values of w after the alternation; ``snap``: w / step -> nearest codes in [-top, top]."""
    size = w.abs()
    # alpha = top * step; in steps, values are exact multiples, which a file stores as integers
    step = float(torch.minimum(size.max(), 0.75 * bits * size.mean())) / top
    weighted = d * w
    for _ in range(iterations):
        b = snap(w / step)
        above = torch.dot(b, weighted)
        below = torch.dot(b.square() if scale == "least-squares" else b.abs() * top, d)
        before, step = step, float(above / below)
        if abs(step - before) <= tolerance * before:
            break
    # + 0: a negative zero is a bit pattern of its own
    return snap(w / step).mul_(step).add_(0.0)


def _levels(
    weight: Tensor,
    d: Tensor,
    bits: int,
    snap: Callable[[Tensor], Tensor],
    top: int,
    iterations: int,
    tolerance: float,
    scale: Scale,
    scales: int,
) -> Tensor:
    if scales not in (1, 2):
        raise ArgumentError(f"scales={scales} is not 1 or 2")
    if scale not in _NAMES:
        raise ArgumentError(f"scale={scale!r} is not one of {', '.join(_NAMES)}")
    if iterations < 0 or not tolerance >= 0:
        raise ArgumentError(f"iterations={iterations}, tolerance={tolerance}: both at least 0")
    both = _both(weight, d)
    if both is None:
        return torch.zeros_like(weight)
    w, flat = both
    value = torch.zeros_like(w)
    for side in (w,) if scales == 1 else (w.clamp(min=0), w.clamp(max=0)):
        if torch.count_nonzero(side):
            value += _alternate(side, flat, bits, snap, top, iterations, tolerance, scale)
    return value.reshape(weight.shape).to(weight.dtype)


@torch.no_grad()
def linear(
    weight: Tensor,
    d: Tensor,
    *,
    bits: int,
    iterations: int = 10,
    tolerance: float = 1e-6,
    scale: Scale = "least-squares",
    scales: Literal[1, 2] = 1,
) -> Tensor:
    """LAQ with levels alpha k / n, k = -n..n, n = 2^(bits-1) - 1; 2 bits are LAT, approximate.

    Args:
        weight, d: any shape, one shape; d positive.
        bits: 2 to 8.
        iterations, tolerance: at most so many, until alpha moves by less than this part of it.
        scale: "least-squares", or what the "authors" divide by.
        scales: 2: positive and negative weights each by themselves (LAT2, approximate).

    Raises :class:`ArgumentError` as :func:`binary`, and for arguments out of range.
    """
    if not 2 <= bits <= 8:
        raise ArgumentError(f"bits={bits} is outside 2 to 8")
    n = (1 << (bits - 1)) - 1

    def snap(u: Tensor) -> Tensor:
        return u.round_().clamp_(-n, n)

    return _levels(weight, d, bits, snap, n, iterations, tolerance, scale, scales)


@torch.no_grad()
def logarithmic(
    weight: Tensor,
    d: Tensor,
    *,
    bits: int,
    iterations: int = 10,
    tolerance: float = 1e-6,
    scale: Scale = "least-squares",
    scales: Literal[1, 2] = 1,
) -> Tensor:
    """LAQ with levels 0 and +-alpha 2^-k, k = 0..n-1, n = 2^(bits-1) - 1.

    Arguments and errors as :func:`linear`; ``bits`` 2 to 5, since 2^-15 is small enough.
    """
    if not 2 <= bits <= 5:
        raise ArgumentError(f"bits={bits} is outside 2 to 5")
    n = (1 << (bits - 1)) - 1
    like = weight.detach().new_tensor([0.0, *(2.0**-k for k in range(n - 1, -1, -1))])
    like = like if weight.dtype == torch.float64 else like.float()
    middles = (like[1:] + like[:-1]) / 2

    def snap(u: Tensor) -> Tensor:
        return like[torch.bucketize(u.abs(), middles)].copysign_(u)

    return _levels(weight, d, bits, snap, 1, iterations, tolerance, scale, scales)


PROJECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lab": binary,
    "lat": partial(ternary, scales=1),
    "lat, approximate": partial(linear, bits=2),
    "lat2": partial(ternary, scales=2),
    "lat2, approximate": partial(linear, bits=2, scales=2),
    **{f"laq-{bits}": partial(linear, bits=bits) for bits in (3, 4, 8)},
    **{f"laq-{bits}, logarithmic": partial(logarithmic, bits=bits) for bits in (3, 4)},
}


class LossAware(Quantizer):
    """Train latent weights that are projected under the curvature d = sqrt(v).

    Args:
        projection: a name of :data:`PROJECTIONS`, or a function of weight and d (float32 beside
            16-bit weights) that returns values of the weight's shape and dtype.
        beta: None: v is the second moment of the optimizer (Adam's family, RMSprop); a number in
            [0, 1): v <- beta v + (1 - beta) g^2, kept here, for any optimizer.
        clip: latent weights stay in [-clip, clip] (the authors: 1); None: free.
        include, exclude, ends: what is quantized (:func:`gossamer.core.quantizer.chosen`).

    Raises :class:`ArgumentError` as :class:`gossamer.core.quantizer.Quantizer` does, and without
    ``beta`` for an optimizer that has no second moment. A step whose gradients or moments are not
    finite is refused with the same error before anything is moved.
    """

    def __init__(
        self,
        projection: str | Callable[[Tensor, Tensor], Tensor],
        *,
        beta: float | None,
        clip: float | None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        ends: bool = False,
    ) -> None:
        super().__init__(clip=clip, include=include, exclude=exclude, ends=ends)
        projection = rule_of(projection, PROJECTIONS, "weight and d")
        if beta is not None and not 0 <= beta < 1:
            raise ArgumentError(f"beta={beta} is outside [0, 1), or None for the optimizer's own")
        self.projection, self.beta = projection, beta
        self._own: dict[str, Tensor] = {}  # v, with beta

    def _check(self) -> None:
        if self.beta is None:
            require_second_moment(self.optimizer, "LossAware")

    def _moment(self, name: str, parameter: Tensor) -> Tensor:
        if self.beta is not None:
            wide = torch.promote_types(parameter.dtype, torch.float32)  # squares of small values
            return self._own.get(name, torch.zeros_like(parameter, dtype=wide))
        if self.optimizer is None:
            return torch.zeros_like(parameter)
        return second_moment(self.optimizer, parameter)

    def _project(self, name: str, weight: Tensor, v: Tensor) -> Tensor:
        # in float16 the floor is 0
        d = v.to(torch.promote_types(v.dtype, torch.float32)).sqrt() + _FLOOR
        return fitting(self.projection(weight, d), weight, name)

    def _module(self, name: str, weight: Tensor) -> Computed:
        return Straight(weight, self._project(name, weight, torch.zeros_like(weight)), None)

    def _update(self, name: str, held: Latent) -> None:
        weight = held.parameter.detach()
        held.module.take(self._project(name, weight, self._moment(name, held.parameter)), None)

    @torch.no_grad()
    def before_step(self) -> None:
        """Refuse gradients and moments that are not finite; update the own average."""
        for name, held in self._held.items():
            checked(self._moment(name, held.parameter), f"the second moment of {name}")
            if held.parameter.grad is not None:
                checked(held.parameter.grad, f"the gradient of {name}")
        if self.beta is None:
            return
        for name, held in self._held.items():
            if held.parameter.grad is not None:
                v = self._moment(name, held.parameter)
                g = held.parameter.grad.to(v.dtype)
                self._own[name] = v.mul(self.beta).addcmul_(g, g, value=1 - self.beta)

    def _state(self) -> dict[str, Any]:
        """The own averages; weights and values are in the model's ``state_dict``."""
        return {"moments": dict(self._own)}

    def _load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`_state` returned."""
        self._own = dict(state["moments"])
