"""Methods in a loop of one's own with Accelerate.

``accelerator.save_state`` keeps model and optimizer, and the methods' state in the optimizer's;
``accelerator.load_state`` restores all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gossamer.core.errors import ArgumentError
from gossamer.core.method import Method
from gossamer.integrations.attached import Attached
from gossamer.integrations.extras import missing

__all__ = ["attach"]


def attach(
    accelerator: Any,
    methods: Sequence[Method],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Attached:
    """Attach methods to what an ``Accelerator`` trains; call ``finish()`` of it at the end.

    Before ``accelerator.prepare`` it always works. After it, not with methods that put parameters
    of their own in the weights' place where the model was wrapped for several processes: those
    would not be averaged.

    Args:
        accelerator: an ``accelerate.Accelerator``, of processes that each hold the whole model.
        methods: attached in this order; make them as they were when a run goes on.
        model, optimizer: as they were made, or prepared.

    Raises :class:`ArgumentError` as :class:`gossamer.integrations.attached.Attached` does, for a
    sharded model (FSDP, DeepSpeed, Megatron), and for a wrapped one as said above;
    ``accelerator.load_state`` for a folder that lacks the methods' state.
    """
    try:
        from accelerate.utils import DistributedType
    except ImportError as e:
        missing("accelerate", e)
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ArgumentError(f"{kind.value} shards the model; use one process, or DDP")
    bare = accelerator.unwrap_model(model)
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    beside = [type(m).__name__ for m in methods if getattr(m, "parametrizes", False)]
    if wrapped and beside:
        raise ArgumentError(
            f"{beside[0]} puts parameters of its own in the weights' place, which the prepared "
            "model would not average over its processes; attach before accelerator.prepare"
        )
    return Attached(methods, bare, optimizer)
