"""The published convolutional networks: Caffe's ConvNet, CifarNet, AlexNet, VGG for CIFAR."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.errors import ArgumentError
from gossamer.nets.classic import glorot_, image

__all__ = ["WithinChannelNorm", "alexnet", "cifarnet", "convnet", "vgg"]


class WithinChannelNorm(nn.Module):
    """Caffe's LRN with ``norm_region: WITHIN_CHANNEL``: x / (1 + alpha * mean of x^2)^beta.

    The mean is over ``size`` x ``size`` pixels of the same channel, zeros beyond the border.
    """

    def __init__(self, size: int, alpha: float, beta: float) -> None:
        super().__init__()
        self.size, self.alpha, self.beta = size, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        mean = F.avg_pool2d(x * x, self.size, stride=1, padding=self.size // 2)
        return x * (1 + self.alpha * mean).pow(-self.beta)


def _pooled(size: int, times: int) -> int:
    # 3 x 3 windows, stride 2, the last one reaching over the border: ceil((size - 3) / 2) + 1
    for _ in range(times):
        size = -(-(size - 3) // 2) + 1
    return size


def convnet(*, classes: int = 10, in_shape: tuple[int, ...] = (3, 32, 32)) -> nn.Module:
    """Caffe's cifar10_full: 32-32-64 convolutions of 5 x 5, pooling, LRN, one inner product.

    Deviation: Gaussian Glorot initial weights; Caffe's standard deviations (.0001, .01, .01, .01)
    need its long schedule to get going.
    """
    c, h, w = image("convnet", in_shape, least=8)
    features = 64 * _pooled(h, 3) * _pooled(w, 3)
    return glorot_(
        nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(c, 32, 5, padding=2),
                pool1=nn.MaxPool2d(3, 2, ceil_mode=True),
                relu1=nn.ReLU(),
                norm1=WithinChannelNorm(3, 5e-5, 0.75),
                conv2=nn.Conv2d(32, 32, 5, padding=2),
                relu2=nn.ReLU(),
                pool2=nn.AvgPool2d(3, 2, ceil_mode=True),
                norm2=WithinChannelNorm(3, 5e-5, 0.75),
                conv3=nn.Conv2d(32, 64, 5, padding=2),
                relu3=nn.ReLU(),
                pool3=nn.AvgPool2d(3, 2, ceil_mode=True),
                flatten=nn.Flatten(),
                ip1=nn.Linear(features, classes),
            )
        )
    )


def cifarnet(*, classes: int = 10, in_shape: tuple[int, ...] = (3, 24, 24)) -> nn.Module:
    """CifarNet as in TensorFlow's tutorial: two convolutions of 64, LRN, 384, 192, classes.

    TernGrad (Wen et al. 2017) trains it on 24 x 24 crops.
    """
    c, h, w = image("cifarnet", in_shape, least=8)
    # tf.nn.lrn(depth_radius=4, bias=1, alpha=.001 / 9, beta=.75); torch divides alpha by the size.
    features = 64 * _pooled(h, 2) * _pooled(w, 2)
    return glorot_(
        nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(c, 64, 5, padding=2),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(3, 2, ceil_mode=True),
                norm1=nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1),
                conv2=nn.Conv2d(64, 64, 5, padding=2),
                relu2=nn.ReLU(),
                norm2=nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1),
                pool2=nn.MaxPool2d(3, 2, ceil_mode=True),
                flatten=nn.Flatten(),
                fc1=nn.Linear(features, 384),
                relu3=nn.ReLU(),
                fc2=nn.Linear(384, 192),
                relu4=nn.ReLU(),
                fc3=nn.Linear(192, classes),
            )
        )
    )


def alexnet(
    *,
    classes: int = 1000,
    in_shape: tuple[int, ...] = (3, 224, 224),
    groups: int = 2,
    dropout: float = 0.5,
) -> nn.Module:
    """AlexNet (Krizhevsky, Sutskever and Hinton 2012) with its grouped convolutions.

    Takes 227 x 227 pixels, as Caffe's, or 224 x 224 (padded by 2, with the same feature sizes);
    60,965,224 parameters.

    Args:
        groups: of conv2, conv4 and conv5; 2 as published, 1 joins them.
        dropout: fraction dropped before fc6 and fc7's outputs, as published .5.
    """
    c, h, w = image("alexnet", in_shape, least=63)
    padding = 0 if (h, w) == (227, 227) else 2

    def final(size: int) -> int:
        size = (size + 2 * padding - 11) // 4 + 1
        for _ in range(3):
            size = (size - 3) // 2 + 1
        return size

    def norm() -> nn.Module:
        return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1)

    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(c, 96, 11, stride=4, padding=padding),
            relu1=nn.ReLU(),
            norm1=norm(),
            pool1=nn.MaxPool2d(3, 2),
            conv2=nn.Conv2d(96, 256, 5, padding=2, groups=groups),
            relu2=nn.ReLU(),
            norm2=norm(),
            pool2=nn.MaxPool2d(3, 2),
            conv3=nn.Conv2d(256, 384, 3, padding=1),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(384, 384, 3, padding=1, groups=groups),
            relu4=nn.ReLU(),
            conv5=nn.Conv2d(384, 256, 3, padding=1, groups=groups),
            relu5=nn.ReLU(),
            pool5=nn.MaxPool2d(3, 2),
            flatten=nn.Flatten(),
            fc6=nn.Linear(256 * final(h) * final(w), 4096),
            relu6=nn.ReLU(),
            drop6=nn.Dropout(dropout),
            fc7=nn.Linear(4096, 4096),
            relu7=nn.ReLU(),
            drop7=nn.Dropout(dropout),
            fc8=nn.Linear(4096, classes),
        )
    )
    return glorot_(model)


_VGG = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(
    depth: int,
    *,
    classes: int = 10,
    in_shape: tuple[int, ...] = (3, 32, 32),
    width: float = 1.0,
) -> nn.Module:
    """VGG for CIFAR: batch-norm after each 3 x 3 convolution, five pools, one linear layer.

    Layers ``conv1_1``, ``bn1_1``, ... ``conv5_3``, ``fc`` (Simonyan and Zisserman 2015, with the
    classifier of Liu et al. 2017). ``width`` scales the channels.
    """
    if depth not in _VGG:
        raise ArgumentError(f"vgg-{depth} is not one of {', '.join(f'vgg-{d}' for d in _VGG)}")
    channels, h, w = image("vgg", in_shape, least=32)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, (count, full) in enumerate(
        zip(_VGG[depth], (64, 128, 256, 512, 512), strict=True), 1
    ):
        out = max(1, round(full * width))
        for i in range(1, count + 1):
            # Batch-norm takes the bias's part.
            layers[f"conv{stage}_{i}"] = nn.Conv2d(channels, out, 3, padding=1, bias=False)
            layers[f"bn{stage}_{i}"] = nn.BatchNorm2d(out)
            layers[f"relu{stage}_{i}"] = nn.ReLU()
            channels = out
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels * (h // 32) * (w // 32), classes)
    model = nn.Sequential(layers)
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
