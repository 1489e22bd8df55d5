"""Networks as graphs: tracing by ``torch.fx``, and what a node of the graph calls.

What second derivatives, batch-norm folding and fixed-point networks share.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from gossamer.errors import ArgumentError

__all__ = ["evaluating", "in_place", "kind", "label", "trace"]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode comes back."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def trace(model: nn.Module) -> fx.GraphModule:
    """The model's graph, as in evaluation mode; it shares the model's modules.

    Raises :class:`ArgumentError` for a model that cannot be traced.
    """
    with evaluating(model):
        try:
            return fx.symbolic_trace(model)
        except Exception as e:  # tracing runs the user's own code, which may raise anything
            raise ArgumentError(
                f"{type(model).__name__} cannot be traced ({e}); its forward must not branch on "
                "values"
            ) from e


def kind(graph: fx.GraphModule, node: fx.Node) -> Any:
    """What a node calls: a module's type, a function, or a method's name."""
    return type(graph.get_submodule(str(node.target))) if node.op == "call_module" else node.target


def label(graph: fx.GraphModule, node: fx.Node) -> str:
    """A node as a message names it: ``layer1.0.act (GELU)``."""
    what = kind(graph, node)
    shown = what if isinstance(what, str) else getattr(what, "__name__", str(what))
    return f"{node.target if node.op == 'call_module' else node.name} ({shown})"


def in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node overwrites its first input."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    named = isinstance(node.target, str) and node.target.endswith("_")
    return named or node.target is operator.iadd or bool(node.kwargs.get("inplace"))
