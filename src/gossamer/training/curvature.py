"""The back-propagated diagonal of the Hessian: what second-order saliencies share.

LeCun, Denker, Solla, *Optimal Brain Damage*, NIPS 1989, equations 6-11. Per pattern, averaged
over patterns, with a_i the sum a unit receives, x_j what it receives it from, and f its function:

- weight:  h = sum over the connections that share it of  x_j^2 * d2E/da_i^2
- hidden:  d2E/da_i^2 = f'(a_i)^2 * sum_l w_li^2 d2E/da_l^2 + f''(a_i) * dE/dx_i
- output:  softmax cross-entropy p(1 - p); squared error sum (d - x)^2: 2

The printed minus before f'' is a misprint. Levenberg-Marquardt drops the f'' terms, so h >= 0.
The recursion keeps diagonals only: it is exact for the last layer's weights and for a chain of
single units, an approximation elsewhere; where branches join (a residual add), they are treated
as independent. Batch-norm and dropout are taken as in evaluation.

The network is traced by ``torch.fx``; an operation without a rule is refused before anything is
computed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from gossamer.core import access, names, nest
from gossamer.core.errors import ArgumentError
from gossamer.core.graph import check_same, check_writes, in_place, kind_of, trace
from gossamer.core.modes import evaluating
from gossamer.core.names import Tensors
from gossamer.datasets import Split

__all__ = ["hessian_diagonal"]

# Elementwise functions: f' and f'' come from autograd.
_ELEMENTWISE: set[Any] = {
    nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU, nn.LeakyReLU,
    nn.Hardtanh, nn.ReLU6,
    F.relu, torch.relu, torch.tanh, F.tanh, torch.sigmoid, F.sigmoid, F.gelu, F.silu, F.softplus,
    F.leaky_relu, F.elu, "relu", "tanh", "sigmoid",
}  # fmt: skip
# Operations that copy or choose entries: their Jacobian is 0 or 1, so its square is itself.
_SELECTING: set[Any] = {
    nn.Flatten, nn.Identity, nn.MaxPool2d, nn.MaxPool1d, nn.AdaptiveMaxPool2d, nn.Dropout,
    nn.Dropout2d, nn.ZeroPad2d, nn.Unflatten,
    torch.flatten, torch.reshape, F.max_pool2d, F.max_pool1d, F.pad, F.dropout, torch.squeeze,
    torch.unsqueeze, torch.permute, torch.transpose, operator.getitem,
    "flatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze", "permute", "transpose",
}  # fmt: skip
# Means over equal windows: every non-zero entry of the Jacobian is 1 / window.
_AVERAGING: set[Any] = {
    nn.AvgPool2d, nn.AvgPool1d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d,
    torch.mean, "mean",
}  # fmt: skip
_ADDING: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}
_SCALING: set[Any] = {nn.BatchNorm1d, nn.BatchNorm2d}
_PLAIN: set[Any] = {"size", "dim", getattr}  # no tensors come out of these


def _check(graph: fx.GraphModule) -> None:
    check_writes(graph)
    known = _ELEMENTWISE | _SELECTING | _AVERAGING | _ADDING | _SCALING | _PLAIN
    known |= {nn.Linear, nn.Conv2d, nn.Conv1d}
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        kind = kind_of(graph, node)
        if node.op == "get_attr" or kind not in known:
            shown = kind if isinstance(kind, str) else getattr(kind, "__name__", kind)
            raise ArgumentError(
                f"node {node.name!r} ({shown}) has no rule for second derivatives; known are "
                "linear, convolution, batch-norm, pooling, elementwise functions, reshaping and "
                "add. Write it with these, or prune by magnitude"
            )
        first = node.args[0] if node.args else None
        if kind not in _ADDING | _PLAIN and not isinstance(first, fx.Node):
            raise ArgumentError(
                f"node {node.name!r} must take its tensor as the first argument, not by keyword"
            )
        if kind in _ADDING and node.kwargs.get("alpha", 1) != 1:
            raise ArgumentError(f"node {node.name!r} adds with alpha; no rule, add plainly")
        if kind in (nn.Conv2d, nn.Conv1d):
            module = graph.get_submodule(str(node.target))
            if module.padding_mode != "zeros" or isinstance(module.padding, str):
                raise ArgumentError(
                    f"{node.target}: padding={module.padding!r} with mode "
                    f"{module.padding_mode!r} has no rule; pad with zeros, by numbers"
                )


def _source(node: fx.Node) -> fx.Node:
    """The node's first input."""
    source = node.args[0]
    assert isinstance(source, fx.Node)  # rules are looked up for nodes with a tensor input only
    return source


class _Values(fx.Interpreter):
    """Runs the graph and keeps every node's value."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run and keep; an in-place operation works on a copy of what is kept."""
        assert isinstance(self.module, fx.GraphModule)  # what __init__ was given
        if in_place(self.module, n):
            source = _source(n)
            self.env[source] = self.env[source].clone()
        self.values[n] = super().run_node(n)
        return self.values[n]


class _Walk:
    """One batch's reverse walk: second derivatives, and gradients where f'' is wanted."""

    def __init__(self, graph: fx.GraphModule, inputs: Tensor, found: dict[int, Tensor]) -> None:
        self.graph, self.found = graph, found
        self.runner = _Values(graph)
        with torch.no_grad():
            self.output: Tensor = self.runner.run(inputs)
        self.second: dict[fx.Node, Tensor] = {}
        self.first: dict[fx.Node, Tensor] = {}

    def back(self, second: Tensor, first: Tensor | None) -> None:
        """Walk from the output's derivatives to the parameters'."""
        (result,) = next(iter(reversed(self.graph.graph.nodes))).args
        assert isinstance(result, fx.Node)  # the tracer's output is one node, checked at the door
        self.second[result] = second
        if first is not None:
            self.first[result] = first
        for node in reversed(self.graph.graph.nodes):
            if node in self.second and node.op.startswith("call"):
                self._node(node, self.second.pop(node), self.first.pop(node, None))

    def _give(self, node: Any, second: Tensor, first: Tensor | None) -> None:
        if not isinstance(node, fx.Node) or node.op == "placeholder":
            return
        self.second[node] = self.second[node] + second if node in self.second else second
        if first is not None:
            self.first[node] = self.first[node] + first if node in self.first else first

    def _vjp(self, node: fx.Node, *cotangents: Tensor | None) -> list[Tensor | None]:
        """Each cotangent through the transposed Jacobian of a node with one tensor input."""
        with torch.enable_grad():
            source = self.runner.values[_source(node)].detach().requires_grad_()
            out = self._again(node, source)
            return [
                None if c is None else torch.autograd.grad(out, source, c, retain_graph=True)[0]
                for c in cotangents
            ]

    def _again(self, node: fx.Node, source: Tensor) -> Tensor:
        """The node's value for another first input."""
        look = self.runner.values.__getitem__
        args = (source, *fx.node.map_arg(node.args[1:], look))
        kwargs = fx.node.map_arg(node.kwargs, look)
        if node.op == "call_module":
            out: Tensor = self.graph.get_submodule(str(node.target))(*args, **kwargs)
        elif node.op == "call_method":
            out = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            out = node.target(*args, **kwargs)
        return out

    def _add(self, p: Tensor | None, value: Tensor) -> None:
        if p is not None:
            self.found[id(p)] = self.found[id(p)] + value if id(p) in self.found else value

    def _node(self, node: fx.Node, h: Tensor, g: Tensor | None) -> None:
        kind, source = kind_of(self.graph, node), node.args[0] if node.args else None
        if kind in _ADDING:
            for argument in dict.fromkeys(node.args):
                value = self.runner.values.get(argument) if isinstance(argument, fx.Node) else None
                if isinstance(value, Tensor):
                    if value.shape != h.shape:
                        raise ArgumentError(f"node {node.name!r} adds by broadcasting; no rule")
                    times = node.args.count(argument)  # x + x is 2 x: its slope squared is 4
                    self._give(argument, h * times**2, None if g is None else g * times)
            return
        if not isinstance(source, fx.Node) or not isinstance(self.runner.values[source], Tensor):
            return
        x: Tensor = self.runner.values[source]
        if kind is nn.Linear:
            module: Any = self.graph.get_submodule(str(node.target))
            flat, squares = h.reshape(-1, h.shape[-1]), x.reshape(-1, x.shape[-1]).square()
            self._add(module.weight, flat.T @ squares)
            self._add(module.bias, flat.sum(0))
            self._give(source, h @ module.weight.square(), self._vjp(node, g)[0])
        elif kind in (nn.Conv2d, nn.Conv1d):
            self._convolution(node, source, x, h, g)
        elif kind in _ELEMENTWISE:
            slope, bend = self._derivatives(node, x, curved=g is not None)
            below = slope.square() * h
            if g is not None:
                below = below + bend * g
            self._give(source, below, None if g is None else slope * g)
        elif kind in _SELECTING:
            self._give(source, *self._two(self._vjp(node, h, g)))
        elif kind in _AVERAGING:
            ones = torch.ones_like(h)
            spread = self._vjp(node, ones)[0]
            assert spread is not None
            # every entry of the Jacobian is the same number; it is found, not assumed
            share = float(spread.max())
            uneven = (spread != 0) & ((spread - share).abs() > 1e-5 * share)
            if uneven.any():
                raise ArgumentError(f"node {node.name!r} averages unequal windows; no rule")
            below_h, below_g = self._two(self._vjp(node, h, g))
            self._give(source, below_h * share, below_g)
        elif kind in _SCALING:
            module = self.graph.get_submodule(str(node.target))
            if module.running_mean is None:
                raise ArgumentError(
                    f"node {node.name!r} normalizes by the batch's own statistics; no rule: use "
                    "track_running_stats=True"
                )
            scale = self._vjp(node, torch.ones_like(h))[0]
            assert scale is not None
            if module.affine:
                # not from the output: a weight of 0 leaves nothing of it there
                mean, variance = module.running_mean, module.running_var
                normal = F.batch_norm(x, mean, variance, eps=module.eps)
                dims = [d for d in range(x.ndim) if d != 1]
                self._add(module.weight, (h * normal.square()).sum(dims))
                self._add(module.bias, h.sum(dims))
            self._give(source, h * scale.square(), None if g is None else g * scale)

    @staticmethod
    def _two(pair: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        second, first = pair
        assert second is not None
        return second, first

    def _convolution(
        self, node: fx.Node, source: fx.Node, x: Tensor, h: Tensor, g: Tensor | None
    ) -> None:
        module: Any = self.graph.get_submodule(str(node.target))
        w, shape, flat = module.weight, x.shape, isinstance(module, nn.Conv1d)
        settings: list[Any] = [module.stride, module.padding, module.dilation]
        if flat:  # a row of height 1
            x, h, w = x.unsqueeze(2), h.unsqueeze(2), w.unsqueeze(2)
            settings = [(one, *v) for one, v in zip((1, 0, 1), settings, strict=True)]
        args = (*settings, module.groups)
        self._add(
            module.weight, conv2d_weight(x.square(), w.shape, h, *args).view_as(module.weight)
        )
        self._add(module.bias, h.sum([0, 2, 3]))
        below = conv2d_input(x.shape, w.square(), h, *args).reshape(shape)
        self._give(source, below, self._vjp(node, g)[0])

    def _derivatives(self, node: fx.Node, x: Tensor, *, curved: bool) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            a = x.detach().clone().requires_grad_()
            # a copy: in-place activations would overwrite the leaf
            (slope,) = torch.autograd.grad(self._again(node, a * 1).sum(), a, create_graph=curved)
            bend = torch.zeros_like(slope)
            if curved and slope.requires_grad:
                (found,) = torch.autograd.grad(slope.sum(), a, allow_unused=True)
                bend = bend if found is None else found
        return slope.detach(), bend.detach()


def _top(loss: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Second and first derivatives of each pattern's loss by the outputs."""
    if loss == "cross_entropy":
        p = F.softmax(outputs, dim=1)
        return p * (1 - p), p - F.one_hot(targets, outputs.shape[1])
    wanted = targets
    if not targets.is_floating_point():
        wanted = F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
    return torch.full_like(outputs, 2.0), 2 * (outputs - wanted)


def _fitting(loss: str, outputs: Tensor, targets: Any) -> None:
    """Outputs (N, classes), and targets of a kind that the loss takes: by rank."""
    classes = isinstance(targets, Tensor) and not targets.is_floating_point()
    wanted = outputs.shape[:1] if classes else outputs.shape
    fits = isinstance(targets, Tensor) and targets.shape == wanted
    if outputs.ndim != 2 or not fits or not (classes or loss == "mse"):
        raise ArgumentError(
            f"outputs of shape {tuple(outputs.shape)} and targets {nest.shown(targets)} do not fit "
            f"loss {loss!r}: give (N, C) outputs with (N,) class indices"
            + (", or with values of the same shape" if loss == "mse" else "")
        )


def hessian_diagonal(
    model: nn.Module,
    split: Split,
    *,
    loss: Literal["cross_entropy", "mse"] = "cross_entropy",
    levenberg_marquardt: bool = True,
    weight_decay: float = 0.0,
    batch_size: int = 256,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensors:
    """Diagonal of the Hessian of the mean loss by each parameter: clean name -> its shape.

    Args:
        model: outputs ``(N, classes)``; logits for cross-entropy.
        split: patterns to average over; brought to the model's dtype and device.
        loss: of one pattern: softmax cross-entropy, or sum (d - x)^2 (classes become one-hot).
        levenberg_marquardt: drop the f'' terms, which makes every entry >= 0.
        weight_decay: lambda of lambda/2 |w|^2, whose Hessian is lambda on the diagonal; 0 leaves
            it out.
        include: parameter patterns as in :func:`gossamer.core.names.select`; all by default.
        exclude: patterns of parameters to leave out.
        progress: called with (patterns done, patterns in all).

    Raises :class:`ArgumentError` for a network that cannot be traced, an operation without a
    rule (named), one in place on what others read, a weight that is computed from others, a graph
    that differs from the network on the first batch, an empty split, or NaN in the result.
    """
    if loss not in ("cross_entropy", "mse"):
        raise ArgumentError(f"loss {loss!r} is not one of 'cross_entropy', 'mse'")
    if not len(split):
        raise ArgumentError("split is empty; the diagonal is an average over patterns")
    if batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size} must be at least 1")
    parameters = names.parameters(model)
    chosen = names.select(parameters, include) if include is not None else list(parameters)
    if exclude is not None:
        left_out = set(names.select(parameters, exclude))
        chosen = [n for n in chosen if n not in left_out]
    for computed in access.derived(model):
        raise ArgumentError(f"{computed}: second derivatives are of plain parameters")
    found: dict[int, Tensor] = {}
    with evaluating(model):
        graph = trace(model)
        _check(graph)
        some = next(iter(parameters.values()))
        for start in range(0, len(split), batch_size):
            index = torch.arange(start, min(start + batch_size, len(split)))
            inputs, targets = split.batch(index)
            if not start:
                check_same(model, graph, inputs.to(some), "the graph")
            walk = _Walk(graph, inputs.to(some), found)
            _fitting(loss, walk.output, targets)
            second, first = _top(loss, walk.output, targets.to(some.device))
            with torch.no_grad():
                walk.back(second, None if levenberg_marquardt else first)
            if progress is not None:
                progress(int(index[-1]) + 1, len(split))
    result: Tensors = {}
    for name in chosen:
        p = parameters[name]
        h = found.get(id(p), torch.zeros_like(p)).detach() / len(split) + weight_decay
        if torch.isnan(h).any():
            raise ArgumentError(f"the diagonal of {name!r} holds NaN; check weights and inputs")
        result[name] = h
    return result
