"""A network as runtimes want it: tensors in by name, tensors out by name, nothing nested.

Whatever nest of tensors a network takes (one, several, a mapping) and gives (tuples, mappings,
dataclasses), here it takes its tensors in order and gives a tuple of tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import nest
from gossamer.core.errors import ArgumentError
from gossamer.core.modes import device_of
from gossamer.core.plain import copied, plain

__all__ = ["Flat", "check_example", "flatten", "named"]


def named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nest with their names: keys, fields, and numbers of places.

    >>> [n for n, _ in named({"a": torch.zeros(1), "b": (torch.zeros(1), None)}, "output")]
    ['a', 'b_0']
    """
    yield from _named(value, "", name)


def _named(value: Any, path: str, otherwise: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path or otherwise, value
        return
    parts: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        parts = iter(value.items())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = zip(value._fields, value, strict=True)
    elif isinstance(value, (tuple, list)):
        parts = ((i if path else f"{otherwise}_{i}", part) for i, part in enumerate(value))
    for key, part in parts:
        yield from _named(part, f"{path}_{key}" if path else str(key), otherwise)


class Flat(nn.Module):
    """The network inside, which takes the tensors of one nest in order.

    Args:
        model: the network; called as :func:`gossamer.core.nest.feed` does.
        example: the nest; what is no tensor in it is kept as it is for every call.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.model = model
        self._example = nest.mapped(lambda t: None, example)
        self._like = nest.mapped(lambda t: True, example)
        self.inputs: tuple[str, ...] = tuple(n for n, _ in named(example, "input"))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors in, tensors out, in the order of :func:`named`."""
        return tuple(t for _, t in named(self.whole(*tensors), "output"))

    def whole(self, *tensors: Tensor) -> Any:
        """What the network itself gives."""
        left = iter(tensors)
        return nest.feed(self.model, _filled(self._example, self._like, left))


def _filled(value: Any, like: Any, left: Iterator[Tensor]) -> Any:
    """The nest with the tensors at their places."""
    if like is True and value is None:
        return next(left)
    if isinstance(value, Mapping):
        return {key: _filled(part, like[key], left) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_filled(a, b, left) for a, b in zip(value, like, strict=True)))
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(a, b, left) for a, b in zip(value, like, strict=True))
    return value


def check_example(example: Any) -> None:
    """Raise :class:`ArgumentError` where there is no tensor in the example."""
    if not nest.leaves(example):
        raise ArgumentError(
            f"example_inputs is {nest.shown(example)}, which holds no tensor; give one batch of "
            "inputs as the network takes them (a tensor, a tuple, or a mapping by name; on the "
            "command line --data or --shape)"
        )


def flatten(model: nn.Module, example: Any) -> tuple[Flat, tuple[Tensor, ...], list[str]]:
    """A flat copy for inference, its example tensors, and what was done to it, in words.

    The copy is on the CPU, without wrappers, of plain weights
    (:func:`gossamer.core.plain.plain`), in evaluation mode and in float32; ``model`` is left as it
    is.

    Raises :class:`ArgumentError` for a network that cannot be copied, no tensor in ``example``, or
    an example that the network does not take.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is of type {type(model).__name__}; give an nn.Module")
    check_example(example)
    network, told = plain(copied(model))
    kinds = {p.dtype for p in (*network.parameters(), *network.buffers()) if p.is_floating_point()}
    if other := sorted(str(k).removeprefix("torch.") for k in kinds - {torch.float32}):
        told.append(f"{', '.join(other)} tensors are float32 in the export")
        network = network.float()
    network = network.cpu().eval().requires_grad_(False)
    flat = Flat(network, example).eval()
    tensors = tuple(_plain(t) for t in nest.leaves(example))
    if len(flat.inputs) != len(tensors):
        raise ArgumentError(
            f"example_inputs holds tensors in objects of its own: {nest.shown(example)}; give "
            "tensors, tuples and mappings"
        )
    try:
        with torch.no_grad():
            found = flat.whole(*tensors)
    except Exception as e:  # the user's own forward, which may raise anything
        raise ArgumentError(
            f"{type(model).__name__} on {device_of(network)} does not take example_inputs "
            f"{nest.shown(example)}: {type(e).__name__}: {str(e).strip().splitlines()[0][:200]}"
            if str(e).strip()
            else f"{type(model).__name__} does not take example_inputs {nest.shown(example)}: "
            f"{type(e).__name__}"
        ) from e
    if not any(True for _ in named(found, "output")):
        raise ArgumentError(
            f"{type(model).__name__} gives {type(found).__name__}, which holds no tensor"
        )
    return flat, tensors, told


def _plain(tensor: Tensor) -> Tensor:
    moved = tensor.detach().cpu()
    return moved.float() if moved.is_floating_point() else moved
