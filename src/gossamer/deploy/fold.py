"""Batch-norm folded into the layer before it.

In evaluation batch-norm computes ``y = g (x - mean) / sqrt(var + eps) + b`` by channel; behind a
convolution or linear layer ``x = W z + c`` that is one layer with weight ``s W`` and bias
``s (c - mean) + b``, where ``s = g / sqrt(var + eps)`` (Jacob et al., CVPR 2018, section 3.2).
A two-dimensional batch-norm that follows something else becomes a depthwise 1 x 1 convolution.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from gossamer.errors import ArgumentError
from gossamer.traced import label, trace

__all__ = ["fold_batchnorm"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold_batchnorm(model: nn.Module) -> fx.GraphModule:
    """A copy of a model without batch-norm, traced, in evaluation mode; the model stays as it is.

    The output agrees with the model's in evaluation mode to float rounding (about 1e-6
    relative). Layers keep their names; a layer used in several places is not folded into.

    Raises :class:`ArgumentError`, naming the module, for a model that cannot be traced, and a
    batch-norm layer without running statistics, with statistics that are not finite, with
    negative variance, or with no layer to fold into.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU()).eval()
    >>> [type(m).__name__ for m in fold_batchnorm(net).children()]
    ['Conv2d', 'ReLU']
    """
    graph = trace(copy.deepcopy(model).eval())
    modules = dict(graph.named_modules())
    calls: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    norms = [
        node
        for node in graph.graph.nodes
        if node.op == "call_module"
        and isinstance(modules[str(node.target)], nn.modules.batchnorm._BatchNorm)
    ]
    with torch.no_grad():
        for node in norms:
            _fold(graph, node, modules, calls)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph.eval()


def _fold(
    graph: fx.GraphModule, node: fx.Node, modules: dict[str, nn.Module], calls: dict[str, int]
) -> None:
    norm: Any = modules[str(node.target)]
    scale, shift = _affine(norm, label(graph, node))
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        raise ArgumentError(f"{label(graph, node)} must take its tensor as the first argument")
    layer: Any = modules.get(str(source.target)) if source.op == "call_module" else None
    alone = len(source.users) == 1 and calls.get(str(source.target), 0) == 1
    if isinstance(layer, _LAYERS) and alone:
        if hasattr(layer, "parametrizations"):
            raise ArgumentError(
                f"{source.target} is parametrized; finish() the method that made it so, then fold"
            )
        bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.double()
        weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1))
        layer.weight.copy_(weight)
        layer.bias = nn.Parameter((scale * bias + shift).to(layer.weight))
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
    elif isinstance(norm, nn.BatchNorm2d):
        channels = norm.num_features
        depthwise = nn.Conv2d(channels, channels, 1, groups=channels)
        depthwise.to(norm.running_mean)
        depthwise.weight.copy_(scale.view(-1, 1, 1, 1))
        depthwise.bias.copy_(shift)  # type: ignore[union-attr]
        graph.add_submodule(str(node.target), depthwise)
    else:
        raise ArgumentError(
            f"{label(graph, node)} follows no convolution or linear layer of its own to fold "
            "into; fold it by hand"
        )


def _affine(norm: Any, name: str) -> tuple[Tensor, Tensor]:
    """Scale and shift by channel, float64."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ArgumentError(f"{name} keeps no running statistics, so it is no fixed map; no rule")
    for what, values in (("running_mean", mean), ("running_var", variance)):
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise ArgumentError(
                f"{name}: {what} holds {bad} values that are NaN or infinite; train the model, or "
                "calibrate its statistics"
            )
    if bool((variance < 0).any()):
        raise ArgumentError(f"{name}: running_var is negative; the state is corrupt")
    scale = 1 / torch.sqrt(variance.double() + norm.eps)
    shift = -mean.double() * scale
    if norm.affine:
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double() + norm.bias
    return scale, shift
