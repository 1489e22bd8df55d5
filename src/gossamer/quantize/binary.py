"""Binary weights: BinaryConnect and binary-weight networks.

Courbariaux, Bengio, David, *BinaryConnect*, NIPS 2015, arXiv 1511.00363: w_b = sign(w) (eq. 1),
or +1 with probability clip((w + 1) / 2, 0, 1) (eq. 2-3); the latent weights are clipped to
[-1, 1] after each update (section 2.4), which is ``clip=1.0`` of the method.
Rastegari, Ordonez, Redmon, Farhadi, *XNOR-Net*, ECCV 2016, arXiv 1603.05279, section 3.1:
w_b = alpha sign(w), alpha = mean|w| (eq. 6), for each filter, or for the layer.

sign(0) is +1, so that there are two values. Deviations: the stochastic draw is made once an
optimizer step, and stays at :meth:`finish` (the paper tests with sign(w) or the latent weights);
the gradient of XNOR-Net's scale is left out, it passes straight through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.core.quantizer import checked

__all__ = ["scaled", "sign", "stochastic"]


@torch.no_grad()
def sign(weight: Tensor) -> Tensor:
    """BinaryConnect, deterministic: -1 below zero, else 1.

    >>> sign(torch.tensor([-0.2, 0.0, 3.0])).tolist()
    [-1.0, 1.0, 1.0]

    Raises :class:`ArgumentError`, as all of these do, for NaN and infinity.
    """
    return torch.where(checked(weight) < 0, -1.0, 1.0).to(weight.dtype)


@torch.no_grad()
def stochastic(weight: Tensor, *, generator: torch.Generator) -> Tensor:
    """BinaryConnect, stochastic: 1 with probability clip((w + 1) / 2, 0, 1), else -1.

    Drawn on the generator's device.
    """
    uniform = torch.rand(weight.shape, generator=generator, device=generator.device)
    up = uniform.to(weight.device) < (checked(weight) + 1) / 2
    return torch.where(up, 1.0, -1.0).to(weight.dtype)


@torch.no_grad()
def scaled(weight: Tensor, *, per_filter: bool) -> Tensor:
    """Binary-weight network: sign(w) times mean|w|, of each filter (first dimension) or of all.

    >>> scaled(torch.tensor([[1.0, -3.0], [4.0, 4.0]]), per_filter=True).tolist()
    [[2.0, -2.0], [4.0, 4.0]]

    Raises :class:`ArgumentError` for NaN and infinity, and for filters of a vector.
    """
    if not weight.numel():
        return weight.clone()
    weight = checked(weight)
    size = weight.abs()
    if per_filter and weight.ndim < 2:
        raise ArgumentError(
            f"per_filter=True needs two or more dimensions, the weight has {weight.ndim}; "
            "use per_filter=False"
        )
    alpha = size.mean(tuple(range(1, weight.ndim)), keepdim=True) if per_filter else size.mean()
    return torch.where(weight < 0, -alpha, alpha)
