"""The straight-through network sampled: what the closed forms are the means of.

Yin et al., ICLR 2019, arXiv 1903.05662, sections 2 and 3: losses and coarse gradients of single
draws of Z, and their Monte Carlo means, beside the closed forms of :mod:`gossamer.analysis.ste`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gossamer.analysis.ste import ESTIMATORS, Vector, known, vectors
from gossamer.core.errors import ArgumentError

__all__ = [
    "monte_carlo",
    "sample_coarse_gradient",
    "sample_gradient_v",
    "sample_gradient_w",
    "sample_loss",
]

_ROOT = math.sqrt(2 * math.pi)


def _sampled(
    v: Vector, w: Vector, v_star: Vector, w_star: Vector, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v, Zw (N, m), sigma(Zw) (N, m), residual (N,)."""
    v, w, v_star, w_star = vectors(v, w, v_star, w_star)
    if z.ndim != 3 or z.shape[1:] != (len(v), len(w)):
        raise ArgumentError(
            f"z has shape {tuple(z.shape)}; it must be (samples, {len(v)}, {len(w)})"
        )
    before = z @ w
    fired = (before > 0).to(z.dtype)
    return v, before, fired, fired @ v - (z @ w_star > 0).to(z.dtype) @ v_star


def sample_loss(v: Vector, w: Vector, v_star: Vector, w_star: Vector, z: Tensor) -> Tensor:
    """l for each of the samples z, (N, m, n) in float64: (N,)."""
    return _sampled(v, w, v_star, w_star, z)[3].square() / 2


def sample_gradient_v(v: Vector, w: Vector, v_star: Vector, w_star: Vector, z: Tensor) -> Tensor:
    """dl/dv = sigma(Zw) (v^T sigma(Zw) - y*) for each sample: (N, m)."""
    _, _, fired, residual = _sampled(v, w, v_star, w_star, z)
    return fired * residual[:, None]


def sample_coarse_gradient(
    estimator: str, v: Vector, w: Vector, v_star: Vector, w_star: Vector, z: Tensor
) -> Tensor:
    """g_mu for each sample: (N, n)."""
    known(estimator)
    v, before, fired, residual = _sampled(v, w, v_star, w_star, z)
    slope = torch.ones_like(before) if estimator == "identity" else fired
    if estimator == "clipped":
        slope = fired * (before < 1)
    return torch.einsum("nmk,nm->nk", z, slope * v * residual[:, None])


def sample_gradient_w(v: Vector, w: Vector, v_star: Vector, w_star: Vector, z: Tensor) -> Tensor:
    """An unbiased estimate of df/dw from each sample: (N, n).

    l itself is flat in w almost everywhere; f moves by the samples that lie on the edge. With row
    i of Z moved onto its edge, r = P z_i and P = I - w^ w^^T,

    ``df/dw = 1 / (sqrt(2 pi) ||w||) sum_i E[r (l | sigma_i = 1) - r (l | sigma_i = 0)]``,

    of which the mean over r and -r is taken.

    Raises :class:`ArgumentError` for w = 0.
    """
    v, w, v_star, w_star = vectors(v, w, v_star, w_star)
    _sampled(v, w, v_star, w_star, z)
    if not bool((w != 0).any()):
        raise ArgumentError("w is zero; f is not continuous there")
    unit = w / w.norm()
    r = z - (z @ unit)[..., None] * unit
    # (l | 1) - (l | 0) = v_i (rest_i - v*_i sigma(r w*)) + v_i^2 / 2; all but one term is even in r
    step = -(v * v_star) * torch.sign(r @ w_star) / 2
    return torch.einsum("nmk,nm->nk", r, step) / (_ROOT * w.norm())


def monte_carlo(
    v: Vector,
    w: Vector,
    v_star: Vector,
    w_star: Vector,
    *,
    samples: int,
    generator: torch.Generator,
    chunk: int = 1 << 16,
) -> dict[str, Tensor]:
    """Means over ``samples`` draws of Z, to set against the closed forms.

    Returns ``loss`` (scalar), ``gradient_v`` (m,), ``gradient_w`` (n,) and the three estimators'
    coarse gradients (n,) by their names; all from the same draws.

    Raises :class:`ArgumentError` for no samples.
    """
    if samples < 1 or chunk < 1:
        raise ArgumentError(f"samples={samples}, chunk={chunk}: must be at least 1")
    point = vectors(v, w, v_star, w_star)
    sums: dict[str, Any] = {}
    for start in range(0, samples, chunk):
        count = min(chunk, samples - start)
        z = torch.randn(
            count, len(point[0]), len(point[1]), dtype=torch.float64, generator=generator
        )
        found = {
            "loss": sample_loss(*point, z),
            "gradient_v": sample_gradient_v(*point, z),
            "gradient_w": sample_gradient_w(*point, z),
            **{name: sample_coarse_gradient(name, *point, z) for name in ESTIMATORS},
        }
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + value.sum(0)
    return {name: total / samples for name, total in sums.items()}
