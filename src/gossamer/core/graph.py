"""Networks as graphs: tracing by ``torch.fx``, and what a node of the graph calls.

What second derivatives, batch-norm folding, dead units, quantized activations and fixed-point
networks share. A graph holds one path through the user's code, so whoever uses one asks here
whether it is the network: :func:`check_modes` (a branch on ``self.training``), :func:`check_writes`
(an operation in place whose input is read elsewhere) and :func:`check_same` (both on a batch).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from gossamer.core import nest
from gossamer.core.errors import ArgumentError
from gossamer.core.modes import evaluating

__all__ = [
    "Forward",
    "check_modes",
    "check_or_restore",
    "check_same",
    "check_writes",
    "in_place",
    "kind_of",
    "label",
    "shapes",
    "trace",
    "undisturbed",
]

Forward = Callable[[nn.Module, Any], Any]  # forward(model, batch), where model(batch) is not it

# Calls whose result lies in the memory of their first input, or may.
_VIEWS = {
    "alias", "as_strided", "chunk", "contiguous", "detach", "diagonal", "expand", "expand_as",
    "flatten", "getitem", "hsplit", "imag", "mT", "movedim", "moveaxis", "narrow", "permute",
    "ravel", "real", "reshape", "reshape_as", "select", "split", "split_with_sizes", "squeeze",
    "swapaxes", "swapdims", "t", "T", "H", "mH", "tensor_split", "to", "transpose", "type_as",
    "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as", "vsplit", "dsplit", "float",
    "double", "half", "adjoint", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "feature_dropout", "cpu", "cuda", "type",
}  # fmt: skip
_VIEW_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)
_TOLERANCE = 1e-3  # of the largest output: above rounding, far below another function


class _Proxy(fx.Proxy):
    """A traced value that keeps ``+=`` as what it is: a plain one makes it ``x = x + y``."""

    def _write(self, function: Callable[[Any, Any], Any], other: Any) -> Any:
        # named as the operation out of place is: names of nodes are part of files
        name = function.__name__.removeprefix("i")
        return self.tracer.create_proxy("call_function", function, (self, other), {}, name)

    def __iadd__(self, other: Any) -> Any:
        return self._write(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._write(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._write(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._write(operator.itruediv, other)


class Tracer(fx.Tracer):
    """torch's tracer with operators in place (:class:`_Proxy`)."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wrap a node."""
        return _Proxy(node, self)


def trace(model: nn.Module, *, training: bool = False) -> fx.GraphModule:
    """The model's graph, as in evaluation (or training) mode; it shares the model's modules.

    Raises :class:`ArgumentError` for a model that cannot be traced.
    """
    own = set(vars(model))
    with evaluating(model):
        if training:
            model.train()
        try:
            graph = Tracer().trace(model)
            return fx.GraphModule(model, graph, type(model).__name__)
        except Exception as e:  # tracing runs the user's own code, which may raise anything
            raise ArgumentError(
                f"{type(model).__name__} cannot be traced ({e}); its forward must not branch on "
                "values, and of a wrapper (DataParallel, torch.compile) give the module within"
            ) from e
        finally:  # constants of the forward, which the tracer leaves on the model
            for name in [n for n in vars(model) if n.startswith("_tensor_constant")]:
                if name not in own:
                    delattr(model, name)


def kind_of(graph: fx.GraphModule, node: fx.Node) -> Any:
    """What a node calls: a module's type, a function, or a method's name."""
    return type(graph.get_submodule(str(node.target))) if node.op == "call_module" else node.target


def label(graph: fx.GraphModule, node: fx.Node) -> str:
    """A node as a message names it: ``layer1.0.act (GELU)``."""
    what = kind_of(graph, node)
    shown = what if isinstance(what, str) else getattr(what, "__name__", str(what))
    return f"{node.target if node.op == 'call_module' else node.name} ({shown})"


def in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node overwrites its first input."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, str):
        named = node.target.endswith("_") and not node.target.endswith("__")
    else:
        module, name = getattr(node.target, "__module__", ""), _name(node)
        written = ("iadd", "isub", "imul", "itruediv", "setitem")
        named = name in written if module == "_operator" else name.endswith("_")
    return named or bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _written(node: fx.Node) -> Any:
    """What a node in place overwrites."""
    out = node.kwargs.get("out")
    return out if out is not None else node.args[0] if node.args else node.kwargs.get("input")


def _aliased(graph: fx.GraphModule, node: fx.Node) -> Any:
    """The node in whose memory the result of a node lies, or may lie; None for new memory."""
    source = _written(node)
    if not isinstance(source, fx.Node):
        return None
    if in_place(graph, node):
        return source
    if node.op == "call_module":
        views = isinstance(graph.get_submodule(str(node.target)), _VIEW_MODULES)
    elif node.target is getattr:
        views = str(node.args[1]) in _VIEWS
    else:
        views = node.op != "get_attr" and _name(node) in _VIEWS
    return source if views else None


def check_writes(graph: fx.GraphModule, only: Callable[[fx.Node], bool] | None = None) -> None:
    """Refuse an operation in place on memory that somebody else reads afterwards.

    Memory is followed through views, slices and the operations in place themselves. Whoever
    computes node by node, on copies, would go on with the old value.

    Args:
        graph: as traced.
        only: the operations in place that are looked at; all by default.

    Raises :class:`ArgumentError`, naming both nodes and the fix.
    """
    nodes = list(graph.graph.nodes)
    root: dict[fx.Node, fx.Node] = {}
    parent: dict[fx.Node, Any] = {}
    for node in nodes:
        parent[node] = _aliased(graph, node)
        root[node] = node if parent[node] is None else root[parent[node]]
    for at, node in enumerate(nodes):
        source = _written(node)
        if not (isinstance(source, fx.Node) and in_place(graph, node)):
            continue
        if only is not None and not only(node):
            continue
        for later in nodes[at + 1 :]:
            for read in later.all_input_nodes:
                if root[read] is not root[node] or _through(read, node, parent):
                    continue
                raise ArgumentError(
                    f"{label(graph, node)} changes {source.name!r} in place, which others read "
                    f"too ({label(graph, later)} reads {read.name!r}); set inplace=False, or "
                    "write the operation out of place"
                )


def _through(read: fx.Node, node: fx.Node, parent: dict[fx.Node, Any]) -> bool:
    """Whether a value is the node's result, or a view of it."""
    at: Any = read
    while at is not None and at is not node:
        at = parent[at]
    return at is node


def check_modes(model: nn.Module) -> None:
    """Refuse a model whose forward takes another way in training than in evaluation.

    Raises :class:`ArgumentError` naming the first operation that only one mode has.
    """
    one, other = trace(model), trace(model, training=True)
    pairs: dict[fx.Node, fx.Node] = {}
    first, second = list(one.graph.nodes), list(other.graph.nodes)
    for a, b in zip(first, second, strict=False):
        same = a.op == b.op and a.target == b.target
        if same:
            mapped = fx.node.map_arg((a.args, a.kwargs), lambda n: pairs.get(n, n))
            same = repr(mapped) == repr((b.args, b.kwargs))
        if not same:
            raise ArgumentError(
                f"{type(model).__name__} computes something else in training, {label(other, b)}, "
                f"than in evaluation, {label(one, a)}. A captured graph would keep one of the two "
                "for good; use a module that knows its mode, such as nn.Dropout, in place of a "
                "branch on self.training, or modules that need no capture"
            )
        pairs[a] = b


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Run a model in a mode without gradients; buffers, modes and random state come back."""
    held = [(b, b.detach().clone()) for b in model.buffers()]
    modes = [(m, m.training) for m in model.modules()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            model.train(training)
            yield
    finally:
        with torch.no_grad():
            for buffer, value in held:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


def check_same(
    model: nn.Module,
    other: nn.Module,
    example: Any,
    what: str,
    *,
    training: bool = False,
    forward: Forward | None = None,
) -> None:
    """Refuse a rewritten network that computes something else than the model on a batch.

    Both run on a copy of the batch with the same random numbers, and keep their buffers.

    Args:
        model, other: the network, and what was made of it.
        example: one batch; a tuple or list gives its first entry, a mapping goes in by name.
        what: the rewritten network, for the message: "the folded network".
        training: compare in training mode; else in evaluation mode.
        forward: ``forward(model, batch)``, where ``model(batch)`` is not the way to run it.

    Raises :class:`ArgumentError` where outputs differ by more than 1e-3 of the largest one, or in
    shape; naming the difference.
    """
    results = []
    for network in (model, other):
        # the random state is forked: both begin with the same
        with undisturbed(network, training=training):
            torch.default_generator.manual_seed(0)
            if torch.cuda.is_initialized():
                torch.cuda.manual_seed_all(0)
            results.append(list(_tensors(_run(network, example, forward))))
    mode = "training" if training else "evaluation"
    wanted, got = results
    if [t.shape for t in wanted] != [t.shape for t in got]:
        raise ArgumentError(
            f"{what} gives shapes {[tuple(t.shape) for t in got]} where {type(model).__name__} "
            f"gives {[tuple(t.shape) for t in wanted]}"
        )
    for a, b in zip(wanted, got, strict=True):
        if not a.numel() or torch.equal(a, b):
            continue
        x, y = a.double(), b.double()
        most = float(x[x.isfinite()].abs().max()) if bool(x.isfinite().any()) else 0.0
        eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
        if not torch.allclose(x, y, rtol=0, atol=max(_TOLERANCE, 16 * eps) * most, equal_nan=True):
            off = float((x - y).abs().nan_to_num(float("inf")).max())
            raise ArgumentError(
                f"{what} differs from {type(model).__name__} in {mode} on the example batch by "
                f"{off:.3g}, where outputs reach {most:.3g}. Nothing was changed; the forward of "
                "the model does something that its graph does not hold (operations in place, "
                "hooks, branches, weights read elsewhere)"
            )


def check_or_restore(
    before: nn.Module,
    model: nn.Module,
    example: Any,
    what: str,
    held: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """:func:`check_same` of a model changed in place, which a difference puts back.

    ``held``: each tensor that was changed, and what it was.
    """
    try:
        check_same(before, model, example, what)
    except ArgumentError:
        for tensor, value in held:
            tensor.copy_(value)
        raise


def _run(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    if forward is not None:
        return forward(model, nest.mapped(Tensor.clone, batch))
    batch = batch[0] if isinstance(batch, (tuple, list)) else batch
    return nest.feed(model, nest.mapped(Tensor.clone, batch))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of every value."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run, and keep the shape."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen[n] = tuple(value.shape)
        return value


def shapes(graph: fx.GraphModule, example: Any) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every tensor of a graph on a batch, in evaluation mode.

    Raises :class:`ArgumentError` when the network does not take the batch.
    """
    runner = _Shapes(graph)
    batch = example[0] if isinstance(example, (tuple, list)) else example
    if not isinstance(batch, Tensor) or batch.ndim < 1 or not len(batch):
        raise ArgumentError(f"example is {type(example).__name__}; give one batch of inputs")
    try:
        with undisturbed(graph):
            runner.run(batch.clone())
    except RuntimeError as e:
        raise ArgumentError(
            f"the network does not take example of shape {tuple(batch.shape)}: {e}"
        ) from e
    return runner.seen
