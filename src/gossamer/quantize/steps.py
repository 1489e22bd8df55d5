"""A network as a list of steps: what fixed-point arithmetic has a rule for.

The traced graph of a network is read into :class:`Step`, so that the float reference, the
simulated and the integer network, and the exported file are all made from one list. Anything
without a rule is refused by name before anything is computed.

Two kinds of steps: *arithmetic* makes new values (convolution, linear layer, add, average,
concatenation) and has a number format of its own, with the ReLU behind it included; *choosing*
moves or selects values (max pooling, reshaping, slicing, zero padding, ReLU elsewhere) and keeps
its input's format.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gossamer.core import access
from gossamer.core.errors import ArgumentError
from gossamer.core.graph import check_writes, kind_of, label, trace

__all__ = ["ARITHMETIC", "Floats", "Program", "Step", "choose", "read", "sums", "wide"]

ARITHMETIC = frozenset({"conv", "linear", "add", "average", "cat"})

_RELU: set[Any] = {nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_SAME: set[Any] = {nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, F.dropout, "contiguous"}
_ADD: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CAT: set[Any] = {torch.cat, torch.concat}
_FLAT: set[Any] = {torch.flatten, "flatten"}
_SHAPED: set[Any] = {torch.reshape, "view", "reshape"}
_MEAN: set[Any] = {torch.mean, "mean"}
_NORM = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
_BATCH, _SHAPE = "the batch size", "the shape"  # what a node holds in place of a tensor


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        name: the module's name, or the node's.
        kind: ``input``, ``conv``, ``linear``, ``add``, ``average``, ``cat``, ``relu``,
            ``max_pool``, ``adaptive_max``, ``flatten``, ``reshape``, ``slice``, ``pad``.
        inputs: names of the steps it reads.
        relu: a ReLU follows, before the result is rounded.
        settings: of the operation, as torch names them.
    """

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    relu: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """Steps in order, the weight and bias of those that have them, and the name of the result.

    Weights are the model's own tensors, detached, ``(out, in)`` or ``(out, in / groups, kh, kw)``;
    ``layers`` maps a step to the module it came from.
    """

    steps: tuple[Step, ...]
    weights: dict[str, tuple[Tensor, Tensor | None]]
    layers: dict[str, str]
    output: str


def read(model: nn.Module) -> Program:
    """The steps of a model, as in evaluation mode.

    Raises :class:`ArgumentError`, naming the operation, for a model that cannot be traced, that
    has several inputs or outputs, that uses an operation without a rule, that changes in place
    what others read, or a layer whose weight is computed from others.
    """
    graph = trace(model)
    check_writes(graph)
    return _Reader(graph).program()


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


class _Reader:
    """Reads a graph, node by node."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.steps: list[Step] = []
        self.weights: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.layers: dict[str, str] = {}
        self.held: dict[fx.Node, str] = {}
        self.output = ""

    def program(self) -> Program:
        """Read everything."""
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                if self.steps:
                    raise ArgumentError(f"input {node.name!r} is the second; one is possible")
                self._add(node, "input")
            elif node.op == "output":
                (result,) = node.args
                if not isinstance(result, fx.Node) or self.held[result] in (_BATCH, _SHAPE):
                    raise ArgumentError(f"the output is {result!r}; it must be one tensor")
                self.output = self.held[result]
            else:
                self._node(node)
        self._fuse()
        return Program(tuple(self.steps), self.weights, self.layers, self.output)

    def _refuse(self, node: fx.Node, why: str) -> ArgumentError:
        return ArgumentError(f"{label(self.graph, node)} {why}")

    def _tensor(self, node: fx.Node, value: Any) -> str:
        if not isinstance(value, fx.Node) or self.held[value] in (_BATCH, _SHAPE):
            raise self._refuse(node, f"takes {value!r} where a tensor is expected")
        return self.held[value]

    def _add(self, node: fx.Node, kind: str, *inputs: Any, **settings: Any) -> Step:
        name = str(node.target) if node.op == "call_module" else node.name
        if any(step.name == name for step in self.steps):  # a module that is called again
            name = node.name
        step = Step(name, kind, tuple(self._tensor(node, i) for i in inputs), False, settings)
        self.steps.append(step)
        self.held[node] = name
        return step

    def _given(self, node: fx.Node, *names: str, **defaults: Any) -> dict[str, Any]:
        """Arguments by name: a module's attributes, or a call's own."""
        if node.op == "call_module":
            module = self.graph.get_submodule(str(node.target))
            return {n: getattr(module, n, defaults.get(n)) for n in names}
        bound = dict(zip(names, node.args[1:], strict=False))
        return {**defaults, **bound, **{k: v for k, v in node.kwargs.items() if k in names}}

    def _node(self, node: fx.Node) -> None:
        what = None if node.op == "get_attr" else kind_of(self.graph, node)
        module = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        x = node.args[0] if node.args else None
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            self._layer(node, x, module)
        elif what in _RELU:
            self._add(node, "relu", x)
        elif what in _SAME:
            if what is F.dropout and self._given(node, "p", "training", training=True)["training"]:
                raise self._refuse(node, "drops in evaluation mode too; pass self.training")
            self.held[node] = self._tensor(node, x)
        elif what in _ADD:
            if node.kwargs.get("alpha", 1) != 1:
                raise self._refuse(node, "adds with alpha; add plainly")
            self._add(node, "add", *node.args[:2])
        elif what in _CAT:
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            if not isinstance(x, (list, tuple)) or not isinstance(dim, int) or dim < 1:
                raise self._refuse(node, f"joins along {dim}; a dimension from 1 is possible")
            self._add(node, "cat", *x, dim=dim)
        elif not (self._pooling(node, what, x) or self._moving(node, what, module, x)):
            hint = "has no rule in fixed point; there is one for linear and convolution layers, "
            hint += "ReLU, pooling, add, concatenation, reshaping, slicing and zero padding"
            if isinstance(module, _NORM):
                hint += ". Fold batch-norm first: gossamer.fold_batchnorm(model)"
            raise self._refuse(node, hint)

    def _layer(self, node: fx.Node, x: Any, module: nn.Linear | nn.Conv2d) -> None:
        access.check_plain(module, str(node.target), "read")
        if isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros" or isinstance(module.padding, str):
                raise self._refuse(
                    node,
                    f"pads {module.padding!r} in mode {module.padding_mode!r}; pad with zeros, "
                    "by numbers",
                )
            settings = self._given(node, "stride", "padding", "dilation", "groups")
            step = self._add(node, "conv", x, **settings)
        else:
            step = self._add(node, "linear", x)
        bias = module.bias
        self.weights[step.name] = (module.weight.detach(), None if bias is None else bias.detach())
        self.layers[step.name] = str(node.target)

    def _pooling(self, node: fx.Node, what: Any, x: Any) -> bool:
        if what in (nn.MaxPool2d, F.max_pool2d, torch.max_pool2d):
            names: tuple[str, ...] = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            names = (*names, "return_indices")
            got = self._given(
                node, *names, stride=None, padding=0, dilation=1, ceil_mode=False,
                return_indices=False,
            )  # fmt: skip
            if got.pop("return_indices"):
                raise self._refuse(node, "returns indices; no rule")
            self._add(node, "max_pool", x, **self._window(got))
        elif what in (nn.AvgPool2d, F.avg_pool2d):
            names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
            names = (*names, "divisor_override")
            got = self._given(
                node, *names, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
                divisor_override=None,
            )  # fmt: skip
            if got.pop("divisor_override") is not None:
                raise self._refuse(node, "divides by divisor_override; no rule")
            if got["ceil_mode"] and got["padding"] not in (0, (0, 0)):
                raise self._refuse(node, "averages padded windows with ceil_mode; no rule")
            self._add(node, "average", x, how="windows", **self._window(got))
        elif what in (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d):
            size = self._given(node, "output_size")["output_size"]
            self._add(node, "average", x, how="adaptive", output_size=size)
        elif what in (nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d):
            size = self._given(node, "output_size")["output_size"]
            self._add(node, "adaptive_max", x, output_size=size)
        elif what in _MEAN:
            got = self._given(node, "dim", "keepdim", dim=None, keepdim=False)
            dims = (got["dim"],) if isinstance(got["dim"], int) else got["dim"]
            if not dims or 0 in dims:
                raise self._refuse(node, f"averages over {dims}; not over the batch, name the rest")
            self._add(node, "average", x, how="mean", dim=tuple(dims), keepdim=got["keepdim"])
        else:
            return False
        return True

    @staticmethod
    def _window(got: dict[str, Any]) -> dict[str, Any]:
        got["stride"] = got["stride"] or got["kernel_size"]
        pairs = ("kernel_size", "stride", "padding", "dilation")
        return {k: _pair(v) if k in pairs else v for k, v in got.items()}

    def _moving(self, node: fx.Node, what: Any, module: nn.Module | None, x: Any) -> bool:
        if what is nn.Flatten or what in _FLAT:
            start, end = (
                (module.start_dim, module.end_dim)
                if isinstance(module, nn.Flatten)
                else self._given(node, "start_dim", "end_dim", start_dim=0, end_dim=-1).values()
            )
            if start < 1:
                raise self._refuse(node, f"flattens from {start}; keep the batch: from 1")
            self._add(node, "flatten", x, start=start, end=end)
        elif what in _SHAPED:
            sizes = node.args[1:] or (node.kwargs.get("shape", ()),)
            shape = sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes
            first = shape[0] if shape else None
            whole = isinstance(first, fx.Node) and self.held[first] == _BATCH
            rest = tuple(shape[1:])
            if not rest or not (whole or first == -1) or any(not isinstance(n, int) for n in rest):
                raise self._refuse(node, f"to {shape}; keep the batch: flatten(1), or (-1, 3, 2)")
            self._add(node, "reshape", x, shape=rest)
        elif what == "size" or (what is getattr and node.args[1:] == ("shape",)):
            self._tensor(node, x)
            which = node.args[1:] if what == "size" else ()
            if which not in ((), (0,)):
                raise self._refuse(node, f"reads size {which}; only the batch size, size(0)")
            self.held[node] = _BATCH if which else _SHAPE
        elif what is operator.getitem:
            if isinstance(x, fx.Node) and self.held[x] == _SHAPE and node.args[1] == 0:
                self.held[node] = _BATCH
                return True
            index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            numbers = [(s.start, s.stop, s.step) for s in index if isinstance(s, slice)]
            whole = numbers[:1] == [(None, None, None)]
            if len(numbers) != len(index) or not whole or not _plain(numbers):
                raise self._refuse(node, f"takes {index}; only slices x[:, ...] by numbers")
            self._add(node, "slice", x, index=tuple(numbers))
        elif what in (F.pad, nn.ZeroPad2d):
            pad = module.padding if isinstance(module, nn.ZeroPad2d) else None
            got = self._given(node, "pad", "mode", "value", mode="constant", value=None)
            pad = pad or got["pad"]
            if module is None and (got["mode"] != "constant" or got["value"] not in (None, 0)):
                raise self._refuse(node, "must pad with zeros")
            if min(pad) < 0:
                raise self._refuse(node, "pads by a negative number; slice instead")
            self._add(node, "pad", x, pad=tuple(pad))
        else:
            return False
        return True

    def _fuse(self) -> None:
        """A ReLU that alone reads an arithmetic step becomes part of it."""
        for name in [s.name for s in self.steps if s.kind == "relu"]:
            relu = self._named(name)  # as earlier rounds have renamed its input
            source = self._named(relu.inputs[0])
            readers = [s for s in self.steps if source.name in s.inputs]
            alone = readers == [relu] and source.name != self.output
            if not alone or source.kind not in ARITHMETIC:
                continue
            self.steps[self.steps.index(source)] = replace(source, relu=True)
            self.steps.remove(relu)
            self.steps = [
                replace(s, inputs=tuple(source.name if n == name else n for n in s.inputs))
                for s in self.steps
            ]
            if self.output == name:
                self.output = source.name

    def _named(self, name: str) -> Step:
        return next(s for s in self.steps if s.name == name)


def _plain(slices: list[tuple[Any, Any, Any]]) -> bool:
    return all(n is None or isinstance(n, int) for s in slices for n in s)


def choose(step: Step, x: Tensor) -> Tensor:
    """A choosing step, on values or on codes of any dtype."""
    s = step.settings
    if step.kind == "relu":
        return x.clamp(min=0)
    if step.kind == "max_pool":
        return F.max_pool2d(x, **s)
    if step.kind == "adaptive_max":
        return F.adaptive_max_pool2d(x, s["output_size"])
    if step.kind == "flatten":
        return torch.flatten(x, s["start"], s["end"])
    if step.kind == "reshape":
        shape, each = s["shape"], x[0].numel()
        if -1 not in shape and math.prod(shape) != each:
            raise ArgumentError(f"{step.name} mixes the examples of a batch; flatten(1) keeps them")
        return x.reshape(x.shape[0], *shape)
    if step.kind == "slice":
        return x[tuple(slice(*numbers) for numbers in s["index"])]
    return F.pad(x, s["pad"])


def sums(step: Step, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the windows of an average, and how many entries each has (it broadcasts).

    Raises :class:`ArgumentError` for adaptive windows of unequal size.
    """
    s = step.settings
    if s["how"] == "mean":
        total = x.sum(s["dim"], keepdim=s["keepdim"])
        return total, torch.tensor(
            float(x[:1].numel() / max(1, total[:1].numel())), device=x.device
        )
    if s["how"] == "adaptive":
        wanted = s["output_size"]
        wanted = wanted if isinstance(wanted, (tuple, list)) else (wanted, wanted)
        size = [n if n is not None else have for n, have in zip(wanted, x.shape[-2:], strict=True)]
        if x.shape[-2] % size[0] or x.shape[-1] % size[1]:
            raise ArgumentError(
                f"{step.name}: {tuple(x.shape[-2:])} does not divide into {tuple(size)} equal "
                "windows; no rule for unequal ones"
            )
        kernel = (x.shape[-2] // size[0], x.shape[-1] // size[1])
        window: dict[str, Any] = {"kernel_size": kernel}
    else:
        window = {k: s[k] for k in ("kernel_size", "stride", "padding", "ceil_mode")}
    total = F.avg_pool2d(x, **window, divisor_override=1)
    ones = torch.ones(1, 1, *x.shape[-2:], dtype=x.dtype, device=x.device)
    if s.get("count_include_pad") and any(s["padding"]):
        (ph, pw), window = s["padding"], {**window, "padding": 0}
        ones = F.pad(ones, (pw, pw, ph, ph), value=1.0)
    return total, F.avg_pool2d(ones, **window, divisor_override=1)


def wide(step: Step, inputs: list[Tensor], weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A step's value before it is rounded."""
    if step.kind == "conv":
        out = F.conv2d(inputs[0], weight, bias, **step.settings)  # type: ignore[arg-type]
    elif step.kind == "linear":
        out = F.linear(inputs[0], weight, bias)  # type: ignore[arg-type]
    elif step.kind == "add":
        if inputs[0].shape != inputs[1].shape:
            raise ArgumentError(f"{step.name} adds by broadcasting; no rule")
        out = inputs[0] + inputs[1]
    elif step.kind == "average":
        total, count = sums(step, inputs[0])
        out = total / count.to(total.dtype)
    elif step.kind == "cat":
        out = torch.cat(inputs, step.settings["dim"])
    else:
        return choose(step, inputs[0])
    return out.clamp(min=0) if step.relu else out


class Floats(nn.Module):
    """A program in floating point, as a network: what the model is compared with."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> the output."""
        held: dict[str, Tensor] = {}
        for step in self.program.steps:
            weights = self.program.weights.get(step.name, (None, None))
            given = [held[n] for n in step.inputs]
            held[step.name] = x if step.kind == "input" else wide(step, given, *weights)
        return held[self.program.output]
