"""Tensors in tuples, lists, mappings and dataclasses: what networks take, and what they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError

__all__ = ["count", "feed", "leaves", "mapped", "moved", "shown"]


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a nest, in order; other values are passed over.

    >>> [tuple(t.shape) for t in leaves({"a": torch.zeros(2), "b": (torch.zeros(1, 3), None)})]
    [(2,), (1, 3)]
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = tuple(getattr(value, f.name) for f in fields(value))
    return [t for part in value for t in leaves(part)] if isinstance(value, (tuple, list)) else []


def mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The nest with every tensor changed; mappings become plain dictionaries."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(change, part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(change, part) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(change, part) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: mapped(change, getattr(value, f.name)) for f in fields(value) if f.init}
        return replace(value, **own)
    return value


def moved(value: Any, device: torch.device | str) -> Any:
    """The nest on a device."""
    return mapped(lambda t: t.to(device), value)


def count(value: Any, what: str = "inputs") -> int:
    """The examples of a nest: the first dimension, which all its tensors share.

    Raises :class:`ArgumentError` where there is no tensor, a scalar, or lengths differ.
    """
    found = leaves(value)
    if not found:
        raise ArgumentError(f"{what} hold no tensor: {shown(value)}")
    if any(t.ndim == 0 for t in found):
        raise ArgumentError(f"{what} hold a scalar; the first dimension counts the examples")
    if len({len(t) for t in found}) > 1:
        raise ArgumentError(
            f"{what} differ in their first dimension, which counts the examples: {shown(value)}"
        )
    return len(found[0])


def feed(model: nn.Module, inputs: Any) -> Any:
    """What the network gives: a mapping goes in by name, a tuple or list in order."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def shown(value: Any) -> str:
    """Shapes and types in words, for messages.

    >>> shown({"ids": torch.zeros(2, 3, dtype=torch.int64)})
    '{ids: (2, 3) int64}'
    """
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(shown(part) for part in value[:8]) + ")"
    return type(value).__name__
