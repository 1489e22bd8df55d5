"""The runtime's kernels as operators of torch: ``torch.ops.gossamer``.

They have fake implementations, so that ``torch.export`` and ``torch.compile`` carry them; packed
weights travel as tensors (16- and 32-bit unsigned arrays as signed ones of the same bits). For
inference on a CPU: they have no gradient. Threads are torch's. Importing this module registers
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.runtime.kernels import conv, few_bits, gemv, gemv_int8

__all__ = ["few_bits_linear", "sparse_bytes_linear", "sparse_conv2d", "sparse_linear"]

_FEW = 4  # samples from which a batch is a convolution's map
_LIBRARY = torch.library.Library("gossamer", "DEF")


def _operator(function: Callable[..., Any]) -> Any:
    """Define it by its annotations, for CPU tensors.

    As a library's, not a ``custom_op``, whose first call imports the compiler for seconds.
    """
    name = function.__name__
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    _LIBRARY.impl(name, function, "CPU")
    found = getattr(torch.ops.gossamer, name).default
    found.__doc__ = function.__doc__
    return found


def _fake(operator: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """What the operator gives for tensors without values."""
    return torch.library.register_fake(operator.name(), lib=_LIBRARY)


def _array(tensor: Tensor, dtype: Any = None) -> Any:
    found = tensor.detach().contiguous().numpy()
    return found if dtype is None else found.view(dtype)


def _bias(bias: Tensor | None) -> Any:
    return None if bias is None else _array(bias)


@_operator
def sparse_conv2d(
    x: Tensor,
    starts: Tensor,
    order: Tensor,
    taps: Tensor,
    values: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    block: int,
    low: float,
    high: float,
) -> Tensor:
    """Sparse float32 convolution of (batch, channels, height, width), clamped to [low, high].

    ``starts`` to ``values``, ``shape`` to ``block``: of
    :class:`gossamer.runtime.kernels.conv.SparseConv`.
    """
    packed = conv.SparseConv.unchecked(
        shape=tuple(shape),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        element="float32",
        block=block,
        starts=_array(starts),
        order=_array(order),
        taps=_array(taps, np.uint16),
        values=_array(values, np.uint32),
    )
    y = conv.convolve(
        packed, _array(x), bias=_bias(bias), clamp=(low, high), threads=torch.get_num_threads()
    )
    return torch.from_numpy(y)


@_fake(sparse_conv2d)
def _(
    x: Tensor, starts: Tensor, order: Tensor, taps: Tensor, values: Tensor, bias: Tensor | None,
    shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int, block: int, low: float, high: float,
) -> Tensor:  # fmt: skip
    top, left, bottom, right = padding
    n, _, h, w = x.shape
    height = (h + top + bottom - dilation[0] * (shape[2] - 1) - 1) // stride[0] + 1
    width = (w + left + right - dilation[1] * (shape[3] - 1) - 1) // stride[1] + 1
    return torch.empty((n, shape[0], height, width), dtype=x.dtype, device=x.device)


@_operator
def sparse_linear(
    x: Tensor,
    rows: Sequence[Tensor],
    panels: Sequence[Tensor],
    bias: Tensor | None,
    outputs: int,
    block: int,
    low: float,
    high: float,
) -> Tensor:
    """Sparse float32 linear layer of (batch, inputs), clamped to [low, high].

    Args:
        rows: starts, columns, values of :class:`gossamer.runtime.kernels.gemv.SparseRows`, for few
            samples.
        panels: starts, order, taps, values of the same weight as a convolution of kernel 1.
        block: of the latter.
    """
    inputs, threads = x.shape[1], torch.get_num_threads()
    if len(x) < _FEW:
        one = gemv.SparseRows.unchecked(
            shape=(outputs, inputs),
            starts=_array(rows[0]),
            columns=_array(rows[1], np.uint16),
            values=_array(rows[2]),
        )
        each = [
            gemv.gemv(one, row, bias=_bias(bias), clamp=(low, high), threads=threads)
            for row in _array(x)
        ]
        return torch.from_numpy(np.stack(each)) if each else x.new_empty((0, outputs))
    packed = conv.SparseConv.unchecked(
        shape=(outputs, inputs, 1, 1),
        stride=(1, 1),
        padding=(0, 0, 0, 0),
        dilation=(1, 1),
        groups=1,
        element="float32",
        block=block,
        starts=_array(panels[0]),
        order=_array(panels[1]),
        taps=_array(panels[2], np.uint16),
        values=_array(panels[3], np.uint32),
    )
    y = conv.linear(packed, _array(x), bias=_bias(bias), clamp=(low, high), threads=threads)
    return torch.from_numpy(y)


@_fake(sparse_linear)
def _(
    x: Tensor, rows: Sequence[Tensor], panels: Sequence[Tensor], bias: Tensor | None, outputs: int,
    block: int, low: float, high: float,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], outputs))


@_operator
def sparse_bytes_linear(
    x: Tensor,
    starts: Tensor,
    data: Tensor,
    book: Tensor | None,
    order: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    width: int,
    low: float,
    high: float,
) -> Tensor:
    """Sparse 8-bit linear layer of float32 (batch, inputs), clamped to [low, high].

    ``starts`` to ``sums`` and ``width``: of
    :class:`gossamer.runtime.kernels.gemv_int8.SparseBytes`.
    """
    packed = gemv_int8.SparseBytes.unchecked(
        shape=(len(scale), x.shape[1]),
        width=width,
        starts=_array(starts),
        data=_array(data),
        book=None if book is None else _array(book),
        order=_array(order),
        scale=_array(scale),
        sums=_array(sums),
    )
    y = gemv_int8.linear_int8(
        packed, _array(x), bias=_bias(bias), clamp=(low, high), threads=torch.get_num_threads()
    )
    return torch.from_numpy(y)


@_fake(sparse_bytes_linear)
def _(
    x: Tensor, starts: Tensor, data: Tensor, book: Tensor | None, order: Tensor, scale: Tensor,
    sums: Tensor, bias: Tensor | None, width: int, low: float, high: float,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], scale.shape[0]))


@_operator
def few_bits_linear(
    x: Tensor,
    codes: Tensor,
    book: Tensor | None,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    """Ternary (``book`` None) or 4-bit linear layer of float32 (batch, inputs), clamped.

    ``codes`` to ``sums``: of :class:`gossamer.runtime.kernels.few_bits.FewBits`.
    """
    packed = few_bits.FewBits.unchecked(
        shape=(len(scale), x.shape[1]),
        codes=_array(codes),
        book=None if book is None else _array(book),
        scale=_array(scale),
        sums=_array(sums),
    )
    y = few_bits.linear_few_bits(
        packed, _array(x), bias=_bias(bias), clamp=(low, high), threads=torch.get_num_threads()
    )
    return torch.from_numpy(y)


@_fake(few_bits_linear)
def _(
    x: Tensor, codes: Tensor, book: Tensor | None, scale: Tensor, sums: Tensor, bias: Tensor | None,
    low: float, high: float,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], scale.shape[0]))
