"""Batch-norm folded into the layer before it.

In evaluation batch-norm computes ``y = g (x - mean) / sqrt(var + eps) + b`` by channel; behind a
convolution or linear layer ``x = W z + c`` that is one layer with weight ``s W`` and bias
``s (c - mean) + b``, where ``s = g / sqrt(var + eps)`` (Jacob et al., CVPR 2018, section 3.2).
Of a transposed convolution ``s`` scales the outputs on axis 1 of each group's weights.
A batch-norm of images or volumes that follows something else becomes a depthwise convolution with
a kernel of 1; so does one of (N, C, L), where a batch tells that it is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gossamer.core import access
from gossamer.core.errors import ArgumentError
from gossamer.core.graph import check_same, label, shapes, trace

__all__ = ["fold_batchnorm"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardtanh,
    nn.Softplus, nn.PReLU, nn.Identity, nn.Dropout,
)  # fmt: skip
_ELEMENTWISE_CALLS: tuple[Any, ...] = (
    F.relu, torch.relu, torch.tanh, F.tanh, torch.sigmoid, F.sigmoid, F.gelu, F.silu, F.dropout,
    "relu", "relu_", "tanh", "sigmoid",
)  # fmt: skip
_FLATTEN: tuple[Any, ...] = (torch.flatten, "flatten")


def fold_batchnorm(model: nn.Module, example: Any = None) -> fx.GraphModule:
    """A copy of a model without batch-norm, traced, in evaluation mode; the model stays as it is.

    The output agrees with the model's in evaluation mode to float rounding (about 1e-6
    relative). Layers keep their names; a layer used in several places is not folded into, and a
    weight that layers share becomes each one's own where it is.

    Args:
        model: any that ``torch.fx`` traces.
        example: one batch of inputs, ``(N, ...)`` or a tuple that starts with them. The folded
            network is compared with the model on it before it is returned. Needed for a linear
            layer followed by ``BatchNorm1d``, unless a flatten or linear chain tells that its
            output is ``(N, C)``: of ``(N, C, L)`` batch-norm scales another axis than the layer's.

    Raises :class:`ArgumentError`, naming the module, for a model that cannot be traced, a
    batch-norm layer without running statistics, with statistics that are not finite, with
    negative variance, or with no layer to fold into; a weight that is computed from others
    (weight norm, spectral norm, ``torch.nn.utils.prune``, parametrizations); an axis that cannot
    be told without ``example``; and a folded network that differs from the model on it.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU()).eval()
    >>> [type(m).__name__ for m in fold_batchnorm(net).children()]
    ['Conv2d', 'ReLU']
    """
    graph = trace(access.copied(model).eval())
    seen = None if example is None else shapes(graph, example)
    fold = _Fold(graph, {n.name: s for n, s in seen.items()} if seen is not None else None)
    with torch.no_grad():
        for node in list(graph.graph.nodes):
            if isinstance(fold.module(node), nn.modules.batchnorm._BatchNorm):
                fold.norm(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    graph.eval()
    if example is not None:
        check_same(model, graph, example, "the folded network")
    return graph


class _Fold:
    """Folds the batch-norms of a graph, one by one.

    Args:
        graph: of a copy of the model; changed.
        seen: node name -> shape of its value on a batch, where one was given.
    """

    def __init__(self, graph: fx.GraphModule, seen: dict[str, tuple[int, ...]] | None) -> None:
        self.graph, self.seen = graph, seen
        self.modules = dict(graph.named_modules())
        self.calls: Counter[int] = Counter()
        read: set[int] = set()
        for node in graph.graph.nodes:
            module = self.module(node)
            if module is not None:
                self.calls[id(module)] += 1
            elif node.op == "get_attr":
                owner, _, name = str(node.target).rpartition(".")
                read.add(id(getattr(graph.get_submodule(owner), name)))
        # weights that the forward reads past their layer
        self.read = {
            id(m) for m in graph.modules() if any(id(p) in read for p in m._parameters.values())
        }

    def module(self, node: fx.Node) -> nn.Module | None:
        """What a node calls, where that is a module."""
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def norm(self, node: fx.Node) -> None:
        """Fold one batch-norm into the layer before it, or make it a depthwise convolution."""
        norm: Any = self.module(node)
        name = label(self.graph, node)
        access.check_plain(norm, str(node.target), "folded")
        scale, shift = _affine(norm, name)
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            raise ArgumentError(f"{name} must take its tensor as the first argument")
        layer: Any = self.module(source)
        alone = len(source.users) == 1 and self.calls[id(layer)] == 1
        if (
            isinstance(layer, _LAYERS)
            and alone
            and id(layer) not in self.read
            and self._same_axis(norm, node, source, layer)
        ):
            self._into(layer, str(source.target), scale, shift)
            node.replace_all_uses_with(source)
            self.graph.graph.erase_node(node)
            return
        kinds: Any = {nn.BatchNorm2d: nn.Conv2d, nn.BatchNorm3d: nn.Conv3d}
        if self._rank(source) == 3:
            kinds[nn.BatchNorm1d] = nn.Conv1d
        made = next((c for base, c in kinds.items() if isinstance(norm, base)), None)
        if made is None:
            raise ArgumentError(
                f"{name} follows no convolution or linear layer of its own to fold into; fold it "
                "by hand"
            )
        depthwise = made(norm.num_features, norm.num_features, 1, groups=norm.num_features)
        depthwise.to(norm.running_mean)
        depthwise.weight.copy_(scale.view(depthwise.weight.shape))
        depthwise.bias.copy_(shift)
        self.graph.add_submodule(str(node.target), depthwise)
        self.modules[str(node.target)] = depthwise

    def _into(self, layer: Any, name: str, scale: Tensor, shift: Tensor) -> None:
        access.check_plain(layer, name, "folded into")
        if layer._forward_pre_hooks:
            raise ArgumentError(
                f"{name} has a forward pre-hook, which may rewrite its weight; remove the hook, "
                "then fold"
            )
        bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.double()
        weight, taps = layer.weight.double(), [1] * (layer.weight.ndim - 2)
        if isinstance(layer, _TRANSPOSED):  # (in, out / groups, ...), the groups one after another
            grouped = weight.unflatten(0, (layer.groups, -1))
            weight = (grouped * scale.view(layer.groups, 1, -1, *taps)).flatten(0, 1)
        else:
            weight = weight * scale.view(-1, 1, *taps)
        # new parameters: a layer that shares the old ones keeps them
        layer.bias = nn.Parameter((scale * bias + shift).to(layer.weight))
        layer.weight = nn.Parameter(weight.to(layer.weight))

    def _rank(self, node: fx.Node) -> int | None:
        return len(self.seen[node.name]) if self.seen and node.name in self.seen else None

    def _same_axis(self, norm: Any, node: fx.Node, source: fx.Node, layer: Any) -> bool:
        """Whether batch-norm scales what the layer makes: axis 1, and by the layer's outputs."""
        if not isinstance(layer, nn.Linear):
            # one example without a batch has its channels on axis 0
            line = isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d))
            return self._rank(source) != 2 if line else not isinstance(norm, nn.BatchNorm1d)
        name, rank = label(self.graph, node), self._rank(source)
        if rank is None and self._flat(source.args[0] if source.args else None):
            rank = 2
        same = layer.out_features == norm.num_features
        if rank == 2 or (same and norm.num_features == 1):  # one channel: all of it either way
            return same
        if rank is None:
            raise ArgumentError(
                f"{name} follows the linear layer {source.target}, whose output may be (N, C) or "
                "(N, C, L), of which it scales another axis than the layer's; give "
                "fold_batchnorm(model, example=batch) one batch of inputs"
            )
        return False

    def _flat(self, node: Any) -> bool:
        """Whether a value is (N, C) whatever the input is."""
        while isinstance(node, fx.Node):
            module = self.module(node)
            if isinstance(module, nn.Flatten):
                return (module.start_dim, module.end_dim) == (1, -1)
            if node.target in _FLATTEN and node.op != "call_module":
                start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
                end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
                return (start, end) == (1, -1)
            if node.target in ("view", "reshape", torch.reshape):
                sizes = node.args[1:]
                whole = sizes[0] if sizes and isinstance(sizes[0], (tuple, list)) else sizes
                return len(whole) == 2
            kept = isinstance(module, (nn.Linear, nn.modules.batchnorm._BatchNorm, *_ELEMENTWISE))
            if not kept and not (node.op != "call_module" and node.target in _ELEMENTWISE_CALLS):
                return False
            node = node.args[0] if node.args else None
        return False


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
