"""Which tensors of a network a file holds, and what a file of it would lack."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.names import Tensors

__all__ = ["maskable", "named_tensors"]


def named_tensors(source: nn.Module | Mapping[str, Tensor]) -> tuple[Tensors, dict[str, str]]:
    """Tensors to store once, and alias -> name.

    Raises :class:`ArgumentError` for a module with state that is no tensor, or that its own
    ``state_dict`` leaves out: a file of the rest would load without a word, as another network.
    """
    if isinstance(source, nn.Module):
        _check_state(source)
        state = names.clean_state_dict(source)
        aliases = {a: n for a, n in names.tied(source).items() if n in state}
        return state, aliases
    if not isinstance(source, Mapping):
        raise ArgumentError(
            f"cannot pack a {type(source).__name__}; pass a torch module or a mapping of tensors"
        )
    state, aliases = {}, {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in source.items():
        if not isinstance(tensor, Tensor):
            raise ArgumentError(
                f"{name!r} is a {type(tensor).__name__}, not a tensor; leave it out or put it "
                "into metadata"
            )
        same: tuple[object, ...] = (id(tensor),)
        plain = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested)
        if plain and tensor.numel():
            place = (tensor.device, tensor.data_ptr())
            # a view of conjugates lies where their values do, with the other sign
            same = (*place, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg())
        first = seen.setdefault(same, name)
        if first == name:
            state[name] = tensor
        else:
            aliases[name] = first
    return state, aliases


def _check_state(model: nn.Module) -> None:
    """Refuse what a file of tensors cannot hold, by name."""
    known, stored = names.cleaned(model), set()
    for raw, value in model.state_dict().items():
        stored.add(known[raw])
        if value is not None and not isinstance(value, Tensor):
            extra = raw.rpartition(".")[2] == "_extra_state"
            raise ArgumentError(
                f"{known[raw]!r} is state of type {type(value).__name__}, and a .gsm file holds "
                "tensors alone; "
                + (
                    "let get_extra_state return a tensor, or keep it in a buffer"
                    if extra
                    else "keep it in a buffer (of a network that torch quantized: pack the float "
                    "network)"
                )
            )
    kept = {known[raw]: raw for raw, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                raw = f"{prefix}.{name}".lstrip(".")
                kept[known[raw]] = raw
    missing = [raw for name, raw in kept.items() if name not in stored]
    if missing:
        raise ArgumentError(
            f"{missing[0]!r} is a parameter or buffer that the network's own state_dict() leaves "
            f"out ({len(missing)} in all; a hook of its own?), so that a file would lack it; pack "
            "a mapping of names to tensors, or take the hook off"
        )


def maskable(model: nn.Module) -> set[str]:
    """Buffers, where infinity may be meant; in running statistics a training has diverged.

    >>> net = nn.BatchNorm1d(2)
    >>> net.register_buffer("mask", torch.zeros(2))
    >>> maskable(net)
    {'mask'}
    """
    known = names.cleaned(model)
    return {
        known[f"{prefix}.{name}".lstrip(".")]
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
        if not (isinstance(module, nn.modules.batchnorm._NormBase) and "running" in name)
    }
