"""LeNets and perceptrons without their dead units, by slicing: smaller layers, the same outputs."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError

__all__ = ["alive", "smaller", "widths"]


def _layers(net: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def _read(layer: nn.Conv2d | nn.Linear, count: int) -> Tensor:
    """(outputs, units before, weights of each): behind a flatten a unit has several inputs."""
    return layer.weight.detach().reshape(len(layer.weight), count, -1)


def alive(net: nn.Module) -> list[Tensor]:
    """For each layer but the last, which of its units are computed from something and read."""
    layers = _layers(net)
    found = []
    for layer, after in pairwise(layers):
        made = layer.weight.detach().flatten(1).any(1)
        found.append(made & _read(after, len(made)).any(0).any(1))
    return found


def widths(net: nn.Module) -> list[tuple[int, int]]:
    """Rows and columns of each layer's matrix."""
    return [(len(x.weight), x.weight[0].numel()) for x in _layers(net)]


@torch.no_grad()
def smaller(net: nn.Module, example: Tensor) -> nn.Module:
    """The network without dead units: layers in a row, ReLU after each hidden one.

    A unit without weights puts out relu(bias) everywhere, which goes into the next bias; without
    padding that is exact.

    Raises :class:`GossamerError` when outputs on the example differ by more than 1e-5 of the
    largest.
    """
    made = copy.deepcopy(net)
    layers, keeps = _layers(made), alive(net)
    for (layer, after), keep in zip(pairwise(layers), keeps, strict=True):
        assert layer.bias is not None  # ours all have
        assert after.bias is not None
        read = _read(after, len(keep))
        constant = layer.bias.relu() * ~layer.weight.flatten(1).any(1)
        after.bias += (read.sum(2) * constant).sum(1)
        layer.weight = nn.Parameter(layer.weight[keep].clone())
        layer.bias = nn.Parameter(layer.bias[keep].clone())
        left = after.weight.reshape(len(after.weight), len(keep), -1)[:, keep]
        shape = (len(after.weight), -1, *after.weight.shape[2:])
        after.weight = nn.Parameter(left.reshape(shape).clone())
        if isinstance(layer, nn.Conv2d):
            layer.out_channels = len(layer.weight)
        else:
            layer.out_features = len(layer.weight)
        if isinstance(after, nn.Conv2d):
            after.in_channels = after.weight.shape[1]
        else:
            after.in_features = after.weight.shape[1]
    modes = net.training
    net.eval(), made.eval()
    before, now = net(example), made(example)
    net.train(modes), made.train(modes)
    off = float((before - now).abs().max() / before.abs().max())
    if not off <= 1e-5:
        raise GossamerError(f"the smaller network's outputs differ by {off:g} of the largest")
    return made
