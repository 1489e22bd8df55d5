"""Shared values: codes into a code book. Code 0 is zero, in every quantizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError

__all__ = ["Quantized"]


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor as small integers and the values they stand for.

    Attributes:
        codes: integers of the tensor's shape, in ``[0, len(codebook))``.
        codebook: ``(K,)`` floating point; ``codebook[0]`` is exactly 0.

    >>> Quantized(torch.tensor([[0, 2]]), torch.tensor([0.0, -1.0, 0.5])).dequantize()
    tensor([[0.0000, 0.5000]])

    Raises :class:`ArgumentError` when the code book does not begin with 0, is not finite, or a
    code is out of its range.
    """

    codes: Tensor
    codebook: Tensor

    def __post_init__(self) -> None:
        """Validate at the door."""
        if self.codebook.ndim != 1 or not self.codebook.is_floating_point():
            raise ArgumentError(
                f"codebook must be 1-D floating point, got {self.codebook.dtype} "
                f"of shape {tuple(self.codebook.shape)}"
            )
        if self.codebook.numel() == 0 or self.codebook[0] != 0:
            raise ArgumentError("codebook[0] must be exactly 0: code 0 stands for zero")
        if not torch.isfinite(self.codebook).all():
            raise ArgumentError("codebook holds NaN or infinity")
        if self.codes.is_floating_point() or self.codes.dtype == torch.bool:
            raise ArgumentError(f"codes must be integers, got {self.codes.dtype}")
        if self.codes.numel():
            low, high = int(self.codes.min()), int(self.codes.max())
            if low < 0 or high >= self.codebook.numel():
                raise ArgumentError(
                    f"codes span [{low}, {high}], the codebook has {self.codebook.numel()} entries"
                )

    @property
    def bits(self) -> int:
        """Bits of a fixed-width code."""
        return max(1, (self.codebook.numel() - 1).bit_length())

    def dequantize(self) -> Tensor:
        """The values: same shape as ``codes``, dtype of ``codebook``."""
        return self.codebook[self.codes.long()]

    @classmethod
    def of(cls, tensor: Tensor) -> Quantized:
        """The exact code book of a tensor's distinct values: zero first, then ascending.

        Negative zero counts as zero.
        """
        values = torch.unique(tensor.detach(), sorted=True)
        book = torch.cat([values.new_zeros(1), values[values != 0]])
        codes = torch.searchsorted(book[1:].contiguous(), tensor.detach().contiguous()) + 1
        codes = torch.where(tensor == 0, torch.zeros_like(codes), codes)
        return cls(codes, book)
