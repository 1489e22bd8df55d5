"""Training in bfloat16 where it is safe: on a CPU with such instructions half the time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Mixed"]


class Mixed(nn.Module):
    """Run a network with channels last under torch's autocast; its weights stay float32.

    The weights are those of ``net`` itself, which runs in float32 where it is called directly.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Outputs in float32."""
        with torch.autocast("cpu", torch.bfloat16):
            outputs: Tensor = self.net(images.contiguous(memory_format=torch.channels_last))
        return outputs.float()
