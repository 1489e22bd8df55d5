"""What a state's network takes as a file, and whether it can be one."""

from __future__ import annotations

import torch
from torch import nn

from gossamer.compression import records
from gossamer.compression.state import State
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.pack import pack_bytes

__all__ = ["infinite_buffers", "packed"]


def packed(state: State, profile: str) -> int:
    """Bytes of the file of a state."""
    data = pack_bytes(
        state.model,
        profile=profile,
        metadata=records.metadata(state.structure),
        seeds=state.seeds,
        allow_nonfinite=infinite_buffers(state.model),
    )
    return len(data)


def infinite_buffers(model: nn.Module) -> bool:
    """Whether buffers hold infinity, as attention masks do; such a network is packed as it is.

    Raises :class:`ArgumentError` for NaN anywhere and for infinite weights, naming the tensor.
    """
    for name, tensor in names.parameters(model).items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArgumentError(
                f"{name} holds NaN or infinite values: such a network computes nothing useful; "
                "find where training diverged (a lower lr, grad_clip)"
            )
    infinite = False
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            if bool(torch.isnan(buffer).any()):
                raise ArgumentError(
                    f"buffer {names.clean(name)} holds NaN: what is computed with it is NaN; find "
                    "where training diverged (running statistics keep what they once saw)"
                )
            infinite = infinite or bool(torch.isinf(buffer).any())
    return infinite
