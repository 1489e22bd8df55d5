"""What quantized weights and gradients cost an online learner: bounds, and the errors in them.

Hou, Zhang, Kwok, *Analysis of Quantized Models*, ICLR 2019: the forms of its bounds. The constants
are derived here, from these assumptions. Losses f_t are convex with L-Lipschitz gradients, each
with a minimum in the domain. The domain contains 0; two of its points are at most D apart, and
D_inf in a coordinate. Gradients g_t = f_t'(q_t) are taken at the quantized weights q_t = Q(w_t);
their coordinates are at most G. Learning is by RMSProp,

    v_t = beta v_(t-1) + (1 - beta) g_t^2,   w_(t+1) = w_t - (eta / sqrt t) g_t / sqrt(v_t),

and sqrt(t v_t) does not fall (in each coordinate; so assume all proofs of this kind).

Regret is of q_t against any fixed w*: R(T) = sum f_t(q_t) - f_t(w*). By convexity a step's is at
most <g_t, w_t - w*> + <g_t, q_t - w_t>, the two terms below.

1. *Rate.* With a = sqrt(t v_t) / eta, the update gives in each coordinate
   ``g (w_t - w*) = a ((w_t - w*)^2 - (w_(t+1) - w*)^2) / 2 + g^2 / (2 a)``. The first part sums to
   at most D_inf^2 sqrt(T v_T) / (2 eta), since a does not fall. In the second
   g^2 / sqrt(v_t) <= |g| / sqrt(1 - beta), and sum 1/sqrt(t) <= 2 sqrt(T). Over coordinates, with
   sum |x_i| <= sqrt(d) ||x|| and ||g_t|| <= sqrt(d) G: at most d sqrt(T) times
   G (D_inf^2 / (2 eta) + eta / sqrt(1 - beta)) (:func:`rate_scale`).
2. *Floor.* ||g_t|| <= L D, from the minimum of f_t. Coordinates of w_t within the range of the
   levels are at most alpha Delta_w / 2 from theirs; beyond it, at most their distance to the
   range, hence to 0, and these sum to at most D^2 in square. So a step adds at most
   L D sqrt(D^2 + d alpha^2 Delta_w^2 / 4) (:func:`weight_floor`).
3. *Quantized gradients.* SQm rounds |g| / s, s = max|g|, stochastically to levels Delta_g apart,
   without bias: with x = |g_i| / s between levels low and high the variance is
   s^2 (x - low)(high - x) <= s^2 x Delta_g, so E||q - g||^2 <= Delta_g ||g||_inf ||g||_1
   (:func:`variance_bound`). The quotient ||g||_inf ||g||_1 / ||g||^2 is at most (1 + sqrt(d)) / 2,
   for one coordinate of 1 and the others of 1 / (1 + sqrt d); the published
   (1 + sqrt(2d - 1)) / 2 is no smaller. Both parts of 1. are linear in norms of the gradients, so
   that E||q||^2 <= k ||g||^2 multiplies the rate by sqrt(k) (:func:`dimension_factor`).
4. *Clipped at c sigma* for g ~ N(0, sigma^2 I): then s <= c sigma, E||g||_1 = d sigma sqrt(2/pi)
   and E||g||^2 = d sigma^2, so that k = 1 + sqrt(2/pi) c Delta_g at any d (:func:`clip_factor`).
   The bias costs a step at most D E||clip(g) - g|| more (:func:`clip_regret`); its square is
   d sigma^2 sqrt(2/pi) F(c), by integration of the normal tail (:func:`clip_error`).

Delta_w and Delta_g are the spacing of the levels on [-1, 1], ``1 / (2^(m-1) - 1)`` for m bits.

Beyond the paper: the exact variance of SQm (:func:`variance`) and the ratio E||q||^2 / E||g||^2
for normal gradients (:func:`clipped_ratio`, :func:`unclipped_ratio`), by integration.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError

__all__ = [
    "average_regret",
    "clip_error",
    "clip_factor",
    "clip_regret",
    "clipped_ratio",
    "dimension_factor",
    "rate_scale",
    "spacing",
    "unclipped_ratio",
    "variance",
    "variance_bound",
    "weight_floor",
]


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ArgumentError(f"{name}={value} must be positive and finite")


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ArgumentError(f"{name}={value} must be at least 0 and finite")


def _count(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ArgumentError(f"{name}={value} must be at least 1")


def spacing(bits: int) -> float:
    """Delta: the distance of neighbouring levels of m bits on [-1, 1].

    >>> [spacing(m) for m in (2, 3)]
    [1.0, 0.3333333333333333]

    Raises :class:`ArgumentError` under 2 bits.
    """
    if bits < 2:
        raise ArgumentError(f"bits={bits} must be at least 2: a sign and one level")
    return 1 / (2 ** (bits - 1) - 1)


def average_regret(
    d: int, steps: int, *, scale: float, factor: float = 1.0, floor: float = 0.0
) -> float:
    """``factor scale d / sqrt(T) + floor``: the form of the bounds on R(T)/T.

    Args:
        scale: :func:`rate_scale`.
        factor: :func:`dimension_factor` or :func:`clip_factor`; 1 for exact gradients.
        floor: :func:`weight_floor`, plus :func:`clip_regret` where gradients are clipped.
    """
    _count(d=d, steps=steps)
    _positive(scale=scale, factor=factor)
    _not_negative(floor=floor)
    return factor * scale * d / math.sqrt(steps) + floor


def rate_scale(*, gradient: float, diameter: float, rate: float, beta: float) -> float:
    """``G (D_inf^2 / (2 eta) + eta / sqrt(1 - beta))``: the rate over d/sqrt(T) (part 1).

    Args:
        gradient: G, the largest size of a gradient's coordinate.
        diameter: D_inf, the largest distance of two weights in a coordinate.
        rate: eta, of the learning rate eta / sqrt(t).
        beta: of the second moment, in [0, 1).

    >>> rate_scale(gradient=2.0, diameter=1.0, rate=0.5, beta=0.75)
    4.0
    """
    _positive(gradient=gradient, diameter=diameter, rate=rate)
    if not 0 <= beta < 1:
        raise ArgumentError(f"beta={beta} is outside [0, 1)")
    return gradient * (diameter**2 / (2 * rate) + rate / math.sqrt(1 - beta))


def weight_floor(
    d: int, delta_w: float, *, alpha: float, diameter: float, lipschitz: float
) -> float:
    """``L D sqrt(D^2 + d alpha^2 Delta_w^2 / 4)``: what no number of steps removes (part 2).

    Args:
        alpha: scale of the levels.
        diameter: D, the largest distance of two weight vectors.
        lipschitz: L of the gradient.
    """
    _count(d=d)
    _positive(diameter=diameter, lipschitz=lipschitz)
    _not_negative(delta_w=delta_w, alpha=alpha)
    return lipschitz * diameter * math.sqrt(diameter**2 + d * (alpha * delta_w) ** 2 / 4)


def dimension_factor(d: int, delta_g: float) -> float:
    """``sqrt((1 + sqrt(2d - 1))/2 Delta_g + 1)``: slower by this with unclipped SQm (part 3).

    Its square bounds E||q||^2 / ||g||^2 for every g; so does, closer, the same with sqrt(d) in
    place of sqrt(2d - 1), which some g attain in the variance bound.

    >>> dimension_factor(1, 0.0), round(dimension_factor(50_000, 1.0), 1)
    (1.0, 12.6)
    """
    _count(d=d)
    _not_negative(delta_g=delta_g)
    return math.sqrt((1 + math.sqrt(2 * d - 1)) / 2 * delta_g + 1)


def clip_factor(c: float, delta_g: float) -> float:
    """``sqrt(sqrt(2/pi) c Delta_g + 1)``: slower by this clipped at c sigma, at any d (part 4)."""
    _positive(c=c)
    _not_negative(delta_g=delta_g)
    return math.sqrt(math.sqrt(2 / math.pi) * c * delta_g + 1)


def clip_error(c: float, sigma: float = 1.0, d: int = 1) -> float:
    """E||clip(g, c sigma) - g||^2 for g ~ N(0, sigma^2) in d coordinates, exact.

    ``d sigma^2 sqrt(2/pi) F(c)`` with
    ``F(c) = -c exp(-c^2/2) + sqrt(pi/2) (1 + c^2) erfc(c / sqrt 2)``.

    >>> [float(f"{clip_error(c):.2g}") for c in (1, 2, 3)]
    [0.15, 0.012, 0.00041]
    """
    _positive(c=c, sigma=sigma)
    _count(d=d)
    tail = math.sqrt(math.pi / 2) * (1 + c * c) * math.erfc(c / math.sqrt(2))
    return d * sigma**2 * math.sqrt(2 / math.pi) * (tail - c * math.exp(-c * c / 2))


def clip_regret(c: float, sigma: float, d: int, *, diameter: float) -> float:
    """What clipping adds to the floor at most: D times the root of :func:`clip_error`.

    The bound has D E||clip(g) - g||, which the root of the mean square exceeds (Jensen).
    """
    _positive(diameter=diameter)
    return diameter * math.sqrt(clip_error(c, sigma, d))


def _gradient(g: Tensor) -> Tensor:
    flat = g.detach().to(torch.float64).reshape(-1)
    if not flat.numel() or not bool(flat.isfinite().all()):
        raise ArgumentError("g must hold values, all of them finite")
    return flat


def variance_bound(g: Tensor, delta_g: float) -> float:
    """``Delta_g ||g||_inf ||g||_1``, which bounds E||q - g||^2 of SQm."""
    _not_negative(delta_g=delta_g)
    flat = _gradient(g).abs()
    return delta_g * float(flat.max()) * float(flat.sum())


def variance(g: Tensor, delta_g: float) -> float:
    """E||q - g||^2 of SQm, exact: s^2 times the sum of (x - low)(high - x) over x = |g| / s.

    low and high are the levels k Delta_g around x; 1 / Delta_g must be whole, as it is for
    :func:`spacing`. E||q||^2 is this plus ||g||^2, since q is unbiased.

    >>> variance(torch.tensor([2.0, -1.0, 0.0]), 1.0)
    1.0

    Raises :class:`ArgumentError` for a g without values or with ones that are not finite.
    """
    levels = _levels(delta_g)
    flat = _gradient(g).abs()
    top = float(flat.max())
    if top == 0:
        return 0.0
    part = (flat / top * levels).frac()  # between its two levels, in units of their distance
    return (top / levels) ** 2 * float((part * (1 - part)).sum())


def _levels(delta_g: float) -> int:
    _positive(delta_g=delta_g)
    levels = round(1 / delta_g)
    if levels < 1 or abs(levels * delta_g - 1) > 1e-9:
        raise ArgumentError(f"delta_g={delta_g} must be 1 over a whole number, as spacing() gives")
    return levels


def clipped_ratio(c: float, delta_g: float) -> float:
    """E||q||^2 / E||g||^2 for normal gradients clipped at c sigma and quantized by SQm.

    The scale is taken as c sigma itself, which max|clip(g)| is with a probability that tends to
    1 in d; then the ratio does not depend on d. For one level it is
    ``c E min(|x|, c)``, x ~ N(0, 1).

    >>> [round(clipped_ratio(c, 1.0), 2) for c in (1, 2, 3)]
    [0.63, 1.56, 2.39]
    """
    _positive(c=c)
    levels = _levels(delta_g)
    step = c / levels

    def below(t: float) -> tuple[float, float, float]:
        """Integrals of 1, x and x^2 times the half-normal density from 0 to t."""
        density = 2 * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        mass = math.erf(t / math.sqrt(2))
        return mass, math.sqrt(2 / math.pi) - density, mass - t * density

    total = c * c * math.erfc(c / math.sqrt(2))  # the clipped, which sit on the last level
    for k in range(levels):
        low, high = k * step, (k + 1) * step
        mass, mean, _ = (b - a for a, b in zip(below(low), below(high), strict=True))
        # E[q^2 | x] between two levels is (low + high) x - low high
        total += (low + high) * mean - low * high * mass
    return total


def unclipped_ratio(d: int, delta_g: float) -> float:
    """E[||q||^2 / ||g||^2] for d normal gradients under one level, to leading order in d.

    ``sqrt(2/pi) E max|x|`` with the expectation of the largest of d half-normals by integration of
    its tail; ratios of means stand for means of ratios, which is off by order 1/sqrt(d). It grows
    as sqrt(log d), where :func:`clipped_ratio` is flat.

    Raises :class:`ArgumentError` for more than one level (Delta_g below 1).
    """
    _count(d=d)
    if _levels(delta_g) != 1:
        raise ArgumentError(f"delta_g={delta_g} must be 1: one level (2 bits)")
    t = torch.linspace(0, 40, 40_001, dtype=torch.float64)
    # P(max <= t) = (1 - erfc(t / sqrt 2))^d
    tail = -torch.expm1(d * torch.log1p(-torch.erfc(t / math.sqrt(2))))
    return math.sqrt(2 / math.pi) * float(torch.trapezoid(tail, t))
