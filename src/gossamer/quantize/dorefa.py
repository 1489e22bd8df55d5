"""DoReFa weights: k bits on a uniform grid in [-1, 1].

Zhou, Wu, Ni, Zhou, Wen, Zou, *DoReFa-Net*, 2016, arXiv 1606.06160, section 2.3.

- Eq. 9: w_k = 2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1, with
  quantize_k(x) = round((2^k - 1) x) / (2^k - 1) (eq. 5).
- Eq. 7-8, k = 1: sign(w) E|w|, with the gradient straight through.
- Backward: straight through the rounding, then the derivative of what is under it; the maximum is
  a constant there, as in the authors' code.

The 2^k values have no zero. No deviations; sign(0) is +1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.core.quantizer import checked

__all__ = ["quantize"]


@torch.no_grad()
def quantize(weight: Tensor, *, bits: int) -> tuple[Tensor, Tensor | None]:
    """Values of at most ``2**bits`` levels, and the factor on the gradient (None: 1).

    >>> value, slope = quantize(torch.tensor([0.0, 5.0, -5.0, 0.1]), bits=2)
    >>> [round(v, 4) for v in value.tolist()]
    [0.3333, 1.0, -1.0, 0.3333]

    Raises :class:`ArgumentError` for bits outside 1 to 8, NaN, infinity, and a weight of zeros.
    """
    if not 1 <= bits <= 8:
        raise ArgumentError(f"bits={bits} is outside 1 to 8")
    weight = checked(weight)
    if bits == 1:
        mean = weight.abs().mean()
        return torch.where(weight < 0, -mean, mean), None
    levels = (1 << bits) - 1
    squeezed = torch.tanh(weight)
    largest = squeezed.abs().max()
    if not largest:
        raise ArgumentError("the weight is all zeros: tanh(w) / max|tanh(w)| is 0 / 0; exclude it")
    # floor(x + 1/2): torch rounds halves to even, which splits a weight of 0 by the bit width
    code = torch.floor((squeezed / (2 * largest) + 0.5) * levels + 0.5)
    return (2 * code - levels) / levels, (1 - squeezed.square()) / largest
