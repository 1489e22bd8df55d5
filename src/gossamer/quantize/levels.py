"""Levels of activations, and the distance alpha between them that has the least squared error.

Yin et al., ICLR 2019; see :mod:`gossamer.quantize.activations` for the numbers and for the
deviation: the error is minimised directly, where the paper runs Lloyd's algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError, one_of

__all__ = [
    "FORMS",
    "best_step",
    "check_distance",
    "check_levels",
    "codes",
    "half_normal_step",
    "squared_error",
]

FORMS = ("ceil", "round")


def check_levels(bits: int, form: str) -> None:
    """Raise :class:`ArgumentError` for bits outside 2 to 8 or an unknown form."""
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ArgumentError(f"bits={bits!r} must be a whole number from 2 to 8")
    if form not in FORMS:
        raise ArgumentError(f"form {form!r} is not one of {', '.join(FORMS)}")


def check_distance(alpha: float) -> None:
    """Raise :class:`ArgumentError` unless ``alpha`` is positive and finite."""
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ArgumentError(
            f"alpha={alpha} must be positive and finite: the distance of two levels"
        )


def codes(x: Tensor, bits: int, alpha: float | Tensor, *, form: str) -> Tensor:
    """The level's number k for each value, 0 to 2^bits - 1, in the dtype of x.

    Nearest levels (``form="round"``) take ties to the even one.

    >>> codes(torch.tensor([-1.0, 0.1, 0.5, 0.6, 9.0]), 2, 0.5, form="ceil").tolist()
    [0.0, 1.0, 1.0, 2.0, 3.0]
    """
    one_of("form", form, FORMS)
    scaled = x / alpha
    whole = scaled.ceil_() if form == "ceil" else scaled.round_()
    return whole.clamp_(0, 2**bits - 1)


Tail = Callable[[Tensor], Tensor]


def _errors(alphas: Tensor, bits: int, form: str, mass: Tail, mean: Tail, second: float) -> Tensor:
    """E(sigma(x) - x)^2 over x > 0 for each alpha, (A,) -> (A,).

    A value's code k is the number of thresholds below it, so with the tails P(x > t) and
    E[x; x > t] at the thresholds t_j: E k x = sum E[x; x > t_j], E k^2 = sum (2j - 1) P(x > t_j).
    """
    j = torch.arange(1, 2**bits, dtype=torch.float64)
    t = alphas[:, None] * (j - (1.0 if form == "ceil" else 0.5))
    return second - 2 * alphas * mean(t).sum(1) + alphas.square() * (mass(t) * (2 * j - 1)).sum(1)


def _minimum(bits: int, form: str, mass: Tail, mean: Tail, second: float, largest: float) -> float:
    # Several local minima: a scan over all that could be best, then ever closer ones.
    low, high = largest / (8 * (2**bits - 1)), 1.5 * largest
    best = high
    for _ in range(4):
        alphas = torch.logspace(math.log10(low), math.log10(high), 257, dtype=torch.float64)
        at = int(_errors(alphas, bits, form, mass, mean, second).argmin())
        best = float(alphas[at])
        low, high = float(alphas[max(0, at - 2)]), float(alphas[min(256, at + 2)])
    return best


def half_normal_step(bits: int, *, form: str) -> float:
    """alpha of least squared error for |N(0, 1)|, what batch-norm without scale gives.

    >>> [round(half_normal_step(b, form="ceil"), 2) for b in (2, 4)]
    [0.49, 0.17]
    >>> [round(half_normal_step(b, form="round"), 2) for b in (2, 4)]
    [0.65, 0.19]

    Raises :class:`ArgumentError` for bits outside 2 to 8 or an unknown form.
    """
    check_levels(bits, form)
    root = math.sqrt(2)

    def mass(t: Tensor) -> Tensor:
        return torch.erfc(t / root)

    def mean(t: Tensor) -> Tensor:
        return math.sqrt(2 / math.pi) * torch.exp(-t.square() / 2)

    return _minimum(bits, form, mass, mean, 1.0, 6.0)


def best_step(values: Tensor, bits: int, *, form: str) -> float:
    """alpha of least mean squared error over the positive ``values``, any shape.

    Raises :class:`ArgumentError` for bits outside 2 to 8, an unknown form, values that are not
    finite, or none above 0.
    """
    check_levels(bits, form)
    flat = values.detach().reshape(-1).to("cpu", torch.float64)
    if not bool(flat.isfinite().all()):
        raise ArgumentError("values holds NaN or infinite ones; alpha cannot be found from them")
    x = flat[flat > 0].sort().values
    if not len(x):
        raise ArgumentError("values holds none above 0; give alpha as a number")
    # tails by position: sums of everything from there on
    sums = torch.cat([x.flip(0).cumsum(0).flip(0), x.new_zeros(1)]) / len(x)

    def place(t: Tensor) -> Tensor:
        return torch.searchsorted(x, t.contiguous(), right=True)

    return _minimum(
        bits,
        form,
        lambda t: 1 - place(t) / len(x),
        lambda t: sums[place(t)],
        float(x.square().mean()),
        float(x[-1]),
    )


def squared_error(values: Tensor, bits: int, alpha: float, *, form: str) -> float:
    """Mean (sigma(x) - x)^2 over the positive ``values``: what :func:`best_step` minimises."""
    check_levels(bits, form)
    check_distance(alpha)
    x = values.detach().reshape(-1).double()
    x = x[x > 0]
    return float((codes(x, bits, alpha, form=form) * alpha - x).square().mean())
