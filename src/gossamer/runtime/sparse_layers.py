"""Layers that execute sparse and ternary weights as they are, in place of a network's own.

:class:`SparseLinear`, :class:`SparseConv2d` and :class:`TernaryLinear` are modules for inference on
a CPU; :func:`sparsify` puts them where they pay and compares what the network gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core import nest
from gossamer.core.errors import ArgumentError, one_of
from gossamer.core.modes import evaluating
from gossamer.runtime import operators
from gossamer.runtime.kernels import conv, few_bits, gemv, gemv_int8
from gossamer.runtime.kernels.arrays import LINEAR, Clamp

__all__ = ["Replaced", "SparseConv2d", "SparseLinear", "TernaryLinear", "sparsify"]

_EXACT = 1e-4  # of the largest output: float32 layers
_WHOLE = 1e-3  # of the network's largest output
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Packed(nn.Module):
    """Base: arrays as buffers, a bias, and the clamp of the outputs."""

    def __init__(self, bias: Tensor | None, clamp: Clamp) -> None:
        super().__init__()
        self.clamp = (float(clamp[0]), float(clamp[1]))
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def _keep(self, name: str, array: Any) -> None:
        """A buffer with the array's bits: unsigned words become signed ones."""
        if array is not None:
            signed = {np.dtype(np.uint16): np.int16, np.dtype(np.uint32): np.int32}
            array = array.view(signed.get(array.dtype, array.dtype)).copy()
        self.register_buffer(name, None if array is None else torch.from_numpy(array))


def _weight(weight: Tensor, dims: int) -> Any:
    if weight.dim() != dims or weight.device.type != "cpu":
        raise ArgumentError(
            f"weight must have {dims} dimensions on the CPU, not {tuple(weight.shape)} on "
            f"{weight.device}"
        )
    return np.ascontiguousarray(weight.detach().float().numpy())


class SparseConv2d(_Packed):
    """A convolution that skips the zeros of its weight, in float32.

    Args:
        weight: (output channels, channels of a group, height, width), on the CPU.
        bias: (output channels), or None.
        stride, padding, dilation, groups: as of ``nn.Conv2d``; ``padding`` also
            (top, left, bottom, right).
        clamp: least and greatest output, such as (0, inf) for ReLU.

    Input and output: float32, (batch, channels, height, width).

    Raises :class:`ArgumentError` as :func:`gossamer.runtime.kernels.conv.pack_conv` does.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        clamp: Clamp = LINEAR,
    ) -> None:
        super().__init__(bias, clamp)
        packed = conv.pack_conv(
            _weight(weight, 4), stride=stride, padding=padding, dilation=dilation, groups=groups
        )
        for name in ("starts", "order", "taps", "values"):
            self._keep(name, getattr(packed, name))
        self.shape, self.stride, self.padding = packed.shape, packed.stride, packed.padding
        self.dilation, self.groups, self.block = packed.dilation, packed.groups, packed.block
        self.density = len(packed.taps) / float(np.prod(packed.shape))

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of a batch."""
        return operators.sparse_conv2d(
            x, self.starts, self.order, self.taps, self.values, self.bias, self.shape, self.stride,
            self.padding, self.dilation, self.groups, self.block, *self.clamp,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Shape and density."""
        return f"{self.shape}, density={self.density:.3g}"


class _Linear(_Packed):
    """Base of linear layers: any leading dimensions."""

    outputs: int

    def _rows(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return self._rows(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.outputs)


class SparseLinear(_Linear):
    """A linear layer that skips the zeros of its weight.

    Args:
        weight: (outputs, inputs), on the CPU.
        bias: (outputs), or None.
        precision: ``float32``, or ``int8``: bytes with a scale a row, activations of seven bits
            whose scale follows each sample.
        clamp: least and greatest output.

    Raises :class:`ArgumentError` for a weight that cannot be packed.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        precision: str = "float32",
        clamp: Clamp = LINEAR,
    ) -> None:
        super().__init__(bias, clamp)
        one_of("precision", precision, ("float32", "int8"))
        dense = _weight(weight, 2)
        self.precision = precision
        self.outputs, self.inputs = dense.shape
        self.density = float((dense != 0).mean())
        if precision == "int8":
            packed = gemv_int8.pack_bytes(dense)
            self.width = packed.width
            for name in ("starts", "data", "book", "order", "scale", "sums"):
                self._keep(name, getattr(packed, name))
            return
        rows = gemv.pack_rows(dense)
        panels = conv.pack_conv(dense[:, :, None, None])
        self.block = panels.block
        for name in ("starts", "columns", "values"):
            self._keep(f"row_{name}", getattr(rows, name))
        for name in ("starts", "order", "taps", "values"):
            self._keep(f"panel_{name}", getattr(panels, name))

    def _rows(self, x: Tensor) -> Tensor:
        if self.precision == "int8":
            return operators.sparse_bytes_linear(
                x, self.starts, self.data, self.book, self.order, self.scale, self.sums, self.bias,
                self.width, *self.clamp,
            )  # fmt: skip
        return operators.sparse_linear(
            x,
            [self.row_starts, self.row_columns, self.row_values],
            [self.panel_starts, self.panel_order, self.panel_taps, self.panel_values],
            self.bias,
            self.outputs,
            self.block,
            *self.clamp,
        )

    def extra_repr(self) -> str:
        """Shape, precision and density."""
        return f"{self.inputs}, {self.outputs}, {self.precision}, density={self.density:.3g}"


class TernaryLinear(_Linear):
    """A linear layer whose rows are ``scale * {-1, 0, 1}``, 2 bits a weight.

    Activations are bytes whose scale follows each sample.

    Raises :class:`ArgumentError` for a row of other values, naming it.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, clamp: Clamp = LINEAR
    ) -> None:
        super().__init__(bias, clamp)
        packed = few_bits.pack_ternary(_weight(weight, 2))
        self.outputs, self.inputs = packed.shape
        for name in ("codes", "scale", "sums"):
            self._keep(name, getattr(packed, name))

    def _rows(self, x: Tensor) -> Tensor:
        return operators.few_bits_linear(
            x, self.codes, None, self.scale, self.sums, self.bias, *self.clamp
        )

    def extra_repr(self) -> str:
        """Shape."""
        return f"{self.inputs}, {self.outputs}, ternary"


@dataclass(frozen=True)
class Replaced:
    """A layer that :func:`sparsify` replaced.

    Attributes:
        name: of the layer.
        density: fraction of its weights that are not zero.
        module: what stands there now.
        difference: largest difference of its outputs on the example, over the largest output.
    """

    name: str
    density: float
    module: str
    difference: float


def sparsify(
    model: nn.Module,
    example: Any,
    *,
    density: float = 0.35,
    precision: str = "float32",
    tolerance: float = 0.05,
) -> list[Replaced]:
    """Replace linear layers and convolutions that are sparse, in place, for inference on a CPU.

    Every layer's outputs on the example are compared before and after, then the network's.

    Args:
        example: what the model is called with: a tensor, a tuple of arguments, or a mapping.
        density: at most, of the layers that are replaced.
        precision: of linear layers: ``float32``, or ``int8`` (ternary ones then need 2 bits a
            weight); convolutions stay float32.
        tolerance: with ``int8``, how much of the largest output may differ.

    Left as they are: layers of another class, with hooks, of another dtype, padded with anything
    but zeros, denser, or that the example does not reach.

    Raises :class:`ArgumentError` where a layer or the network gives something else, naming it; the
    model is as it was then.
    """
    one_of("precision", precision, ("float32", "int8"))
    layers = {name: layer for name, layer in model.named_modules() if _replaceable(layer, density)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if inputs:
                seen.setdefault(name, (inputs[0].detach().clone(), output.detach().clone()))

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        before = _outputs(model, example)
    finally:
        for handle in handles:
            handle.remove()
    new: dict[int, nn.Module] = {}
    records = []
    for name, (x, wanted) in seen.items():
        layer = layers[name]
        made = _made(layer, precision)
        exact = isinstance(made, SparseConv2d) or getattr(made, "precision", "") == "float32"
        with torch.no_grad():
            apart = _apart(wanted, made(x))
        if not apart <= (_EXACT if exact else tolerance):
            raise ArgumentError(
                f"{name}: {type(made).__name__} differs by {apart:.2g} of the largest output from "
                f"{type(layer).__name__}; the model is untouched"
            )
        new[id(layer)] = made.train(layer.training)
        part = float((layer.weight != 0).float().mean())
        records.append(Replaced(name, part, repr(made), apart))
    places = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if child is not None and id(child) in new
    ]
    if id(model) in new:
        raise ArgumentError("model is a single layer: build SparseLinear or SparseConv2d from it")
    whole = _WHOLE if precision == "float32" else tolerance
    for parent, key, child in places:
        parent._modules[key] = new[id(child)]
    try:
        after = _outputs(model, example)
        worst = max((_apart(a, b) for a, b in zip(before, after, strict=True)), default=0.0)
    except Exception as e:
        for parent, key, child in places:
            parent._modules[key] = child
        raise ArgumentError(
            f"the network does not run with its layers replaced ({e}); the model is untouched"
        ) from e
    if not worst <= whole:
        for parent, key, child in places:
            parent._modules[key] = child
        raise ArgumentError(
            f"the network differs by {worst:.2g} of its largest output with {', '.join(seen)} "
            f"replaced, more than {whole:g}; the model is untouched"
        )
    return records


def _replaceable(layer: nn.Module, density: float) -> bool:
    if type(layer) not in (nn.Linear, nn.Conv2d) or any(getattr(layer, h) for h in _HOOKS):
        return False
    weight: Any = layer.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not weight.numel():
        return False
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return False
    return bool((weight != 0).float().mean() <= density)


def _made(layer: nn.Module, precision: str) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        return SparseConv2d(
            layer.weight, layer.bias, stride=layer.stride, padding=(top, left, bottom, right),
            dilation=layer.dilation, groups=layer.groups,
        )  # fmt: skip
    weight: Any = layer.weight
    bias: Any = layer.bias
    if precision == "int8":
        size = weight.detach().abs()
        if bool(((size == 0) | (size == size.amax(1, keepdim=True))).all()):
            return TernaryLinear(weight, bias)
    return SparseLinear(weight, bias, precision=precision)


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """What the model gives in evaluation mode; the example and the buffers stay as they are."""
    held = {name: buffer.clone() for name, buffer in model.named_buffers()}
    given = nest.mapped(Tensor.clone, example)
    try:
        with evaluating(model), torch.no_grad():
            if isinstance(given, dict):
                result = model(**given)
            else:
                result = model(*given) if isinstance(given, tuple) else model(given)
    finally:
        for name, buffer in model.named_buffers():
            if name in held and held[name].shape == buffer.shape:
                buffer.copy_(held[name])
    return [t.detach().clone() for t in nest.leaves(result)]


def _apart(wanted: Tensor, got: Tensor) -> float:
    """Largest difference over the largest value; infinite where shape or NaN differ."""
    if wanted.shape != got.shape or not torch.equal(wanted.isnan(), got.isnan()):
        return float("inf")
    if not wanted.numel():
        return 0.0
    a, b = wanted.double().nan_to_num(), got.double().nan_to_num()
    top = float(a.abs().max())
    return float((a - b).abs().max()) / top if top else float((b != 0).any())
