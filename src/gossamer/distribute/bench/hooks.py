"""The hooks that ``gossamer bench exchange`` compares."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

__all__ = ["HOOKS", "register"]

Close = Callable[[], None]


def _nothing() -> None:
    pass


def _none(ddp: DistributedDataParallel, model: nn.Module) -> Close:
    return _nothing


def _fp16(ddp: DistributedDataParallel, model: nn.Module) -> Close:
    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return _nothing


def _powersgd(ddp: DistributedDataParallel, model: nn.Module) -> Close:
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return _nothing


HOOKS: dict[str, Callable[[DistributedDataParallel, nn.Module], Close]] = {
    "none": _none,
    "fp16": _fp16,
    "powersgd-1": _powersgd,
}
"""Name -> what registers it and returns what ends it."""


def register(name: str, ddp: DistributedDataParallel, model: nn.Module) -> Close:
    """Register a hook of :data:`HOOKS`; returns a function to call when all is done."""
    return HOOKS[name](ddp, model)
