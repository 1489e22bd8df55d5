"""Which modules of a network are looked at, and how their inputs and outputs are seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.modes import device_of, modes_kept
from gossamer.datasets import Split, batches

__all__ = ["channels", "choose", "observe"]

Patterns = str | Iterable[str] | None
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)


def choose(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None
) -> dict[str, nn.Module]:
    """Clean module name -> module: the convolutions and linear layers, or what ``include`` names.

    Definition order; a module used under two names once, under its first. Raises
    :class:`ArgumentError` for a pattern that matches nothing, or when nothing is chosen.
    """
    modules = names.modules(model)
    if include is None:
        chosen = {n for n, m in modules.items() if isinstance(m, _LAYERS)}
    else:
        chosen = set(names.select(modules, include))
    if exclude is not None:
        chosen -= set(names.select(modules, exclude))
    if not chosen:
        raise ArgumentError("the model has no layer to look at; name some modules with include=")
    return {n: m for n, m in modules.items() if n in chosen}


def channels(name: str, module: nn.Module, output: Any) -> Tensor:
    """An output as (examples, channels, positions): a convolution's maps, a linear layer's units.

    (N, C), (N, C, H, W), (N, C, D, H, W); with three dimensions (N, C, L) after a convolution or
    batch-norm and (N, T, units) after a linear layer. Raises :class:`ArgumentError` for others.
    """
    if isinstance(output, Tensor) and output.ndim >= 2:
        if isinstance(module, nn.Linear):
            return output.reshape(len(output), -1, output.shape[-1]).transpose(1, 2)
        if output.ndim != 3 or isinstance(module, _CHANNELS_FIRST):
            return output.reshape(len(output), output.shape[1], -1)
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ArgumentError(
        f"output of {name!r} ({type(module).__name__}) is {shape}: which dimension holds its "
        "channels is not known; name the linear layer, convolution or batch-norm before it"
    )


@contextlib.contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    split: Split,
    see: Callable[[str, nn.Module, Tensor, Any, Tensor], None],
    *,
    batch_size: int,
    every: bool,
) -> list[str]:
    """Run a split through the model, and show ``see`` every call of the layers.

    ``see(name, module, first input, output, targets of the batch)``; evaluation mode, no
    gradients, modes and hooks as before afterwards. Returns the layers that were called: what an
    attention module does with its output projection is no call. Raises :class:`ArgumentError` for
    an empty split, a batch size under 1, no call at all, or (``every``) a layer without one.
    """
    if not len(split):
        raise ArgumentError("split is empty: there is nothing to run through the network")
    device, called, now = device_of(model), set[str](), [torch.empty(0)]

    def hook(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            called.add(name)
            see(name, module, inputs[0], output, now[0])

        return seen

    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
    with _hooked(handles), modes_kept(model), torch.no_grad():
        model.eval()
        for inputs, targets in batches(split, batch_size, generator=None):
            now[0] = targets.to(device)
            model(inputs.to(device))
    missing = [name for name in layers if name not in called]
    if missing and (every or not called):
        raise ArgumentError(
            f"layers {', '.join(missing)} are never called as modules; leave them out"
        )
    return [name for name in layers if name in called]
