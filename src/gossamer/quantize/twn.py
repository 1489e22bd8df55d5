"""Ternary weight networks: three values a layer, one scale, by formula.

Li, Zhang, Liu, *Ternary Weight Networks*, 2016, arXiv 1605.04711.

- Eq. 3-6: ternary codes by the threshold Delta = .7 mean|w|, the closed form that is near the
  least-squares one for Gaussian weights; a code is sign(w) where |w| > Delta, else 0.
- Eq. 4: alpha = mean |w| over the weights beyond Delta, least squares for those codes.

No deviations. Gradients pass straight through to the latent weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.quantizer import checked

__all__ = ["ternary"]

FACTOR = 0.7  # of mean|w|: between the paper's 2/3 for uniform and 3/4 for Gaussian weights


@torch.no_grad()
def ternary(weight: Tensor) -> Tensor:
    """alpha * {-1, 0, 1}, of the weight's shape and dtype; one scale for the whole tensor.

    Raises :class:`ArgumentError` for NaN and infinity.

    >>> ternary(torch.tensor([1.0, -0.5, 0.1, 0.0])).tolist()
    [0.75, -0.75, 0.0, 0.0]
    """
    if not weight.numel():
        return weight.clone()
    weight = checked(weight)
    size = weight.abs()
    beyond = size > FACTOR * size.mean()
    count = beyond.sum()
    alpha = torch.where(beyond, size, 0).sum() / count.clamp(min=1)
    return torch.where(beyond, torch.where(weight < 0, -alpha, alpha), 0)
