"""A fixed-point network as a plain module: the float network's parameters under its own names.

A file, an optimizer and a reader of ``state_dict`` see the folded float network with its weights
on their grids; a forward pass is the fixed-point network's, every result rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from gossamer.quantize.fixed_point import to_codes
from gossamer.quantize.network import FixedPoint

__all__ = ["Emulated"]


class Emulated(nn.Module):
    """Computes what ``net`` does, from codes that it takes from the float network's parameters.

    Args:
        folded: the network that ``net`` was read from; its modules become this one's.
        net: formats and steps; its codes are set anew before each use.
    """

    def __init__(self, folded: fx.GraphModule, net: FixedPoint) -> None:
        super().__init__()
        for name, child in folded.named_children():
            self.add_module(name, child)
        self._net = [net]  # in a list: its buffers are no part of the state

    @torch.no_grad()
    def net(self) -> FixedPoint:
        """The fixed-point network with the present parameters, rounded to their grids."""
        (net,) = self._net
        for step, name in net.program.layers.items():
            module, layer = self.get_submodule(name), net.layer(step)
            assert layer is not None  # every name in program.layers has one
            for what, form in (("weight", layer.form), ("bias", layer.bias_form)):
                value = getattr(module, what)
                if value is not None:
                    codes = to_codes(value.detach().cpu(), form).to(torch.int16)
                    setattr(layer, what, codes)
        return net

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) float -> the simulated network's output, float32."""
        result: Tensor = self.net()(x.cpu())
        return result.to(x.device)
