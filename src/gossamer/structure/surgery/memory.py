"""What is known of every element of every tensor of one forward pass.

A *unit* is what can be taken out of a network at once: a channel, a hidden state, a row of a
matrix. Elements carry numbers of units. They are kept by storage, one number an element, so that
views and operations in place need no rules of their own: a view of a tensor is a view of its
numbers. An element belongs to several units where several axes have some (rows and columns of a
matrix); each such numbering is a *layer*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Ledger", "Memory", "compact", "varying"]


@dataclass
class Memory:
    """What is known of one storage.

    Attributes:
        base: a tensor on the storage; kept, so that its memory is not given to another.
        length: elements of the storage.
        layers: numbers of units, one an element; 0: of no unit.
        unknown: elements that depend on the network's inputs; None: all are the same for all.
        axes: of a parameter: axis -> numbers along it; the layers are made when asked for.
        name: of a parameter or buffer.
    """

    base: Tensor
    length: int
    layers: list[Tensor] = field(default_factory=list)
    unknown: Tensor | None = None
    axes: dict[int, Tensor] = field(default_factory=dict)
    name: str = ""


class Ledger:
    """The memories of a forward pass."""

    def __init__(self) -> None:
        self.count = 1  # number 0 is of no unit
        self.memories: dict[int, Memory] = {}

    def fresh(self, length: int) -> Tensor:
        """That many new units."""
        self.count += length
        return torch.arange(self.count - length, self.count, dtype=torch.int32)

    @staticmethod
    def key(tensor: Tensor) -> int:
        """Of the tensor's storage."""
        return int(tensor.untyped_storage()._cdata)

    def of(self, tensor: Tensor) -> Memory:
        """The memory that a tensor lies in."""
        key = self.key(tensor)
        if key not in self.memories:
            length = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
            self.memories[key] = Memory(tensor, length)
        return self.memories[key]

    def own(self, name: str, tensor: Tensor) -> None:
        """A parameter or buffer: every axis that is longer than one is of units."""
        memory = self.of(tensor)
        memory.base, memory.name = tensor, name
        for axis, size in enumerate(tensor.shape):
            if size > 1:
                memory.axes[axis] = self.fresh(size)

    def labels(self, tensor: Tensor) -> list[Tensor]:
        """The layers of a tensor, each of its shape (or a view that repeats to it)."""
        memory = self.of(tensor)
        if memory.axes:
            order = _order(memory.base, tensor)
            if order is not None:
                return [
                    _along(ids, order.index(axis), tensor.shape)
                    for axis, ids in memory.axes.items()
                ]
            self._fill(memory)
        return [_view(layer, tensor) for layer in memory.layers]

    def unknown(self, tensor: Tensor) -> Tensor:
        """Which elements depend on the inputs."""
        memory = self.of(tensor)
        if memory.unknown is None:
            return torch.zeros((), dtype=torch.bool).expand(tensor.shape)
        return _view(memory.unknown, tensor)

    def write(self, tensor: Tensor, layers: Sequence[Tensor], unknown: Tensor | None) -> None:
        """Set what is known of the elements of a tensor."""
        memory = self.of(tensor)
        if memory.axes:  # a buffer that the forward overwrites
            self._fill(memory)
            memory.axes = {}
        whole = tensor.numel() == memory.length and tensor.is_contiguous()
        for at, layer in enumerate(layers):
            if at == len(memory.layers):
                memory.layers.append(torch.zeros(0))
                if not whole:
                    memory.layers[at] = torch.zeros(memory.length, dtype=torch.int32)
            if whole:
                memory.layers[at] = _copied(layer, tensor)
            else:
                _view(memory.layers[at], tensor).copy_(layer.expand(tensor.shape))
        for rest in memory.layers[len(layers) :]:
            _view(rest, tensor).zero_()
        if unknown is None:
            unknown = torch.zeros((), dtype=torch.bool)
        elif whole:
            memory.unknown = _copied(unknown, tensor)
            return
        if memory.unknown is None:
            memory.unknown = torch.zeros(memory.length, dtype=torch.bool)
        _view(memory.unknown, tensor).copy_(unknown.expand(tensor.shape))

    @staticmethod
    def _fill(memory: Memory) -> None:
        """Write the layers of a parameter out."""
        if memory.layers:
            return
        for axis, ids in memory.axes.items():
            flat = torch.zeros(memory.length, dtype=torch.int32)
            _view(flat, memory.base).copy_(_along(ids, axis, memory.base.shape))
            memory.layers.append(flat)


def _copied(layer: Tensor, tensor: Tensor) -> Tensor:
    flat = layer.expand(tensor.shape).reshape(-1)
    return flat.clone(memory_format=torch.contiguous_format)


def _view(flat: Tensor, tensor: Tensor) -> Tensor:
    return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _along(ids: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    view = [1] * len(shape)
    view[axis] = len(ids)
    return ids.view(view).expand(tuple(shape))


def _order(base: Tensor, tensor: Tensor) -> list[int] | None:
    """Which axis of the base each axis of a tensor is; None where it is not a mere permutation."""
    if tensor is base:
        return list(range(base.ndim))
    if tensor.ndim != base.ndim or tensor.storage_offset() != base.storage_offset():
        return None
    there = list(zip(base.shape, base.stride(), strict=True))
    here = list(zip(tensor.shape, tensor.stride(), strict=True))
    if here == there:
        return list(range(base.ndim))
    if len(set(there)) == len(there) and sorted(here) == sorted(there):
        return [there.index(one) for one in here]
    return None


def varying(layer: Tensor) -> list[int]:
    """The axes along which the units differ."""
    found = []
    plain = layer.numpy()
    for axis, size in enumerate(layer.shape):
        if size < 2:
            continue
        first = plain[(slice(None),) * axis + (slice(0, 1),)]
        if plain.strides[axis] != 0 and (plain != first).any():
            found.append(axis)
        else:
            plain = first  # the rest is looked at where this axis begins
    return found


def compact(layer: Tensor) -> Tensor:
    """The layer with one entry along each axis on which it does not vary."""
    axes = varying(layer)
    for axis, size in enumerate(layer.shape):
        if axis not in axes:
            layer = layer.narrow(axis, 0, min(1, size))
    return layer
