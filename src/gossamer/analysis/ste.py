"""Straight-through estimators on a two-linear-layer network with binary activations.

Yin, Lyu, Zhang, Osher, Qi, Xin, *Understanding Straight-Through Estimator in Training Activation
Quantized Neural Nets*, ICLR 2019, arXiv 1903.05662, sections 2 and 3.

``y = v^T sigma(Z w)`` with ``sigma(x) = 1{x > 0}``, Z an (m, n) matrix of independent N(0, 1), and
a teacher (v*, w*) with ||w*|| = 1. Below, w^ = w / ||w||, theta the angle between w and w*,
J = 1 1^T, and ``normal`` the unit vector along (I - w^ w^^T) w*.

- loss of a sample: ``l = (v^T sigma(Zw) - v*^T sigma(Zw*))^2 / 2``
- population loss f and its gradients: :func:`loss`, :func:`gradient_v`, :func:`gradient_w`
- coarse gradient ``g_mu = Z^T (mu'(Zw) * v) (v^T sigma(Zw) - y*)``, where mu' stands in for the
  derivative of sigma: 1 (identity), 1{x > 0} (ReLU), 1{0 < x < 1} (clipped ReLU); its
  expectation: :func:`coarse_gradient`

Everything is float64. Deviations, none of which changes a value:

- The angle is atan2 of the two parts of w*, where a clamped arccos loses half the digits at
  theta = 0 and pi.
- ``cos(theta/2) u`` with u = (w^ + w*) / ||w^ + w*|| is (w^ + w*) / 2, which is no 0/0 at pi.
- ``csc(theta/2) q u + (p - cot(theta/2) q) w^`` is ``p w^ + q normal``; p and q are integrated
  (:func:`p_q`).
- df/dw has no limit at theta = 0 and pi, nor at w = 0; it is taken as 0 there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError

__all__ = [
    "ESTIMATORS",
    "angle",
    "coarse_gradient",
    "descend",
    "gradient_v",
    "gradient_w",
    "identity_norm",
    "inner_product",
    "is_spurious",
    "known",
    "loss",
    "p_q",
    "saddle",
    "spurious_minimum",
    "vectors",
    "xi",
]

ESTIMATORS = ("identity", "relu", "clipped")

_ROOT = math.sqrt(2 * math.pi)
# sin(theta) below this is rounding: the direction of (I - w^ w^^T) w* is noise.
_FLAT = 1e-14

Vector = Tensor | Sequence[float]


def vectors(
    v: Vector, w: Vector, v_star: Vector, w_star: Vector
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All four as float64 vectors.

    Raises :class:`ArgumentError` for other shapes, lengths that differ, or ||w*|| other than 1.
    """
    made = [torch.as_tensor(x, dtype=torch.float64) for x in (v, w, v_star, w_star)]
    for (name, other), a, b in zip(
        (("v", "v_star"), ("w", "w_star")), made[:2], made[2:], strict=True
    ):
        if a.ndim != 1 or a.shape != b.shape or not len(a):
            raise ArgumentError(
                f"{name} of shape {tuple(a.shape)} and {other} of shape {tuple(b.shape)} must be "
                "vectors of one length"
            )
    if abs(float(made[3].norm()) - 1) > 1e-6:
        raise ArgumentError(
            f"w_star has norm {float(made[3].norm()):g}; it must be 1 (sigma ignores the scale)"
        )
    return made[0], made[1], made[2], made[3]


def known(name: str) -> None:
    """Raise :class:`ArgumentError` for an unknown estimator."""
    if name not in ESTIMATORS:
        raise ArgumentError(f"estimator {name!r} is not one of {', '.join(ESTIMATORS)}")


def _frame(w: Tensor, w_star: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w^, normal, theta. At theta = 0, pi and w = 0 the normal is 0; at w = 0 w^ is, too."""
    size = w.norm()
    unit = w / size if float(size) > 0 else torch.zeros_like(w)
    along = unit @ w_star
    rest = w_star - along * unit
    rest = rest - (rest @ unit) * unit  # once more: the first difference cancels near 0 and pi
    sine = rest.norm()
    normal = rest / sine if float(sine) > _FLAT and float(size) > 0 else torch.zeros_like(w)
    return unit, normal, torch.atan2(sine, along)


def angle(w: Vector, w_star: Vector) -> Tensor:
    """theta in [0, pi], radians, between w and the unit vector w*.

    Raises :class:`ArgumentError` for w = 0, which has no direction.

    >>> round(float(angle([0.0, 2.0], [1.0, 0.0])), 6)
    1.570796
    """
    _, w, _, w_star = vectors([0.0], w, [0.0], w_star)
    if not bool((w != 0).any()):
        raise ArgumentError("w is zero; it has no angle")
    return _frame(w, w_star)[2]


def _i_plus_j(x: Tensor) -> Tensor:
    return x + x.sum()


def loss(v: Vector, w: Vector, v_star: Vector, w_star: Vector) -> Tensor:
    """Population loss f, equation 3: the expectation of the sample loss over Z.

    ``[v^T(I+J)v - 2 v^T((1 - 2 theta/pi) I + J)v* + v*^T(I+J)v*] / 8``; for w = 0
    ``v*^T(I+J)v* / 8``, since sigma(0) = 0.

    Args:
        v, v_star: (m,), second layer and the teacher's.
        w, w_star: (n,), first layer and the teacher's, of norm 1.

    >>> float(loss([1.0, -2.0], [0.0, 3.0], [1.0, -2.0], [0.0, 1.0]))
    0.0

    Raises :class:`ArgumentError` for shapes that do not fit and a w* that is no unit vector.
    """
    v, w, v_star, w_star = vectors(v, w, v_star, w_star)
    own = v_star @ _i_plus_j(v_star)
    if not bool((w != 0).any()):
        return own / 8
    theta = _frame(w, w_star)[2]
    cross = v @ ((1 - 2 * theta / math.pi) * v_star + v_star.sum())
    return (v @ _i_plus_j(v) - 2 * cross + own) / 8


def gradient_v(v: Vector, w: Vector, v_star: Vector, w_star: Vector) -> Tensor:
    """df/dv, (m,): ``(I+J)v/4 - ((1 - 2 theta/pi) I + J)v*/4``; 0 for w = 0 (equation 4)."""
    v, w, v_star, w_star = vectors(v, w, v_star, w_star)
    if not bool((w != 0).any()):
        return torch.zeros_like(v)
    theta = _frame(w, w_star)[2]
    return (_i_plus_j(v) - (1 - 2 * theta / math.pi) * v_star - v_star.sum()) / 4


def gradient_w(v: Vector, w: Vector, v_star: Vector, w_star: Vector) -> Tensor:
    """df/dw, (n,): ``-(v^T v*) / (2 pi ||w||) normal``, 0 where it does not exist (equation 5)."""
    v, w, v_star, w_star = vectors(v, w, v_star, w_star)
    if not bool((w != 0).any()):
        return torch.zeros_like(w)
    normal = _frame(w, w_star)[1]
    return -(v @ v_star) / (2 * math.pi * w.norm()) * normal


def xi(x: Tensor | float) -> Tensor:
    """``int_0^x r^2 exp(-r^2 / 2) dr = sqrt(pi/2) erf(x / sqrt 2) - x exp(-x^2 / 2)``.

    >>> round(float(xi(100.0)) - math.sqrt(math.pi / 2), 12)
    0.0
    """
    x = torch.as_tensor(x, dtype=torch.float64)
    return math.sqrt(math.pi / 2) * torch.erf(x / math.sqrt(2)) - x * torch.exp(-x.square() / 2)


def p_q(theta: Tensor | float, norm: Tensor | float) -> tuple[Tensor, Tensor]:
    """The clipped estimator's p(theta) and q(theta) for ||w|| = ``norm`` > 0.

    p is ``1/(2 pi) int_{-pi/2 + theta}^{pi/2} cos(phi) xi(sec(phi) / ||w||) dphi``, q the same
    with sin. They are the parts along w^ and ``normal`` of E[z 1{0 < z^T w < 1, z^T w* > 0}] for
    one row z, and so, with a = 1/||w||, s = sin(theta), c = cos(theta), and phi and Phi the
    normal density and distribution:

    - q = s erf(a / (sqrt 2 s)) / (2 sqrt(2 pi))
    - p = [1 + c erf(a / (sqrt 2 s))] / (2 sqrt(2 pi)) - phi(a) Phi(a c / s)

    At theta = 0 these are (1 - exp(-a^2/2)) / sqrt(2 pi) and 0; at pi both are 0.

    Raises :class:`ArgumentError` for theta outside [0, pi] or a norm that is not positive.
    """
    theta = torch.as_tensor(theta, dtype=torch.float64)
    norm = torch.as_tensor(norm, dtype=torch.float64)
    slack = 1e-6  # pi in float32 lies above pi
    if not bool(((theta >= -slack) & (theta <= math.pi + slack)).all()):
        raise ArgumentError(f"theta={theta.tolist()} must lie in [0, pi], radians")
    theta = theta.clamp(0, math.pi)
    if not bool((norm > 0).all()):
        raise ArgumentError(f"norm={norm.tolist()} must be positive: it is the length of w")
    a, s, c = 1 / norm, torch.sin(theta), torch.cos(theta)
    bulk = torch.erf(a / (math.sqrt(2) * s))  # s = 0: erf(inf) = 1
    q = s * bulk / (2 * _ROOT)
    # Phi as erfc, whose tail keeps its digits
    side = torch.erfc(-a * c / (math.sqrt(2) * s)) / 2
    p = (1 + c * bulk) / (2 * _ROOT) - torch.exp(-a.square() / 2) / _ROOT * side
    return p, q


def coarse_gradient(estimator: str, v: Vector, w: Vector, v_star: Vector, w_star: Vector) -> Tensor:
    """E g_mu, (n,), for an estimator of :data:`ESTIMATORS` (lemmas 4, 8 and 10).

    With h = ||v||^2 + (1^T v)^2 - (1^T v)(1^T v*) + v^T v*:

    - identity: ``(||v||^2 w^ - (v^T v*) w*) / sqrt(2 pi)``
    - relu: ``h / (2 sqrt(2 pi)) w^ - (v^T v*) (w^ + w*) / (2 sqrt(2 pi))``
    - clipped: ``p(0) h / 2 w^ - (v^T v*) (p(theta) w^ + q(theta) normal)``

    For w = 0 no activation fires: relu and clipped give 0, identity ``-(v^T v*) w* / sqrt(2 pi)``.

    Raises :class:`ArgumentError` as :func:`loss` does, and for an unknown estimator.
    """
    known(estimator)
    v, w, v_star, w_star = vectors(v, w, v_star, w_star)
    unit, normal, theta = _frame(w, w_star)
    both = v @ v_star
    if estimator == "identity":
        return ((v @ v) * unit - both * w_star) / _ROOT
    if not bool((w != 0).any()):
        return torch.zeros_like(w)
    h = v @ v + v.sum().square() - v.sum() * v_star.sum() + both
    if estimator == "relu":
        return (h * unit - both * (unit + w_star)) / (2 * _ROOT)
    size = w.norm()
    p0, _ = p_q(0.0, size)
    p, q = p_q(theta, size)
    return p0 * h / 2 * unit - both * (p * unit + q * normal)


def inner_product(estimator: str, v: Vector, w: Vector, v_star: Vector, w_star: Vector) -> Tensor:
    """``<E g_mu, df/dw>``, never negative (lemmas 5, 9 and 11).

    ``sin(theta) (v^T v*)^2 / (sqrt(2 pi)^3 ||w||)`` for the identity, half of it for relu,
    ``q(theta) (v^T v*)^2 / (2 pi ||w||)`` for clipped. 0 where df/dw is taken as 0.
    """
    known(estimator)
    v, w, v_star, w_star = vectors(v, w, v_star, w_star)
    _, normal, theta = _frame(w, w_star)
    if not bool((normal != 0).any()):
        return torch.zeros((), dtype=torch.float64)
    square = (v @ v_star).square() / w.norm()
    if estimator == "clipped":
        return p_q(theta, w.norm())[1] * square / (2 * math.pi)
    whole = torch.sin(theta) * square / _ROOT**3
    return whole if estimator == "identity" else whole / 2


def is_spurious(v_star: Vector) -> bool:
    """Whether f has spurious minima and saddles: (1^T v*)^2 < (m + 1)/2 ||v*||^2.

    >>> is_spurious([1.0, -0.5, 0.8, -0.3]), is_spurious([1.0, 1.0, 1.0])
    (True, False)
    """
    v = torch.as_tensor(v_star, dtype=torch.float64)
    return bool(v.sum().square() < (len(v) + 1) / 2 * (v @ v))


def _spurious(v_star: Vector) -> Tensor:
    v = torch.as_tensor(v_star, dtype=torch.float64)
    if v.ndim != 1 or not len(v):
        raise ArgumentError(f"v_star of shape {tuple(v.shape)} must be a vector")
    if not is_spurious(v):
        raise ArgumentError(
            f"v_star={v.tolist()} has (1^T v*)^2 >= (m + 1)/2 ||v*||^2: there are no spurious "
            "minima and no saddles"
        )
    return v


def spurious_minimum(v_star: Vector) -> Tensor:
    """v of the spurious minima, ``(I+J)^-1 (J-I) v*``; they lie at theta = pi (proposition 1).

    Raises :class:`ArgumentError` where there are none.

    >>> spurious_minimum([1.0, -0.5, 0.8, -0.3]).tolist()
    [-0.6, 0.9, -0.4, 0.7]
    """
    v = _spurious(v_star)
    return 2 * v.sum() / (len(v) + 1) - v


def saddle(v_star: Vector) -> tuple[Tensor, Tensor]:
    """v and theta of the saddles, where v^T v* = 0 (proposition 1).

    theta = pi/2 (m+1)||v*||^2 / ((m+1)||v*||^2 - (1^T v*)^2), v = (I+J)^-1 ((1 - 2 theta/pi) I
    + J) v*.

    Raises :class:`ArgumentError` where there are none.
    """
    v = _spurious(v_star)
    whole = (len(v) + 1) * (v @ v)
    theta = math.pi / 2 * whole / (whole - v.sum().square())
    c = 1 - 2 * theta / math.pi
    return c * v + (1 - c) * v.sum() / (len(v) + 1), theta


def identity_norm(v_star: Vector) -> Tensor:
    """||E g_identity|| at the spurious minima: 2 (m-1)(1^T v*)^2 / (sqrt(2 pi) (m+1)^2).

    It does not vanish unless m = 1 or 1^T v* = 0, so the identity estimator leaves them.

    Raises :class:`ArgumentError` where there are none.
    """
    v = _spurious(v_star)
    return 2 * (len(v) - 1) * v.sum().square() / (_ROOT * (len(v) + 1) ** 2)


def descend(
    estimator: str,
    v: Vector,
    w: Vector,
    v_star: Vector,
    w_star: Vector,
    *,
    rate: float,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1: ``v <- v - rate df/dv``, ``w <- w - rate E g_mu``, both from the old point.

    Returns f before the first and after each step, (steps + 1,), and the last v and w.

    Raises :class:`ArgumentError` for a rate that is not positive or negative steps.
    """
    known(estimator)
    if not (rate > 0 and math.isfinite(rate)) or steps < 0:
        raise ArgumentError(f"rate={rate} must be positive, steps={steps} at least 0")
    v, w, v_star, w_star = vectors(v, w, v_star, w_star)
    seen = [float(loss(v, w, v_star, w_star))]
    for _ in range(steps):
        slope = gradient_v(v, w, v_star, w_star)
        coarse = coarse_gradient(estimator, v, w, v_star, w_star)
        v, w = v - rate * slope, w - rate * coarse
        seen.append(float(loss(v, w, v_star, w_star)))
    return torch.tensor(seen, dtype=torch.float64), v, w
