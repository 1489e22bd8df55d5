"""Weights computed from another parameter: what parametrizing methods share.

A shared weight is computed from its code book, a masked one from its scores. The other parameter
takes the weight's place in the module (``torch.nn.utils.parametrize``) and in the optimizer's
groups, so any training loop updates it and needs to know nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.core.errors import ArgumentError

__all__ = ["Computed", "Latent", "adopt", "check_norm", "dense", "own_class", "release", "swap"]


class Computed(nn.Module):
    """Base of the parametrizations: ``forward(latent)`` is the weight.

    Args:
        start: what the parameter is at first.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self._start = [start]  # used once; in a list, where no state_dict or move finds it

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        """The parameter's first value, whatever the weight is."""
        # A tuple: the parametrization gets a new parameter, where a tensor would be written
        # into the weight's own and break any graph that still holds it.
        return (self._start.pop(),)


class Latent:
    """One weight of a model, tied places included, and the parameter it is computed from.

    Args:
        model: the weight's model; nothing is changed yet.
        name: clean name, for messages.
        plain: the weight's own parameter.

    Raises :class:`ArgumentError` for a weight that is parametrized already, or an embedding's
    that is renormalised in place.
    """

    def __init__(self, model: nn.Module, name: str, plain: nn.Parameter) -> None:
        self.plain = plain
        self.places = [
            (module, attribute, list(module._parameters))
            for module in model.modules()
            if not isinstance(module, parametrize.ParametrizationList)
            for attribute, held in module._parameters.items()
            if held is plain
        ]
        if not self.places:
            raise ArgumentError(
                f"{name} is parametrized already; finish() the method that did so first"
            )
        for module, _, _ in self.places:
            check_norm(module, name)

    def register(self, module: Computed) -> None:
        """Compute the weight by ``module`` from now on, everywhere it stands."""
        first: nn.Parameter | None = None
        for owner, attribute, _ in self.places:
            if first is not None:  # tied: the same parameter there
                module._start.append(first.detach())
            if parametrize.is_parametrized(owner):
                own_class(owner)
            parametrize.register_parametrization(owner, attribute, module, unsafe=True)
            entry = _list(owner, attribute)
            if first is None:
                first = entry.original0
            else:
                entry.original0 = first
            if isinstance(owner, nn.RNNBase):
                _compute_flat(owner)

    @property
    def module(self) -> Any:
        """The registered parametrization."""
        owner, attribute, _ = self.places[0]
        return _list(owner, attribute)[0]

    @property
    def parameter(self) -> nn.Parameter:
        """What the optimizer moves."""
        owner, attribute, _ = self.places[0]
        found: nn.Parameter = _list(owner, attribute).original0
        return found

    @torch.no_grad()
    def restore(self, value: Tensor) -> None:
        """The plain parameter again, everywhere it stood, with ``value``."""
        self.plain.copy_(value)
        self.plain.grad = None
        for owner, attribute, order in self.places:
            own_class(owner)
            parametrize.remove_parametrizations(owner, attribute, leave_parametrized=True)
            delattr(owner, attribute)
            owner.register_parameter(attribute, self.plain)
            # The order of parameters is how optimizers and checkpoints tell them apart.
            for key in order:
                if key in owner._parameters:
                    owner._parameters[key] = owner._parameters.pop(key)
        for owner, _, _ in self.places:
            if isinstance(owner, nn.RNNBase):
                owner._init_flat_weights()


def swap(optimizer: torch.optim.Optimizer | None, new: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Replace parameters in the optimizer's groups; their buffers no longer fit and go."""
    if optimizer is None:
        return
    by_id = {id(old): p for old, p in new.items()}
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            if id(p) in by_id:
                optimizer.state.pop(p, None)
                p.grad = None
                group["params"][i] = by_id[id(p)]


def adopt(
    optimizer: torch.optim.Optimizer | None,
    beside: Mapping[nn.Parameter, nn.Parameter],
    weight_decay: float | None,
    lr_factor: float = 1.0,
) -> None:
    """Let the optimizer train new parameters beside those it holds, with the same options.

    Args:
        beside: new parameter -> the one whose group's options it takes; where the optimizer does
            not hold that one, it does not get the new one either.
        weight_decay: of the new parameters, in a group of their own where it differs; None: the
            group's.
        lr_factor: the new parameters' learning rate over the group's, in a group of their own
            where it is not 1. The rate that schedules start from, ``initial_lr``, gets it too.
    """
    if optimizer is None:
        return
    _take_out(optimizer, {id(p) for p in beside})
    for group in list(optimizer.param_groups):
        held = {id(p) for p in group["params"]}
        mine = [new for new, old in beside.items() if id(old) in held]
        if not mine:
            continue
        other: dict[str, Any] = {}
        if weight_decay is not None and weight_decay != group.get("weight_decay", 0):
            other["weight_decay"] = weight_decay
        if lr_factor != 1:
            other |= {k: group[k] * lr_factor for k in ("lr", "initial_lr") if k in group}
        if other:
            options = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group({**options, "params": mine, **other})
        else:
            group["params"] += mine


def release(optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters, and groups that held nothing else, out of the optimizer."""
    if optimizer is None:
        return
    gone = list(parameters)
    _take_out(optimizer, {id(p) for p in gone})
    for p in gone:
        optimizer.state.pop(p, None)


def _take_out(optimizer: torch.optim.Optimizer, gone: set[int]) -> None:
    groups = []
    for group in optimizer.param_groups:
        rest = [p for p in group["params"] if id(p) not in gone]
        if rest or not group["params"]:
            groups.append(group)
        group["params"][:] = rest
    optimizer.param_groups[:] = groups


def _list(owner: nn.Module, attribute: str) -> Any:
    return owner.parametrizations[attribute]  # type: ignore[index]


def dense(grad: Tensor) -> Tensor:
    """A gradient as a strided tensor: an embedding's may be sparse, which few products take."""
    return grad if grad.layout is torch.strided else grad.to_dense()


def check_norm(module: nn.Module, name: str) -> None:
    """Raise :class:`ArgumentError` for an embedding with ``max_norm``.

    It writes shorter rows into its weight at every forward pass, where a computed weight has
    nothing that lasts to write into.
    """
    limit = getattr(module, "max_norm", None)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and limit is not None:
        raise ArgumentError(
            f"{name} belongs to {type(module).__name__} with max_norm={limit}, whose forward pass "
            "shortens its rows in place, off the values that they are held at; set its max_norm "
            "to None (after one torch.renorm of the weight), or exclude it"
        )


def own_class(owner: nn.Module) -> None:
    """Part a parametrized module from its deep copies, before its parametrizations change.

    torch gives the module a class of its own, which deep copies share: a parametrization added
    or taken away adds or deletes an attribute of that class, and would in the copies too.
    """
    cls = type(owner)
    held = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    owner.__class__ = type(cls.__name__, cls.__bases__, held)


def _compute_flat(owner: nn.RNNBase) -> None:
    # Recurrent modules compute from a list of their weights, kept beside them: stale after a
    # step, another module's after a deep copy, which refuses tensors with a history besides. In
    # torch's class of the parametrized module it is computed, as the weights are.
    def flat(self: Any) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    vars(owner).pop("_flat_weights", None)
    type(owner)._flat_weights = property(flat, lambda self, value: None)  # type: ignore[assignment]
