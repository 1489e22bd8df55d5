"""Every module of a network in every place that it has, and what its tensors are called there.

Parametrized modules store ``parametrizations.weight.original``, and torch's wrappers put a child
of their own between themselves and the network. What a wrapper added is told by the wrapper's
class, never by the name: a submodule may really be called ``module``. :mod:`gossamer.core.names`
makes the names of it that users see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from gossamer.core import access
from gossamer.core.errors import ArgumentError

__all__ = ["Place", "join", "walk"]

# The child that each of torch's wrappers puts between itself and the network, by the wrapper's
# class (a name, so that nothing is imported for it). A submodule of the user's own that is called
# ``module`` is no such child.
_ADDED = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "_fsdp_wrapped_module"
    ),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": (
        "_checkpoint_wrapped_module"
    ),
}
_LEFT_OUT = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of state_dict, by torch


def join(head: str, leaf: str) -> str:
    """The name of ``leaf`` below ``head``, either of which may be empty."""
    return f"{head}.{leaf}" if head and leaf else head or leaf


def _added(module: nn.Module) -> str | None:
    """The child that the module wraps, where the module is one of torch's wrappers."""
    for kind in type(module).__mro__:
        child = _ADDED.get(f"{kind.__module__}.{kind.__qualname__}")
        if child is not None:
            return child
    return None


@dataclass(frozen=True)
class Place:
    """A module in one of its places: torch's name, that of ``state_dict``, and the clean one."""

    module: nn.Module
    raw: str
    stored: str
    clean: str
    tensors: dict[str, str]  # its own parameters and buffers -> their clean names
    weight: str = ""  # of a list of parametrizations: the clean name of what it computes


def walk(
    module: nn.Module, raw: str = "", stored: str = "", clean: str = "", at: str = ""
) -> Iterator[Place]:
    """Every module in every place; ``at`` is what the names of its tensors begin with."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ArgumentError(
            f"{clean or 'the model'} is compiled by torch.jit ({type(module).__name__}), whose "
            "parameters cannot be replaced; give the nn.Module that it was made from"
        )
    own = (*module._parameters, *module._buffers)
    yield Place(module, raw, stored, clean, {name: join(at, name) for name in own})
    added = _added(module)
    for name, child in module._modules.items():
        if child is None:
            continue
        to = (join(raw, name), join(stored, name))
        if name == "parametrizations" and parametrize.is_parametrized(module):
            yield from _parametrizations(child, *to, join(clean, name), at)
        elif name == added:
            yield from walk(child, to[0], stored if name in _LEFT_OUT else to[1], clean, at)
        else:
            yield from walk(child, *to, join(clean, name), join(at, name))


def _parametrizations(
    lists: nn.Module, raw: str, stored: str, clean: str, at: str
) -> Iterator[Place]:
    """What computes a module's tensors: its latent parameters, and what stands beside them."""
    yield Place(lists, raw, stored, clean, {})
    for attribute, steps in lists.named_children():
        weight, here = join(at, attribute), join(join(at, "parametrizations"), attribute)
        own = all(access.is_own(step) for step in steps.children())
        tensors = {
            # the latent weight of a method of ours; other sources are no weights
            name: weight if own and name in ("original", "original0") else join(here, name)
            for name in (*steps._parameters, *steps._buffers)
        }
        to = (join(raw, attribute), join(stored, attribute), join(clean, attribute))
        yield Place(steps, *to, tensors, weight)
        for number, step in steps.named_children():
            beside = weight if number == "0" else join(weight, number)
            there = (join(to[0], number), join(to[1], number), join(to[2], number))
            yield from walk(step, *there, beside)
