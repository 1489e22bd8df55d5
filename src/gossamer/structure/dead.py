"""Neurons that pruning has cut off: units without inputs or without outputs.

Han, Pool, Tran, Dally, NIPS 2015, section 3.5: a neuron with no input or no output connections
contributes nothing, and its other connections can go too. Deviation: a unit without inputs still
emits the constant f(bias); that constant is folded into the next layer's bias first, so that the
network's outputs stay what they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gossamer.core import access, names
from gossamer.core.graph import check_or_restore, shapes, trace
from gossamer.core.masks import Masks
from gossamer.core.modes import evaluating

__all__ = ["DeadUnits", "dead_units", "remove_dead"]

_ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU)
_FUNCTIONS: dict[Any, Callable[[Tensor], Tensor] | None] = {
    F.relu: F.relu, torch.relu: torch.relu, torch.tanh: torch.tanh, torch.sigmoid: torch.sigmoid,
    "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    torch.flatten: None, "flatten": None, F.max_pool2d: None,
}  # fmt: skip


@dataclass(frozen=True)
class DeadUnits:
    """What was found, by layer (clean names without ``.weight``).

    Attributes:
        without_inputs, without_outputs: layer -> indices of its units (rows or filters).
        not_examined: layers whose outputs do not run straight into one other layer, or to an
            axis that is not known; that share parameters with another use; or whose weights are
            computed from others.
    """

    without_inputs: dict[str, list[int]]
    without_outputs: dict[str, list[int]]
    not_examined: list[str]

    @property
    def count(self) -> int:
        """Units found in all."""
        both = (self.without_inputs, self.without_outputs)
        return sum(len(set(found)) for kind in both for found in kind.values())

    def table(self) -> str:
        """The report as plain text."""
        layers = dict.fromkeys([*self.without_inputs, *self.without_outputs])
        lines = [f"{'layer':24} no inputs  no outputs"]
        for name in layers:
            ins, outs = self.without_inputs.get(name, []), self.without_outputs.get(name, [])
            lines.append(f"{name:24} {len(ins):9}  {len(outs):10}")
        return "\n".join(lines)


@dataclass
class _Link:
    """A layer, the one that alone reads it, and what happens to a constant between them."""

    name: str
    layer: Any
    next_name: str
    next_layer: Any
    between: list[Callable[[Tensor], Tensor]]

    def columns(self) -> Tensor:
        """The next layer's weight as (out, units of this layer, inputs a unit)."""
        units = self.layer.weight.shape[0]
        weight: Tensor = self.next_layer.weight
        return weight.view(weight.shape[0], units, -1)

    def constants(self) -> Tensor:
        """What each unit emits when it receives nothing: f(bias), one a unit."""
        bias = self.layer.bias
        units = self.layer.weight.shape[0]
        like = self.layer.weight
        value = like.new_zeros(units) if bias is None else bias.detach().clone()
        conv = isinstance(self.layer, nn.Conv2d)
        value = value.view(1, units, 1, 1) if conv else value.view(1, units)
        for function in self.between:
            value = function(value)
        return value.reshape(units)

    def folds(self) -> bool:
        """Whether a constant can go into the next bias: no zero padding dilutes it there."""
        padded = isinstance(self.next_layer, nn.Conv2d) and any(
            p != 0 for p in self.next_layer.padding
        )
        return self.next_layer.bias is not None and not padded


class _Chain:
    """What lies between a layer and the one that alone reads it, and where its units are there.

    Args:
        layer: whose units are followed.
        rank: of its output on a batch; None where no batch was given.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int | None) -> None:
        self.layer = layer
        self.conv = isinstance(layer, nn.Conv2d)
        self.rank = 4 if self.conv and rank is None else rank
        self.flat = False  # behind a flatten from dimension 1
        self.between: list[Callable[[Tensor], Tensor]] = []

    def takes(self, module: nn.Module | None, node: fx.Node) -> bool:
        """Go through one node; False where its effect on a unit is not known."""
        if self.conv and self.rank != 4:  # an image without a batch: its channels are axis 0
            return False
        if isinstance(module, _ELEMENTWISE):
            self.between.append(module)
        elif module is None and node.target in _FUNCTIONS and node.op != "get_attr":
            function = _FUNCTIONS[node.target]
            if function is not None:
                self.between.append(function)
            elif node.target is F.max_pool2d:
                return self.conv and not self.flat
            else:
                return self._flatten(*_ends(node))
        elif isinstance(module, nn.Flatten):
            return self._flatten(module.start_dim, module.end_dim)
        elif isinstance(module, nn.MaxPool2d):  # of (N, T, units) it would pool units
            return self.conv and not self.flat and not module.return_indices
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            fits = self.conv == isinstance(module, nn.BatchNorm2d) and not self.flat
            if not fits or module.running_mean is None or (not self.conv and self.rank != 2):
                return False
            self.between.append(module)
        else:
            return isinstance(module, (nn.Dropout, nn.Dropout2d, nn.Identity))
        return True

    def _flatten(self, start: Any, end: Any) -> bool:
        if (start, end) != (1, -1):
            return False
        self.flat = True
        return True

    def reaches(self, reader: nn.Linear | nn.Conv2d) -> bool:
        """Whether the reader's columns lie by units of the layer."""
        units = self.layer.weight.shape[0]
        if isinstance(reader, nn.Conv2d):
            return self.conv and not self.flat and reader.groups == 1 and self.rank == 4
        if self.conv:  # a linear layer on an image acts on its last axis
            return self.flat and self.rank == 4 and reader.in_features % units == 0
        # tokens that were flattened come one behind the other, each with all units
        return reader.in_features == units


def _ends(node: fx.Node) -> tuple[Any, Any]:
    """First and last dimension of a called flatten."""
    args = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False))
    found = {"start_dim": 0, "end_dim": -1, **args, **node.kwargs}
    return found["start_dim"], found["end_dim"]


def _links(model: nn.Module, example: Any) -> tuple[list[_Link], list[str]]:
    graph = trace(model)
    seen = {} if example is None else shapes(graph, example)
    known = names.cleaned(model)
    modules = dict(model.named_modules())
    # a weight or bias that serves in two places cannot be changed for one of them
    uses: Counter[int] = Counter()
    for node in graph.graph.nodes:
        used = modules.get(str(node.target)) if node.op == "call_module" else None
        uses.update(id(p) for p in (used.parameters() if used is not None else ()))
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            uses.update([id(getattr(graph.get_submodule(owner), name))] * 2)
    alone = _Alone(model, uses)
    links, others = [], []
    for node in graph.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        name, at = known[str(node.target)], node
        chain = _Chain(layer, len(seen[node]) if node in seen else None)
        link = None
        while len(at.users) == 1:
            (at,) = at.users
            module = modules.get(str(at.target)) if at.op == "call_module" else None
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                if chain.reaches(module) and alone(layer) and alone(module):
                    link = _Link(name, layer, known[str(at.target)], module, chain.between)
                break
            if at.op == "output" or not chain.takes(module, at):
                break
        if link is None:
            others.append(name)
        else:
            links.append(link)
    return links, others


class _Alone:
    """Whether a layer's parameters are its own, plain, and used once."""

    def __init__(self, model: nn.Module, uses: Counter[int]) -> None:
        self.uses, self.near = uses, access.aliases(model)
        modules = dict(model.named_modules())
        self.computed = {id(modules[d.layer]) for d in access.derived(model)}

    def __call__(self, layer: nn.Module) -> bool:
        parameters = list(layer.parameters())
        hooked = bool(layer._forward_pre_hooks or layer._forward_hooks)
        if hooked or id(layer) in self.computed or not parameters:
            return False
        return all(self.uses[id(p)] <= 1 and id(p) not in self.near for p in parameters)


@torch.no_grad()
def dead_units(model: nn.Module, example: Any = None) -> DeadUnits:
    """Units of linear and convolution layers that receive nothing, or that nothing receives.

    Looks at the weights as they are (exact zeros) and follows straight chains: elementwise
    functions, batch-norm, max-pooling, flattening and dropout between two layers. Units are
    followed only where their axis is known: a convolution's through ``flatten(1)``, a linear
    layer's as long as they are the reader's inputs one to one, through ``BatchNorm1d`` where
    ``example`` tells that it is ``(N, units)``. Other layers are told as not examined.

    Args:
        model: any that ``torch.fx`` traces.
        example: one batch of inputs, ``(N, ...)`` or a tuple that starts with them.

    Raises :class:`ArgumentError` for a network that ``torch.fx`` cannot trace, or that does not
    take ``example``.
    """
    links, others = _links(model, example)
    ins, outs = {}, {}
    for link in links:
        silent = (link.layer.weight.flatten(1) == 0).all(1)
        unread = (link.columns() == 0).all(2).all(0)
        if silent.any():
            ins[link.name] = silent.nonzero().flatten().tolist()
        if unread.any():
            outs[link.name] = unread.nonzero().flatten().tolist()
    return DeadUnits(ins, outs, others)


@torch.no_grad()
def remove_dead(model: nn.Module, masks: Masks | None = None, example: Any = None) -> DeadUnits:
    """Zero everything that only serves dead units, until none are left; returns what was found.

    The network's outputs in evaluation mode stay the same to float rounding. ``masks`` are
    narrowed in place for the weights removed. A unit without inputs whose constant cannot be
    folded (no bias behind it, or zero padding) stays.

    Args:
        model: as for :func:`dead_units`.
        masks: clean name -> mask.
        example: as there; the outputs on it before and after are compared.

    Raises :class:`ArgumentError` as :func:`dead_units`, and with the weights as they were where
    outputs on ``example`` differ.
    """
    with evaluating(model):
        found = dead_units(model, example)
        links, _ = _links(model, example)
        touched = {id(p): p for k in links for m in (k.layer, k.next_layer) for p in m.parameters()}
        held = [(p, p.clone()) for p in touched.values()]
        before = access.copied(model) if example is not None else None
        changed = True
        while changed:
            changed = False
            for link in links:
                changed |= _silence(link)
        if before is not None:
            what = "the network without its dead units"
            check_or_restore(before, model, example, what, held)
        if masks is not None:
            for name, weight in names.parameters(model).items():
                if name in masks:
                    masks[name] = masks[name] & (weight.detach() != 0)
    return found


def _silence(link: _Link) -> bool:
    """One pass over a link; whether it removed anything."""
    changed = False
    columns, weight, bias = link.columns(), link.layer.weight, link.layer.bias
    silent = (weight.flatten(1) == 0).all(1) & (columns != 0).any(2).any(0)
    if silent.any():
        constants = link.constants()
        quiet = silent & (constants == 0)
        if link.folds():
            gain = (columns.sum(2) * constants)[:, silent].sum(1)
            link.next_layer.bias += gain
            columns[:, silent] = 0
            changed = True
        elif quiet.any():
            columns[:, quiet] = 0
            changed = True
    unread = (columns == 0).all(2).all(0)
    alive = (weight.flatten(1) != 0).any(1)
    if bias is not None:
        alive |= bias != 0
    gone = unread & alive
    if gone.any():
        weight[gone] = 0
        if bias is not None:
            bias[gone] = 0
        changed = True
    return changed
