"""Who reads and writes a tensor: weights that are computed, and tensors that share memory.

Whatever rewrites a weight, or reads it as a plain one, asks here first. A weight may be

- *derived*: computed before each use from other parameters, by a parametrization
  (``torch.nn.utils.parametrize``) or by a hook of the older kind (``torch.nn.utils.prune``,
  ``weight_norm``, ``spectral_norm``). What is written to it is lost, and its sources are no
  weights: half of the entries of ``weight_v`` at zero leave no such layer;
- *aliased*: another parameter or buffer lies in the same memory without being the same object,
  so that a change of one changes the other.

Tensors that are one object in several places (tied) are found by :func:`gossamer.core.names.tied`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.core.errors import ArgumentError

__all__ = ["Derived", "aliases", "check_plain", "check_weights", "copied", "derived", "is_own"]

# The hooks' modules in torch: how a message calls them, and what takes them off.
_HOOKS = {
    "torch.nn.utils.weight_norm": (
        "torch.nn.utils.weight_norm",
        "torch.nn.utils.remove_weight_norm({layer}, {attribute!r})",
    ),
    "torch.nn.utils.spectral_norm": (
        "torch.nn.utils.spectral_norm",
        "torch.nn.utils.remove_spectral_norm({layer}, {attribute!r})",
    ),
    "torch.nn.utils.prune": (
        "torch.nn.utils.prune",
        "torch.nn.utils.prune.remove({layer}, {attribute!r})",
    ),
}


@dataclass(frozen=True)
class Derived:
    """A tensor of a layer that is computed from others before each use.

    Attributes:
        layer: path of the layer, as torch names it; empty for the model itself.
        attribute: the tensor's name in the layer.
        sources: the parameters that it is computed from.
        names: theirs in the layer.
        how: what computes it.
        fix: the call that makes it a plain parameter.
        own: whether a method of this library does it, which its ``finish()`` ends.
    """

    layer: str
    attribute: str
    sources: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    how: str
    fix: str
    own: bool

    def __str__(self) -> str:
        """A clause for a message: what is computed from what, and the fix."""
        where = f"{self.layer}.{self.attribute}".lstrip(".")
        source = f" from {', '.join(self.names)}" if self.names else ""
        return f"{where} is computed{source} by {self.how}; {self.fix}"


def is_own(module: nn.Module) -> bool:
    """Whether a parametrization is one of this library's, or made from one."""
    return any(c.__module__.partition(".")[0] == "gossamer" for c in type(module).__mro__)


def derived(model: nn.Module) -> list[Derived]:
    """Every tensor of the model that is computed from parameters, in definition order.

    >>> net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    >>> [(d.layer, d.attribute, d.how) for d in derived(net)]
    [('0', 'weight', 'the parametrization _WeightNorm')]
    """
    return [d for path, module in model.named_modules() for d in _of(module, path)]


def _of(module: nn.Module, path: str) -> Iterator[Derived]:
    layer = f"model.get_submodule({path!r})" if path else "model"
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)  # so torch registers them
        for attribute, steps in module.parametrizations.items():
            own = all(is_own(step) for step in steps.children())
            kinds = ", ".join(type(step).__name__ for step in steps.children())
            held = steps._parameters
            yield Derived(
                path,
                attribute,
                tuple(p for p in held.values() if p is not None),
                tuple(f"parametrizations.{attribute}.{n}" for n in held),
                f"the parametrization {kinds}",
                "finish() the method that made it so"
                if own
                else "torch.nn.utils.parametrize.remove_parametrizations("
                f"{layer}, {attribute!r}) makes it plain (a method that put it there does so by "
                "finish())",
                own,
            )
    for attribute, value in vars(module).items():
        if not isinstance(value, Tensor):
            continue
        held = {n: p for n, p in module._parameters.items() if n.startswith(f"{attribute}_")}
        if not held and not (
            attribute in ("weight", "bias") and type(module).__module__.startswith("torch.nn.")
        ):
            continue  # a constant of the user's own
        how, fix = "something outside its parameters", "make it an nn.Parameter"
        for hook in module._forward_pre_hooks.values():
            kind = type(hook)
            for base in kind.__mro__:
                named = getattr(hook, "name", getattr(hook, "_tensor_name", None))
                if base.__module__ in _HOOKS and named == attribute:
                    how, fix = _HOOKS[base.__module__]
                    fix = fix.format(layer=layer, attribute=attribute) + " makes it plain"
        yield Derived(
            path,
            attribute,
            tuple(p for p in held.values() if p is not None),
            tuple(held),
            how,
            fix,
            False,
        )


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model.

    Raises :class:`ArgumentError`, naming a tensor that is computed and the fix, for a model that
    cannot be copied: an old-style hook leaves a tensor in it that is no parameter.
    """
    try:
        return copy.deepcopy(model)
    except Exception as e:  # copying runs the user's own code, which may raise anything
        for found in derived(model):
            if not found.own:
                layer = found.layer or "the model"
                raise ArgumentError(f"{layer} cannot be copied: {found}") from e
        raise ArgumentError(f"{type(model).__name__} cannot be copied: {e}") from e


def check_plain(module: nn.Module, name: str, doing: str) -> None:
    """Raise :class:`ArgumentError` for a layer whose weight or bias is computed from others.

    Args:
        module: the layer; what is below it is not looked at.
        name: the layer's, for the message.
        doing: the rest of "it cannot be ...": "folded into".
    """
    for found in _of(module, name):
        raise ArgumentError(f"{name or 'the layer'} cannot be {doing}: {found}")


def check_weights(model: nn.Module, chosen: Mapping[str, Tensor]) -> None:
    """Refuse chosen weights that are sources of a derived one, or that share memory.

    Weights that a method of this library computes pass: it holds their latent values.

    Raises :class:`ArgumentError` naming the weight and the fix.
    """
    ids = {id(p): name for name, p in chosen.items()}
    for found in derived(model):
        if not found.own and any(id(p) in ids for p in found.sources):
            raise ArgumentError(
                f"{found}. What it is computed from are no weights to compress; exclude= leaves "
                "the layer out"
            )
    shared = aliases(model)
    for name, p in chosen.items():
        for other in shared.get(id(p), ()):
            raise ArgumentError(
                f"{name} lies in the same memory as {other} without being the same parameter, so "
                "that a change of one changes the other: tie them (assign one parameter to both), "
                "or give one a clone() of its own"
            )


def aliases(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter or buffer -> names of others in its memory that are not the same object.

    Memory is compared by the span from a tensor's first to its last entry, so that interleaved
    columns of one matrix count as shared.

    >>> net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    >>> net["b"].weight = nn.Parameter(net["a"].weight.detach().T)
    >>> aliases(net)[id(net["a"].weight)]
    ['b.weight']
    """
    spans: dict[tuple[torch.device, int], list[tuple[int, int, str, Tensor]]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        place = _span(tensor)
        if place is not None:
            device, storage, start, end = place
            spans.setdefault((device, storage), []).append((start, end, name, tensor))
    found: dict[int, list[str]] = {}
    for held in spans.values():
        held.sort(key=lambda row: row[:2])
        active: list[tuple[int, int, str, Tensor]] = []
        for row in held if len(held) > 1 else ():
            active = [a for a in active if a[1] > row[0]]
            for other in active:
                found.setdefault(id(row[3]), []).append(other[2])
                found.setdefault(id(other[3]), []).append(row[2])
            active.append(row)
    return found


def _span(tensor: Tensor) -> tuple[torch.device, int, int, int] | None:
    """Device, storage, first and last byte + 1; None where there is no memory to speak of."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return None
    if type(tensor) not in (Tensor, nn.Parameter):  # a subclass need not have a storage
        return None
    size = tensor.element_size()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * size
    return tensor.device, tensor.untyped_storage().data_ptr(), start, start + int(last + 1) * size
