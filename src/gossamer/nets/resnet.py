"""Residual networks for 32 x 32 images: CIFAR ResNets and wide ResNets.

ResNet-(6n+2): He et al., Deep residual learning (2016), section 4.2, with option A shortcuts
(strided, zero-padded, without parameters). WRN-d-k: Zagoruyko and Komodakis, Wide residual
networks (2016), pre-activation blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.errors import ArgumentError

__all__ = ["ResNet", "WideResNet", "resnet", "wrn"]


def _kaiming_(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Shortcut(nn.Module):
    """Option A: every ``stride``-th pixel, channels padded with zeros on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad = ((outputs - inputs) // 2, outputs - inputs - (outputs - inputs) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H / stride, W / stride)."""
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, *self.pad)) if any(self.pad) else x


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn plus the shortcut, then relu."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = Shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of n blocks, 16, 32 and 64 channels (times ``width``)."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(self, blocks: int, classes: int, channels: int, width: float) -> None:
        super().__init__()
        widths = [max(1, round(w * width)) for w in (16, 32, 64)]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        inputs = widths[0]
        for stage, outputs in enumerate(widths, 1):
            layer = []
            for i in range(blocks):
                layer.append(BasicBlock(inputs, outputs, 2 if stage > 1 and i == 0 else 1))
                inputs = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*layer))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inputs, classes)
        _kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return self.linear(torch.flatten(self.pool(x), 1))


def resnet(
    depth: int,
    *,
    classes: int = 10,
    in_shape: tuple[int, ...] = (3, 32, 32),
    width: float = 1.0,
) -> nn.Module:
    """ResNet-20, 32, 44, 56, 110: any depth 6n + 2.

    Raises :class:`ArgumentError` for another depth.
    """
    if depth < 8 or depth % 6 != 2:
        raise ArgumentError(f"resnet-{depth}: the depth must be 6n + 2 (8, 14, 20, 32, 44, 56)")
    return ResNet((depth - 2) // 6, classes, _channels("resnet", in_shape), width)


class WideBlock(nn.Module):
    """bn-relu-conv, dropout, bn-relu-conv, plus the input or its 1 x 1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.project: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H / stride, W / stride)."""
        y = self.relu1(self.bn1(x))
        # The projection sees the activated input, the identity the raw one, as published.
        kept = x if self.project is None else self.project(y)
        y = self.conv2(self.dropout(self.relu2(self.bn2(self.conv1(y)))))
        return y + kept


class WideResNet(nn.Module):
    """Three stages of n pre-activation blocks, 16k, 32k and 64k channels."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(
        self, blocks: int, widen: int, classes: int, channels: int, dropout: float
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        inputs = 16
        for stage, outputs in enumerate((16 * widen, 32 * widen, 64 * widen), 1):
            layer = []
            for i in range(blocks):
                stride = 2 if stage > 1 and i == 0 else 1
                layer.append(WideBlock(inputs, outputs, stride, dropout))
                inputs = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*layer))
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inputs, classes)
        _kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, classes)."""
        x = self.conv1(x)
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return self.linear(torch.flatten(self.pool(self.relu(self.bn(x))), 1))


def wrn(
    depth: int,
    widen: int,
    *,
    classes: int = 10,
    in_shape: tuple[int, ...] = (3, 32, 32),
    dropout: float = 0.0,
) -> nn.Module:
    """WRN-depth-widen, such as WRN-28-2, WRN-16-8 and WRN-22-8.

    Raises :class:`ArgumentError` unless the depth is 6n + 4 and the widening at least 1.
    """
    if depth < 10 or depth % 6 != 4 or widen < 1:
        raise ArgumentError(
            f"wrn-{depth}-{widen}: the depth must be 6n + 4 (10, 16, 22, 28, 40), the widening "
            "at least 1"
        )
    return WideResNet((depth - 4) // 6, widen, classes, _channels("wrn", in_shape), dropout)


def _channels(name: str, in_shape: tuple[int, ...]) -> int:
    if len(in_shape) != 3 or min(in_shape) < 1:
        raise ArgumentError(
            f"{name} takes in_shape=(channels, height, width), got {tuple(in_shape)}"
        )
    return in_shape[0]
