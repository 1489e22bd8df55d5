"""Whether two networks do the same operations, so that a difference in time is noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["same_operations"]


def same_operations(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks are built of the same modules over tensors of the same shapes.

    Values do not count: a dense kernel takes as long over zeros. What a module's ``extra_repr``
    says (strides, groups, sizes) counts.
    """
    mine, others = list(one.named_modules()), list(other.named_modules())
    if len(mine) != len(others):
        return False
    for (name, a), (there, b) in zip(mine, others, strict=True):
        if name != there or type(a) is not type(b) or a.extra_repr() != b.extra_repr():
            return False
    state, rest = one.state_dict(), other.state_dict()
    return list(state) == list(rest) and all(
        _kind(state[name]) == _kind(rest[name]) for name in state
    )


def _kind(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return type(value)
    return value.shape, value.dtype, value.layout, value.device, value.is_quantized
