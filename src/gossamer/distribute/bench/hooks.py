"""The hooks that ``gossamer bench exchange`` compares."""

from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from gossamer.distribute import GradCodec, SQm, TernGrad
from gossamer.distribute.ddp.hook import GradientExchange
from gossamer.distribute.exchange.topology import Topology

__all__ = ["HOOKS", "Close", "register"]

Close = Callable[[], None]


def _nothing() -> None:
    pass


def _none(ddp: DistributedDataParallel, model: nn.Module) -> Close:
    return _nothing


# DDP reads the annotations: they must not be strings
def _unchanged(_: object, bucket: dist.GradBucket) -> Future[Tensor]:
    future: Future[Tensor] = Future()
    future.set_result(bucket.buffer())
    return future


def _local(ddp: DistributedDataParallel, model: nn.Module) -> Close:
    ddp.register_comm_hook(None, _unchanged)
    return _nothing


def _fp16(ddp: DistributedDataParallel, model: nn.Module) -> Close:
    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return _nothing


def _powersgd(ddp: DistributedDataParallel, model: nn.Module) -> Close:
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return _nothing


def _ours(
    ddp: DistributedDataParallel,
    model: nn.Module,
    *,
    codec: GradCodec,
    topology: Topology,
    checksum: bool = False,
) -> Close:
    state = GradientExchange(model, codec, topology=topology, checksum=checksum)
    ddp.register_comm_hook(state, GradientExchange.hook)
    return state.close


HOOKS: dict[str, Callable[[DistributedDataParallel, nn.Module], Close]] = {
    "none": _none,
    "local": _local,
    "fp16": _fp16,
    "powersgd-1": _powersgd,
    "terngrad": partial(_ours, codec=TernGrad(), topology="all_gather"),
    "terngrad-checksum": partial(_ours, codec=TernGrad(), topology="all_gather", checksum=True),
    "terngrad-two-phase": partial(_ours, codec=TernGrad(), topology="two_phase"),
    "terngrad-server": partial(_ours, codec=TernGrad(), topology="server"),
    "sq3": partial(_ours, codec=SQm(3, clip=3.0), topology="all_gather"),
}
"""Name -> what registers it and returns what ends it. ``local`` exchanges nothing."""


def register(name: str, ddp: DistributedDataParallel, model: nn.Module) -> Close:
    """Register a hook of :data:`HOOKS`; returns a function to call when all is done."""
    return HOOKS[name](ddp, model)
