"""Small classics: perceptrons, the LeNets and the lottery paper's Conv-2/4/6.

Layer names follow the published Caffe models (``ip1`` is an inner product). Weights start from
the Gaussian Glorot distribution, biases from zero (Frankle and Carbin 2019).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from gossamer.core.errors import ArgumentError

__all__ = ["conv_n", "glorot_", "image", "lenet_5", "lenet_300_100", "mlp"]


@torch.no_grad()
def glorot_(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Draw every weight from N(0, 2 / (fan_in + fan_out)), set biases to zero; in place.

    ``generator``: None draws from torch's global one. Batch-norm layers are left alone.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            nn.init.xavier_normal_(module.weight, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    return model


def _sequential(layers: Sequence[tuple[str, nn.Module]]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def mlp(
    *,
    classes: int = 10,
    in_shape: tuple[int, ...] | None = None,
    sizes: Sequence[int] | None = None,
    prefix: str = "fc",
    dropout: float = 0.0,
) -> nn.Module:
    """A perceptron with ReLU between its layers, ``fc1``, ``fc2``, ...

    Args:
        dropout: rate after each hidden layer; the layers are there at 0 too, so that
            retraining can set their rate.
        sizes: all widths, input and output included; None: the inputs of ``in_shape`` (64
            without one), 300, 100, ``classes``.

    >>> [tuple(p.shape) for n, p in mlp(sizes=(64, 300, 10)).named_parameters()]
    [(300, 64), (300,), (10, 300), (10,)]
    """
    inputs = math.prod(in_shape) if in_shape is not None else None
    if sizes is None:
        sizes = (inputs or 64, 300, 100, classes)
    if len(sizes) < 2 or min(sizes) < 1:
        raise ArgumentError(f"sizes={tuple(sizes)} needs two or more widths of at least 1")
    if inputs is not None and inputs != sizes[0]:
        raise ArgumentError(
            f"sizes={tuple(sizes)} takes {sizes[0]} inputs, in_shape={in_shape} has {inputs}"
        )
    layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for i in range(1, len(sizes)):
        layers.append((f"{prefix}{i}", nn.Linear(sizes[i - 1], sizes[i])))
        if i < len(sizes) - 1:
            layers += [(f"relu{i}", nn.ReLU()), (f"drop{i}", nn.Dropout(dropout))]
    return glorot_(_sequential(layers))


def lenet_300_100(
    *, classes: int = 10, in_shape: tuple[int, ...] = (1, 28, 28), dropout: float = 0.0
) -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998): ``ip1``, ``ip2``, ``ip3``; 266,200 weights on MNIST."""
    return mlp(sizes=(math.prod(in_shape), 300, 100, classes), prefix="ip", dropout=dropout)


def lenet_5(
    *, classes: int = 10, in_shape: tuple[int, ...] = (1, 28, 28), dropout: float = 0.0
) -> nn.Module:
    """Caffe's LeNet: conv 20, pool, conv 50, pool, 500, classes; 430,500 weights on MNIST.

    Deviation: a ReLU after each convolution, as in every PyTorch rendering; Caffe has one after
    ``ip1`` only.

    Raises :class:`ArgumentError` for images smaller than 16 x 16.
    """
    channels, height, width = image("lenet-5", in_shape, least=16)
    h, w = ((((s - 4) // 2) - 4) // 2 for s in (height, width))
    return glorot_(
        _sequential(
            [
                ("conv1", nn.Conv2d(channels, 20, 5)),
                ("relu1", nn.ReLU()),
                ("pool1", nn.MaxPool2d(2)),
                ("conv2", nn.Conv2d(20, 50, 5)),
                ("relu2", nn.ReLU()),
                ("pool2", nn.MaxPool2d(2)),
                ("flatten", nn.Flatten()),
                ("ip1", nn.Linear(50 * h * w, 500)),
                ("relu3", nn.ReLU()),
                ("drop1", nn.Dropout(dropout)),
                ("ip2", nn.Linear(500, classes)),
            ]
        )
    )


def conv_n(
    depth: int,
    *,
    classes: int = 10,
    in_shape: tuple[int, ...] = (3, 32, 32),
    filters: int = 64,
    hidden: int = 256,
) -> nn.Module:
    """Conv-2, Conv-4 or Conv-6 of the lottery paper (Frankle and Carbin 2019, figure 2).

    Pairs of 3 x 3 convolutions, each pair pooled, of ``filters``, 2 ``filters`` and 4
    ``filters`` channels; then fully connected layers of ``hidden``, ``hidden`` and ``classes``.
    """
    if depth not in (2, 4, 6):
        raise ArgumentError(f"conv-{depth} is not one of conv-2, conv-4, conv-6")
    if filters < 1 or hidden < 1:
        raise ArgumentError(f"filters={filters} and hidden={hidden} must be at least 1")
    channels, height, width = image(f"conv-{depth}", in_shape, least=2 ** (depth // 2))
    layers: list[tuple[str, nn.Module]] = []
    for i in range(depth):
        out = filters * 2 ** (i // 2)
        layers += [
            (f"conv{i + 1}", nn.Conv2d(channels, out, 3, padding=1)),
            (f"relu{i + 1}", nn.ReLU()),
        ]
        if i % 2:
            layers.append((f"pool{i // 2 + 1}", nn.MaxPool2d(2)))
        channels = out
    shrink = 2 ** (depth // 2)
    features = channels * (height // shrink) * (width // shrink)
    layers += [
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(features, hidden)),
        (f"relu{depth + 1}", nn.ReLU()),
        ("fc2", nn.Linear(hidden, hidden)),
        (f"relu{depth + 2}", nn.ReLU()),
        ("fc3", nn.Linear(hidden, classes)),
    ]
    return glorot_(_sequential(layers))


def image(name: str, in_shape: tuple[int, ...], *, least: int) -> tuple[int, int, int]:
    """Check that ``in_shape`` is (channels, height, width) of at least so many pixels a side."""
    if len(in_shape) != 3 or min(in_shape[1:]) < least or in_shape[0] < 1:
        raise ArgumentError(
            f"{name} takes in_shape=(channels, height, width) of at least {least} x {least} "
            f"pixels, got {tuple(in_shape)}"
        )
    return in_shape[0], in_shape[1], in_shape[2]
