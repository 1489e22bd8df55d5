"""How many principal components a layer's filters need.

Principal component analysis of filters as Wen et al. (*Learning Structured Sparsity in Deep Neural
Networks*, NIPS 2016) and their published code use it: the filters are the variables, so that each
is its own mean weight and a sum of the same few filters of its length. The error of that sum is
what a low rank of the layer costs before anything is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError

__all__ = ["components_for", "reconstruction_errors"]


@torch.no_grad()
def reconstruction_errors(weight: Tensor) -> list[float]:
    """Relative error of a layer's filters made again from k principal components, k = 0, 1, ...

    ||W - W_k|| / ||W - W_0||, where W_0 has each filter's mean weight throughout: 1 for k = 0, 0
    for as many components as there are independent filters. No other k filters do better.

    Args:
        weight: (filters, ...), of any shape behind. For a convolution's channels give
            ``weight.transpose(0, 1)``, for its 2-D filters ``weight.flatten(0, 1)``.

    Returns min(filters, weights of one) + 1 errors; a weight without any variation is 0 throughout.
    Raises :class:`ArgumentError` for a weight of one dimension, an empty one, or one with NaN or
    infinity.

    >>> reconstruction_errors(torch.tensor([[4.0, -4.0, 0.0, 0.0], [0.0, 0.0, 3.0, -3.0]]))
    [1.0, 0.6, 0.0]
    """
    if weight.ndim < 2 or not weight.numel():
        raise ArgumentError(
            f"weight of shape {tuple(weight.shape)} has no filters; give (filters, ...)"
        )
    rows = weight.detach().double().flatten(1)
    if not rows.isfinite().all():
        raise ArgumentError("weight has NaN or infinity; there is nothing to analyse")
    values = torch.linalg.svdvals(rows - rows.mean(1, keepdim=True))
    # what is rounding alone is no component
    values[values <= values.max() * max(rows.shape) * torch.finfo(torch.float64).eps] = 0.0
    left = torch.cat([values.square(), values.new_zeros(1)]).flip(0).cumsum(0).flip(0)
    whole = float(left[0])
    return (
        [0.0] * len(left) if whole == 0 else [round(e, 12) for e in (left / whole).sqrt().tolist()]
    )


def components_for(errors: list[float], energy: float) -> int:
    """The fewest components that hold so much of the energy, a fraction in (0, 1].

    ``errors``: of :func:`reconstruction_errors`; the energy that k hold is 1 - errors[k]^2.

    >>> components_for([1.0, 0.6, 0.0], 0.64), components_for([1.0, 0.6, 0.0], 0.65)
    (1, 2)
    """
    if not 0 < energy <= 1:
        raise ArgumentError(f"energy={energy} must lie in (0, 1]")
    return next(k for k, e in enumerate(errors) if 1 - e * e >= energy - 1e-12)
