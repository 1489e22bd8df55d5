"""Wall clock of lowered convolutions without their zero rows and columns, beside CSR.

Wen et al., NIPS 2016, table 4: AlexNet's convolutions at the published sparsities of two networks
of one error (44.67 and 44.66 % top-1): weights pruned one by one (l1), and rows and columns by
group lasso (SSL). Caffe's lowering: the product of the weight matrix, of each of the layer's
groups, with the lowered input. Weights are random: the time of a product depends on the count and
place of its zeros, not on values. Both are timed against the dense product, in one run, as are the
whole layers, lowering included: :class:`gossamer.structure.lowered.LoweredConv2d` against torch's
own convolution, which does not lower. Milliseconds are the thread's own on one core.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.timing import best_of
from gossamer.experiments import Claim, Context, experiment
from gossamer.structure.lowered import LoweredConv2d

__all__ = ["LAYERS", "Products", "layer", "products", "ssl_speed"]

# name -> inputs, filters (of a group), side of kernel, stride, padding, side of the input, and the
# parts that are zero: of single weights (l1), of columns and rows (SSL)
LAYERS: dict[str, tuple[int, int, int, int, int, int, float, float, float]] = {
    "conv1": (3, 96, 11, 4, 0, 227, 0.676, 0.0, 0.094),
    "conv2": (48, 128, 5, 1, 2, 27, 0.924, 0.632, 0.129),
    "conv3": (256, 384, 3, 1, 1, 13, 0.972, 0.769, 0.406),
    "conv4": (192, 192, 3, 1, 1, 13, 0.966, 0.847, 0.469),
    "conv5": (192, 128, 3, 1, 1, 13, 0.943, 0.807, 0.0),
}


def _gone(count: int, part: float, g: torch.Generator) -> Tensor:
    """Which of them are zero, at random."""
    zero = torch.zeros(count, dtype=torch.bool)
    zero[torch.randperm(count, generator=g)[: round(part * count)]] = True
    return zero


@dataclass(frozen=True)
class Products:
    """A layer's lowered products at the published zeros, and what they are made of.

    Attributes:
        conv: the layer whose rows and columns are zero, of random weights.
        x: one input.
        dense, csr, structured: the calls: the whole product, that of single weights in CSR, and
            that without zero rows and columns.
        matrices: numbers of weights: whole, left one by one, left in rows and columns.
    """

    conv: nn.Conv2d
    x: Tensor
    dense: Callable[[], Tensor]
    csr: Callable[[], Tensor]
    structured: Callable[[], Tensor]
    matrices: tuple[int, int, int]


@torch.no_grad()
def products(name: str, small: int = 1) -> Products:
    """What a layer's products are; of layers ``small`` times as narrow for a smoke run.

    Raises ``RuntimeError`` where a product gives something else than the dense one.
    """
    inputs, filters, kernel, stride, padding, side, single, columns, rows = LAYERS[name]
    inputs, filters = max(1, inputs // small), max(1, filters // small)
    g = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(inputs, filters, kernel, stride, padding, bias=False).eval()
    conv.weight.copy_(torch.randn(conv.weight.shape, generator=g))
    x = torch.randn(1, inputs, side, side, generator=g)
    lowered = nn.functional.unfold(x, kernel, padding=padding, stride=stride)[0]
    dense = conv.weight.flatten(1).clone()
    pruned = dense.masked_fill(_gone(dense.numel(), single, g).view(dense.shape), 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR support beta
        csr = pruned.to_sparse_csr()
    live = (
        (~_gone(len(dense), rows, g)).nonzero()[:, 0],
        (~_gone(dense.shape[1], columns, g)).nonzero()[:, 0],
    )
    matrix, seen = dense[live[0]][:, live[1]].contiguous(), lowered[live[1]].contiguous()
    masked = torch.zeros_like(dense)
    masked[live[0][:, None], live[1]] = matrix
    conv.weight.copy_(masked.view(conv.weight.shape))
    _same((masked @ lowered)[live[0]], matrix @ seen, name)
    _same(pruned @ lowered, csr @ lowered, name)
    return Products(
        conv, x, lambda: dense @ lowered, lambda: csr @ lowered, lambda: matrix @ seen,
        (dense.numel(), csr.values().numel(), matrix.numel()),
    )  # fmt: skip


@torch.no_grad()
def layer(name: str, rounds: int, small: int = 1) -> dict[str, Any]:
    """Milliseconds of one layer's products and of the layer, and the speed-ups.

    Raises ``RuntimeError`` where a product or the lowered layer gives something else.
    """
    made = products(name, small)
    conv, x, short = made.conv, made.x, LoweredConv2d(made.conv)
    _same(conv(x), short(x), name)
    runs = (made.dense, made.csr, made.structured, lambda: conv(x), lambda: short(x))
    best_of(runs, 2)
    # of this thread alone: a call that is longer than a slice of time is interrupted every time
    least = best_of(runs, rounds, clock=time.thread_time)
    whole, unstructured, structured, convolution, layered = (1e3 * s for s in least)
    weights, single, left = made.matrices
    theory = weights / left
    return {
        "name": name,
        "ms": {"dense": whole, "csr": unstructured, "lowered": structured,
               "convolution": convolution, "lowered layer": layered},
        "zeros": {"csr": 1 - single / weights, "lowered": 1 - 1 / theory},
        "theory": theory,
        "lowered": whole / structured,
        "csr": whole / unstructured,
        "of_theory": whole / structured / theory,
        "layer_over_convolution": convolution / layered,
    }  # fmt: skip


def _same(wanted: Tensor, got: Tensor, name: str) -> None:
    if not torch.allclose(wanted, got, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
        raise RuntimeError(f"{name}: the products differ")


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    rows, page = {row["name"]: row for row in raw["layers"]}, "structured-sparsity.5"
    second = rows["conv2"]
    return [
        Claim(
            page,
            "AlexNet conv2, shrunk lowered product: part of the theoretical speed-up "
            f"({second['theory']:.2f} times)",
            second["of_theory"],
            ">=",
            0.7,
        ),
        Claim(
            page,
            "AlexNet conv2, shrunk lowered product over CSR of the same published error: times as "
            "fast",
            second["lowered"] / second["csr"],
            ">",
            1.0,
        ),
    ]


@experiment("ssl-speed", seeds=(0,), judge=_judge)
def ssl_speed(context: Context) -> dict[str, Any]:
    """Structured sparsity 5: lowered products without zero rows and columns, and CSR, by layer."""
    rounds, small = (3, 8) if context.quick else (60, 1)
    rows = context.alone(layer, [(name, rounds, small) for name in LAYERS])
    for row in rows:
        context.say(
            f"{row['name']}: lowered {row['lowered']:.2f}x of {row['theory']:.2f}x, CSR "
            f"{row['csr']:.2f}x"
        )
    return {"layers": rows, "threads": 1}
