"""What tells one dataset from another: its name is not enough, nor are its targets."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from gossamer.core import nest
from gossamer.datasets.base import Dataset, Split

__all__ = ["digest", "identity", "of_split"]

_SAMPLED = 64  # examples of a split that is not in memory
_AT_ONCE = 1 << 20  # entries that are hashed together


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes; about a second a gigabyte.

    >>> digest(torch.zeros(2, 3)) == digest(torch.zeros(3, 2))
    False
    """
    total = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for rows in tensor.detach().split(max(1, _AT_ONCE // max(1, tensor[:1].numel()))):
        flat = rows.cpu().contiguous().reshape(-1)
        total.update(memoryview(flat.view(torch.uint8).numpy()) if len(flat) else b"")
    return total.hexdigest()


def _nest(value: Any) -> Any:
    """Digests of tensors in a nest; of a tensor its own."""
    return nest.mapped(digest, value)


def of_split(split: Split) -> dict[str, Any]:
    """Examples, digests of inputs and targets, and the normalisation."""
    if not split.in_memory:
        # all of it would be fetched: some examples, evenly spaced, stand for the rest
        some = torch.linspace(0, max(0, len(split) - 1), min(len(split), _SAMPLED)).long()
        inputs, targets = split.batch(some) if len(split) else (None, None)
        return {"examples": len(split), "inputs": _nest(inputs), "targets": _nest(targets)}
    return {
        "examples": len(split),
        "inputs": _nest(split.stored),
        "targets": _nest(split.targets),
        "mean": None if split.mean is None else [float(v) for v in split.mean],
        "std": None if split.std is None else [float(v) for v in split.std],
    }


def identity(data: Dataset) -> dict[str, Any]:
    """All of a dataset that a run depends on, in plain values.

    Every split's bytes, classes, vocabulary, and the name of what changes training batches.
    """
    own: dict[str, Any] = {"name": data.name, "classes": data.classes}
    for part in ("train", "validation", "test"):
        own[part] = of_split(getattr(data, part))
    if data.augment is not None:
        own["augment"] = getattr(data.augment, "__qualname__", type(data.augment).__qualname__)
    if data.task is not None:
        own["task"] = data.task if isinstance(data.task, str) else data.task.settings()
    if data.vocabulary is not None:
        own["vocabulary"] = hashlib.sha256("\0".join(data.vocabulary).encode()).hexdigest()
    return own
