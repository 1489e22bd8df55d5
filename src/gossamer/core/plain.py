"""A user's network as a run takes it: a copy of its own, without wrappers, of plain weights.

Wrappers of other libraries (data parallel, ``torch.compile``, Lightning, PEFT's adapters) and
derived weights (weight norm, spectral norm, torch's pruning) hide
the tensors that are trained, stored and loaded. A run works on a network of the same function
without them, and says what it took off. The network that a file is proved with is treated alike.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gossamer.core.errors import ArgumentError
from gossamer.core.made import mark
from gossamer.core.modes import evaluating

__all__ = ["copied", "plain", "unwrapped"]

_COPIES = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # their network is ``.module``


def copied(model: nn.Module, what: str = "model") -> nn.Module:
    """A deep copy that shares no tensor with the original.

    Tensors that a hook leaves on a module (weight norm's ``weight``) are no leaves, which plain
    ``deepcopy`` refuses; they are copied by value, and the hook makes them anew.

    Raises :class:`ArgumentError` for a network that cannot be copied, saying why.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        with warnings.catch_warnings():
            if isinstance(model, fx.GraphModule):  # torch's own copying warns of itself
                warnings.simplefilter("ignore", FutureWarning)
            return copy.deepcopy(model, memo)
    except Exception as e:  # whatever a user's own __deepcopy__ or __getstate__ raises
        reason = (str(e).strip().splitlines() or [""])[0][:200]
        raise ArgumentError(
            f"{what} {type(model).__name__} cannot be copied ({type(e).__name__}: {reason}), and a "
            "run leaves the network it is given as it is; keep what cannot be copied (locks, "
            "files, generators) out of the module, or name the function that builds it: "
            "model='file.py:function'"
        ) from e


def unwrapped(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The network inside DataParallel, DistributedDataParallel and ``torch.compile``; and a note.

    A LightningModule without a ``forward`` of its own is a wrapper as well.

    Raises :class:`ArgumentError` for TorchScript and sharded (FSDP) networks, which have none.
    """
    told: list[str] = []
    while (inner := _inner(model)) is not None:
        told.append(f"{type(model).__name__} is left out: the network inside it is compressed")
        model = inner
    for name, module in model.named_modules():
        _refuse(name, module)
    return model, told


def plain(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The network inside its wrappers, with plain weights; what was taken off, in words.

    ``model`` is changed: compiled parts are unwrapped too, adapters of PEFT merged;
    parametrizations and the older hooks that derive a weight are evaluated once, in evaluation
    mode, and taken off. The function stays the same.

    Raises :class:`ArgumentError` as :func:`unwrapped` does.
    """
    model, told = unwrapped(model)
    model, more = _merged(model)
    told += more
    if isinstance(model, fx.GraphModule):
        mark(model)
    for name, module in list(model.named_modules()):
        for key, child in list(module.named_children()):
            while (inner := _inner(child)) is not None:
                setattr(module, key, inner)
                told.append(f"{name}.{key}".lstrip(".") + f" is unwrapped ({type(child).__name__})")
                child = inner
    unwrapped(model)  # and what the parts wrapped may be refused as well
    for name, module in list(model.named_modules()):
        told += _bake(name, module)
    return model, told


def _inner(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps; None for a network."""
    if isinstance(module, _COPIES):
        inner = module.module
    elif type(module).__name__ == "OptimizedModule":  # torch.compile; its module is private
        inner = module._orig_mod
    elif _is("LightningModule", module) and not _has_forward(module):
        inner = _only_child(module)
    else:
        return None
    assert isinstance(inner, nn.Module)  # the classes' own invariant
    return inner


def _is(kind: str, module: nn.Module) -> bool:
    """Whether a class of this name of Lightning or PEFT is among the module's."""
    origins = ("lightning", "pytorch_lightning", "peft")
    return any(
        k.__name__ == kind and k.__module__.partition(".")[0] in origins
        for k in type(module).__mro__
    )


def _has_forward(module: nn.Module) -> bool:
    """Whether a LightningModule says itself what it computes."""
    first = next(k for k in type(module).__mro__ if "forward" in vars(k))
    return first is not nn.Module and first.__name__ != "LightningModule"


def _only_child(module: nn.Module) -> nn.Module:
    """The child that holds all parameters; Lightning's metrics and losses hold none."""
    found = [c for c in module.children() if next(c.parameters(), None) is not None]
    if len(found) != 1 or next(module.parameters(recurse=False), None) is not None:
        raise ArgumentError(
            f"{type(module).__name__} is a LightningModule without a forward, and holds "
            f"{len(found)} networks; give it a forward, or give the network in it"
        )
    return found[0]


def _merged(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The network with adapters of PEFT added to the weights that they adapt."""
    told: list[str] = []
    for name, module in [("", model), *model.named_modules()]:
        merge: Any = module
        if _is("PeftModel", module):
            if not hasattr(merge.base_model, "merge_and_unload"):
                raise ArgumentError(
                    f"{name or 'the network'} is prompted by PEFT ({type(module).__name__}), which "
                    "cannot be merged into weights; compress the network within"
                )
            inner = merge.merge_and_unload(safe_merge=True)
        elif _is("BaseTunerLayer", module) and hasattr(module, "merge"):
            merge.merge(safe_merge=True)
            inner = merge.get_base_layer()
        else:
            continue
        told.append(f"{name or 'the network'}: PEFT's adapters are merged into its weights")
        if not name:
            return inner, told
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, inner)
    return model, told


def _refuse(name: str, module: nn.Module) -> None:
    where = name or "model"
    if isinstance(module, torch.jit.ScriptModule):
        raise ArgumentError(
            f"{where} is TorchScript ({type(module).__name__}), which can be neither changed nor "
            "built anew; give the nn.Module that it was made from, or the name of its file"
        )
    if type(module).__name__ in ("FullyShardedDataParallel", "FSDPModule"):
        raise ArgumentError(
            f"{where} is sharded ({type(module).__name__}): each process holds a part of it; "
            "gather its full state_dict and load that into the plain network"
        )


def _bake(name: str, module: nn.Module) -> list[str]:
    """Take derivations of weights off a module, keeping what they give."""
    told: list[str] = []
    where = name or "the network"
    with evaluating(module):  # spectral norm's power iteration stands still
        if parametrize.is_parametrized(module):
            told += [f"{where}: {line}" for line in _without_parametrizations(module)]
        for number, hook in list(module._forward_pre_hooks.items()):
            if not isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
                continue
            kind = type(hook).__name__
            key = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
            hook.remove(module)
            del module._forward_pre_hooks[number]
            _without_state_hooks(module, hook)
            told.append(f"{where}: {key} is taken as it is, its {kind} taken off")
    return told


def _without_parametrizations(module: nn.Module) -> list[str]:
    """Plain tensors in place of parametrized ones.

    torch's own ``remove_parametrizations`` takes them off the class, which copies share.
    """
    told, values = [], {}
    lists: Any = module.parametrizations
    for key, found in lists.items():
        with torch.no_grad():
            value = getattr(module, key).detach().clone()
        first = found.original if hasattr(found, "original") else found.original0
        values[key] = value, first
        kinds = ", ".join(type(p).__name__.lstrip("_") for p in found)
        told.append(f"{key} is taken as it is, its {kinds} taken off")
    for number, other in list(module._load_state_dict_pre_hooks.items()):
        inner = getattr(other, "hook", other)  # weight norm's reader of files in the older form
        if getattr(inner, "__module__", "") == "torch.nn.utils.parametrizations":
            del module._load_state_dict_pre_hooks[number]
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for key, (value, first) in values.items():
        if isinstance(first, nn.Parameter):
            module.register_parameter(key, nn.Parameter(value, requires_grad=first.requires_grad))
        else:
            module.register_buffer(key, value)
    return told


def _without_state_hooks(module: nn.Module, hook: object) -> None:
    """Spectral norm adds hooks on saving and loading, which would look for what is gone."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for number, other in list(hooks.items()):
            inner = getattr(other, "hook", other)
            if getattr(inner, "fn", None) is hook:
                del hooks[number]
