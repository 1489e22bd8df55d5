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

from gossamer import names
from gossamer.errors import ArgumentError
from gossamer.masks import Masks

__all__ = ["DeadUnits", "dead_units", "remove_dead"]

_ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU)
_CONSTANT_KEEPING = (nn.MaxPool2d, nn.Flatten, nn.Dropout, nn.Dropout2d, nn.Identity)
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
        not_examined: layers whose outputs do not run straight into one other layer, or that
            share parameters with another use.
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
        value = torch.zeros(units) if bias is None else bias.detach().clone()
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


def _links(model: nn.Module) -> tuple[list[_Link], list[str]]:
    try:
        graph = fx.symbolic_trace(model)
    except Exception as e:  # tracing runs the user's own code, which may raise anything
        raise ArgumentError(f"{type(model).__name__} cannot be traced: {e}") from e
    modules = dict(model.named_modules())
    # a weight or bias that serves in two places cannot be changed for one of them
    uses: Counter[int] = Counter()
    for node in graph.graph.nodes:
        used = modules.get(str(node.target)) if node.op == "call_module" else None
        uses.update(id(p) for p in (used.parameters() if used is not None else ()))
    links, others = [], []
    for node in graph.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        name, at = names.clean(str(node.target)), node
        between: list[Callable[[Tensor], Tensor]] = []
        while True:
            users = list(at.users)
            at = users[0] if len(users) == 1 else None
            if at is None or at.op == "output":
                others.append(name)
                break
            module = modules.get(str(at.target)) if at.op == "call_module" else None
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                grouped = isinstance(module, nn.Conv2d) and module.groups != 1
                fits = module.weight[0].numel() % layer.weight.shape[0] == 0
                both = (*layer.parameters(), *module.parameters())
                if grouped or not fits or any(uses[id(p)] > 1 for p in both):
                    others.append(name)
                else:
                    links.append(_Link(name, layer, names.clean(str(at.target)), module, between))
                break
            if isinstance(module, (*_ELEMENTWISE, nn.BatchNorm1d, nn.BatchNorm2d)):
                between.append(module)
            elif module is None and at.target in _FUNCTIONS:
                function = _FUNCTIONS[at.target]
                between += [] if function is None else [function]
            elif not isinstance(module, _CONSTANT_KEEPING):
                others.append(name)
                break
    return links, others


@torch.no_grad()
def dead_units(model: nn.Module) -> DeadUnits:
    """Units of linear and convolution layers that receive nothing, or that nothing receives.

    Looks at the weights as they are (exact zeros) and follows straight chains: elementwise
    functions, batch-norm, max-pooling, flattening and dropout between two layers. Raises
    :class:`ArgumentError` for a network that ``torch.fx`` cannot trace.
    """
    links, others = _links(model)
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
def remove_dead(model: nn.Module, masks: Masks | None = None) -> DeadUnits:
    """Zero everything that only serves dead units, until none are left; returns what was found.

    The network's outputs in evaluation mode stay the same to float rounding. ``masks`` are
    narrowed in place for the weights removed. A unit without inputs whose constant cannot be
    folded (no bias behind it, or zero padding) stays.
    """
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        found = dead_units(model)
        links, _ = _links(model)
        changed = True
        while changed:
            changed = False
            for link in links:
                changed |= _silence(link)
        if masks is not None:
            for name, weight in names.parameters(model).items():
                if name in masks:
                    masks[name] = masks[name] & (weight.detach() != 0)
    finally:
        for module, mode in training.items():
            module.training = mode
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
