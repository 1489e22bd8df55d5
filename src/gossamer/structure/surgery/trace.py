"""One forward pass, operation by operation, with what each does to the units of its tensors.

The network really runs, on real tensors. Two modes of torch watch it: one sees the calls that are
kept whole (a linear layer, an LSTM, attention), the other all operations that the rest consists of.
For each a rule (:mod:`.rules` and its neighbours) tells which units it ties together, which it
reads, and which it cannot do without. An operation without a rule keeps every unit that reaches it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gossamer.core import nest
from gossamer.core.dispatch import Watching
from gossamer.core.errors import ArgumentError
from gossamer.core.graph import undisturbed
from gossamer.structure.surgery.memory import Ledger, compact, varying
from gossamer.structure.surgery.node import Given, Map, Node

__all__ = [
    "FUNCTIONS",
    "RULES",
    "Trace",
    "traced",
]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep

RULES: dict[str, Callable[..., None]] = {}
"""Operation of aten, without an underscore behind -> rule(node, out, *args, **kwargs)."""
FUNCTIONS: dict[Any, Callable[..., None]] = {}
"""Function of torch that is kept whole -> rule(node, out, *args, **kwargs)."""


class Trace:
    """What a forward pass told.

    Attributes:
        ledger: what is known of every element.
        nodes: the operations, in order.
        names: id of a parameter or buffer -> its name.
        named: the other way round.
        outputs, fed: keys of the outputs' and inputs' storages.
        constants: module name -> what it gave where that is a constant a channel; None where it
            is called again.
        inputs: module name -> the first tensor that it was given.
    """

    def __init__(self, model: nn.Module) -> None:
        self.ledger = Ledger()
        self.nodes: list[Node] = []
        self.names: dict[int, str] = {}
        self.named: dict[str, Tensor] = {}
        self.outputs: set[int] = set()
        self.fed: set[int] = set()
        self.constants: dict[str, Given | None] = {}
        self.inputs: dict[str, Tensor] = {}
        self.modules = {id(m): n for n, m in model.named_modules()}
        self.shared: set[str] = set()
        self.model = model
        held: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.names[id(tensor)] = name
            self.named[name] = tensor
            key = self.ledger.key(tensor)
            if key in held and tensor.numel():  # memory of two: left as it is
                self.shared.update((name, held[key]))
            held[key] = name
            self.ledger.own(name, tensor)

    def name_of(self, tensor: Any) -> str | None:
        """The name of a parameter or buffer; None for any other value."""
        name = self.names.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return None if name in self.shared else name

    def labels(self, tensor: Tensor) -> list[Tensor]:
        """Layers of units of a tensor."""
        return self.ledger.labels(tensor)

    def unknown(self, tensor: Tensor) -> Tensor:
        """Elements that depend on the inputs."""
        return self.ledger.unknown(tensor)

    # --- what rules say of a node

    def pin(self, node: Node, layer: Tensor, why: str, read: bool = False) -> None:
        """Units that have to stay; ``read``: for their values, which the operation mixes."""
        ids = np.unique(compact(layer).numpy())
        if len(ids := ids[ids != 0]):
            node.pins.append((ids, why, read))

    def unite(self, node: Node, one: Tensor, other: Tensor, why: str = "") -> None:
        """Units at equal places are one; beside none, they have to stay."""
        both = torch.broadcast_tensors(one, other)
        pairs = np.stack([b.numpy().reshape(-1) for b in both])
        if pairs.shape[1] > 64:
            pairs = np.unique(pairs, axis=1)
        a, b = pairs
        alone = (a == 0) != (b == 0)
        if alone.any():
            node.pins.append(
                (np.unique((a + b)[alone]), why or f"{node.op} mixes it with others", False)
            )
        if (joint := (a != 0) & (b != 0) & (a != b)).any():
            node.unions.append((a[joint], b[joint]))

    def line(self, node: Node, layer: Tensor, axis: int) -> Tensor | None:
        """The units along one axis: those at one place of it are tied where there are several.

        None where the layer does not vary along it.
        """
        axes = varying(layer)
        axis %= layer.ndim
        if axis not in axes:
            return None
        layer = compact(layer)
        rows = layer.movedim(axis, 0).reshape(layer.shape[axis], -1)
        first = rows[:, 0]
        if rows.shape[1] > 1:
            self.unite(node, first[:, None].expand(rows.shape), rows)
        return first.contiguous()

    def use(self, node: Node, ids: Tensor | None, role: str) -> None:
        """Units of a parameter's axis, which the rule accounts for."""
        if ids is not None:
            node.axes.append((ids.numpy(), role))

    def flows(self, node: Node, *tensors: Tensor) -> None:
        """Parameters among these hand their units on to the result."""
        for t in tensors:
            for ids in self.ledger.of(t).axes.values():
                node.axes.append((ids.numpy(), "scales"))

    # --- recording

    def record(self, op: str, rule: Any, args: Any, kwargs: Any, out: Any) -> None:
        """One operation: by its rule, or by keeping all that reaches it."""
        ins, outs = nest.leaves([*args, *kwargs.values()]), nest.leaves(out)
        node = Node(op, *self._place())
        node.reads = {self.ledger.key(t) for t in ins}
        node.writes = {self.ledger.key(t) for t in outs}
        view = bool(node.writes) and node.writes <= node.reads and not op.endswith("_")
        self.nodes.append(node)
        try:
            if rule is None and not view:
                raise NotImplementedError
            if rule is not None:
                rule(self, node, out, *args, **kwargs)
        except (NotImplementedError, TypeError, ValueError, IndexError, RuntimeError):
            self.unruled(node, ins, outs)
        for t in outs:
            if self.ledger.key(t) in node.writes:
                self.shape(node, t)

    def unruled(self, node: Node, ins: list[Tensor], outs: list[Tensor]) -> None:
        """Nothing is known: all that reaches it stays."""
        for t in ins:
            for layer in self.labels(t):
                self.pin(node, layer, f"{node.op} has no rule")
        for t in outs:
            self.ledger.write(t, [], torch.ones((), dtype=torch.bool))

    def shape(self, node: Node, tensor: Tensor) -> None:
        """Units along several axes must stay a tensor."""
        if self.ledger.of(tensor).axes:
            return
        for layer in self.labels(tensor):
            axes = varying(layer)
            if not axes and tensor.numel() and int(layer.flatten()[0]):
                self.pin(node, layer, f"{node.op} takes a single one")
            elif axes:
                node.maps.append(Map.of(layer, axes))

    def _place(self) -> tuple[str, nn.Module | None, nn.Module | None]:
        frame: Any = sys._getframe(3)
        where, inner, owner = "", None, None
        while frame is not None:
            file = frame.f_code.co_filename
            if not file.startswith(_HERE):
                own = frame.f_locals.get("self")
                if isinstance(own, nn.Module):
                    inner = own if inner is None else inner
                    if not file.startswith(_TORCH):
                        owner = own
                        where = f"{file}:{frame.f_lineno}"
                        break
            elif frame.f_code.co_name == "traced":
                break
            frame = frame.f_back
        name = self.modules.get(id(inner)) if inner is not None else None
        kind = type(inner).__name__ if inner is not None else ""
        at = f"{name or 'the network'} ({kind})" if inner is not None else ""
        return ", ".join(part for part in (at, where) if part), owner or inner, inner


class _Calls(TorchFunctionMode):
    """Calls that are kept whole."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace, self.busy = trace, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = FUNCTIONS.get(func)
        if self.busy:
            return func(*args, **kwargs)
        if rule is None:
            opened = _opened(func)
            if opened is None:
                return func(*args, **kwargs)
            with self:  # what a function of torch's in Python calls is watched too
                return opened(*args, **kwargs)
        self.busy = True
        try:
            out = func(*args, **kwargs)
            name = getattr(func, "__name__", str(func))
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                self.trace.record(name, rule, args, kwargs, out)
        finally:
            self.busy = False
        return out


@cache
def _opened(func: Any) -> Any:
    """A Python function of torch's that does not hand itself to the mode; None for others."""
    code, scope = getattr(func, "__code__", None), getattr(func, "__globals__", {})
    checks = [n for n in scope if n.startswith("has_torch_function")]
    if code is None or not checks or func.__closure__:
        return None
    blind = {**scope, **dict.fromkeys(checks, lambda *_: False)}
    opened = FunctionType(code, blind, func.__name__, func.__defaults__)
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened


class _Operations(Watching):
    """Everything else, as aten's operations."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the import of torch's compiler takes seconds, and nothing is compiled

    def __init__(self, trace: Trace, calls: _Calls) -> None:
        super().__init__()
        self.trace, self.calls = trace, calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.calls.busy:
            return func(*args, **kwargs)
        op = func._schema.name.split("::")[1]
        self.calls.busy = True
        try:
            seen = args
            if op.endswith("_") and args and isinstance(args[0], Tensor):
                seen = (self._before(args[0]), *args[1:])
            if op in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
                self._known(op, args)
            out = func(*args, **kwargs)
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                self.trace.record(op, RULES.get(op.rstrip("_")), seen, kwargs, out)
        finally:
            self.calls.busy = False
        return out

    def _before(self, tensor: Tensor) -> Tensor:
        """What an operation in place overwrites."""
        ledger = self.trace.ledger
        old = tensor.clone()
        ledger.write(old, ledger.labels(tensor), ledger.unknown(tensor))
        return old

    def _known(self, op: str, args: Any) -> None:
        for tensor in nest.leaves(list(args)):
            if bool(self.trace.unknown(tensor).any()):
                where = self.trace._place()[0]
                raise _Refused(
                    f"the forward takes a number or a shape from the values of its inputs ({op}, "
                    f"{where}): another input may go another way, which no comparison sees"
                )


class _Refused(ArgumentError):
    """Passes through the user's code as what it is."""


@contextmanager
def _whole_attention() -> Iterator[None]:
    """Attention of torch as its parts, not as the one operation of its fast path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def traced(model: nn.Module, example: Any) -> Trace:
    """Run the network on a batch and write down what happens.

    Args:
        model: in any mode; it runs in evaluation mode, and its buffers and modes come back.
        example: as :func:`gossamer.core.nest.feed` takes it.

    Raises :class:`ArgumentError` where the network does not take the example, gives no tensor, or
    takes another way for other values.
    """
    if not nest.leaves(example):
        raise ArgumentError(
            "example_inputs holds no tensor; give one batch of inputs, on which the network runs"
        )
    trace = Trace(model)
    inputs = nest.mapped(Tensor.clone, example)
    for tensor in nest.leaves(inputs):
        trace.fed.add(trace.ledger.key(tensor))
        trace.ledger.write(tensor, [], torch.ones((), dtype=torch.bool))
    hooks = [m.register_forward_hook(_keeper(trace, n)) for n, m in model.named_modules() if n]
    calls = _Calls(trace)
    try:
        with undisturbed(model), _whole_attention(), calls, _Operations(trace, calls):
            out = nest.feed(model, inputs)
    except ArgumentError:
        raise
    except Exception as e:  # the user's own code, which may raise anything
        raise ArgumentError(
            f"{type(model).__name__} does not take example_inputs {nest.shown(example)}: {e}"
        ) from e
    finally:
        for hook in hooks:
            hook.remove()
    node = Node("output", "the network's outputs")
    found = outputs(out)
    if not found:
        raise ArgumentError(
            f"{type(model).__name__} gives {type(out).__name__}, in which no tensor is found"
        )
    for t in found:
        node.reads.add(trace.ledger.key(t))
        for layer in trace.labels(t):
            trace.pin(node, layer, "it is an output of the network")
    trace.outputs = set(node.reads)
    trace.nodes.append(node)
    return trace


def outputs(value: Any) -> list[Tensor]:
    """The tensors of what a network gives; objects with attributes are looked into."""
    if isinstance(value, (Tensor, dict, tuple, list)):
        if isinstance(value, dict):
            value = list(value.values())
        return [value] if isinstance(value, Tensor) else [t for p in value for t in outputs(p)]
    if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
        return [t for part in vars(value).values() for t in outputs(part)]
    return []


def _keeper(trace: Trace, name: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, out: Any) -> None:
        for tensor in nest.leaves(list(args))[:1]:
            trace.inputs.setdefault(name, tensor)
        if list(module.children()) or not isinstance(out, Tensor):
            return
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            found = _constant(trace, module, out)
        if name in trace.constants:
            trace.constants[name] = None
        elif found is not None:
            trace.constants[name] = Given(out, *found, len(trace.nodes))

    return keep


_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Bilinear)


def _constant(trace: Trace, module: nn.Module, out: Tensor) -> tuple[Tensor, int] | None:
    """The value of each channel, and their axis: the second, or the last."""
    if out.ndim < 2 or not out.is_floating_point() or bool(trace.unknown(out).any()):
        return None
    last = out.ndim - 1
    for axis in (last,) if isinstance(module, _LAST) else (1, last):
        rows = out.movedim(axis, 0).flatten(1)
        if torch.equal(rows, rows[:, :1].expand(rows.shape)):
            return rows[:, 0].clone(), axis
    return None
