"""A linear layer as two, by truncated singular value decomposition.

Qiu et al., FPGA 2016, section 4: ``W (out, in) = U S V^T`` cut to its ``rank`` largest singular
values is the product of ``(out, rank)`` and ``(rank, in)``, the closest one in the Frobenius norm
(Eckart and Young 1936). VGG-16's first fully-connected layer, 25088 x 4096 at rank 500, shrinks
7.04 times. The singular values are shared evenly, sqrt(S) on either side, so that both factors
have entries of like size and one number format each; the paper does not say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core import access
from gossamer.core.errors import ArgumentError

__all__ = ["SVDSize", "factorize", "svd_size", "sweep"]


@dataclass(frozen=True)
class SVDSize:
    """Weights of a linear layer, without bias, before and after.

    Attributes:
        rank: of the product.
        before, after: weights of the layer, and of its two factors.
        error: the part of ``|W|_F^2`` that is lost, in [0, 1]; None where no values were given.
    """

    rank: int
    before: int
    after: int
    error: float | None = None

    @property
    def ratio(self) -> float:
        """before / after; below 1 the factors are larger than the layer."""
        return self.before / self.after


def svd_size(inputs: int, outputs: int, rank: int) -> SVDSize:
    """Weights before and after.

    >>> round(svd_size(25088, 4096, 500).ratio, 2)
    7.04

    Raises :class:`ArgumentError` for a rank outside 1 to the smaller side.
    """
    if not 1 <= rank <= min(inputs, outputs):
        raise ArgumentError(
            f"rank={rank} is outside 1 to {min(inputs, outputs)} for {inputs} inputs and "
            f"{outputs} outputs"
        )
    return SVDSize(rank, inputs * outputs, rank * (inputs + outputs))


def factorize(layer: nn.Linear, rank: int) -> nn.Sequential:
    """Two linear layers, ``in -> rank`` without bias and ``rank -> out`` with the layer's bias.

    The layer stays as it is; dtype and device are kept.

    Raises :class:`ArgumentError` for another module, a weight that is computed from others, a
    rank out of range, and NaN or infinity.
    """
    u, s, v = _decompose(layer)
    svd_size(layer.in_features, layer.out_features, rank)
    half = s[:rank].sqrt()
    like = layer.weight
    first = nn.Linear(layer.in_features, rank, bias=False).to(like)
    second = nn.Linear(rank, layer.out_features, bias=layer.bias is not None).to(like)
    with torch.no_grad():
        first.weight.copy_(half[:, None] * v[:rank])
        second.weight.copy_(u[:, :rank] * half)
        if layer.bias is not None:
            second.bias.copy_(layer.bias)
    return nn.Sequential(first, second)


def sweep(layer: nn.Linear, ranks: Iterable[int]) -> list[SVDSize]:
    """Size and relative squared error of the weights at each rank, from one decomposition.

    Raises as :func:`factorize`, and for no ranks.
    """
    _, s, _ = _decompose(layer)
    sizes = [svd_size(layer.in_features, layer.out_features, rank) for rank in ranks]
    if not sizes:
        raise ArgumentError("ranks is empty; give at least one")
    energy = s.square()
    whole = float(energy.sum())
    return [
        SVDSize(size.rank, size.before, size.after, float(energy[size.rank :].sum()) / (whole or 1))
        for size in sizes
    ]


def _decompose(layer: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(layer, nn.Linear):
        raise ArgumentError(f"layer is {type(layer).__name__}; give an nn.Linear")
    access.check_plain(layer, "", "factorized")
    weight = layer.weight.detach().double()
    if not bool(torch.isfinite(weight).all()):
        raise ArgumentError("the layer's weight holds NaN or infinity; clean it first")
    return torch.linalg.svd(weight, full_matrices=False)
