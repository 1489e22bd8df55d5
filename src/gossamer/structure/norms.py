"""Which batch-norm stands directly behind which layer, found by running the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import names, nest
from gossamer.core.graph import undisturbed

__all__ = ["norms_behind"]

_Norm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def norms_behind(
    model: nn.Module, example: Any, *, feed: Callable[[nn.Module, Any], Any] = nest.feed
) -> dict[str, str]:
    """Weight -> the batch-norm module that takes its layer's output as it is; clean names.

    A layer that is called more than once, whose output several batch-norms take, or something
    writes to in between (a sum or a ReLU in place), has none; nor has one whose batch-norm is
    called for others too.

    Args:
        model: runs once, in evaluation mode; it is left as it is.
        example: one batch as the network takes it.
        feed: runs the network on a batch.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1))
    >>> norms_behind(net, torch.zeros(1, 1, 3, 3))
    {'0.weight': '1'}
    """
    known = names.cleaned(model)
    # with how often they were written; tensors are held, so that none is another's successor
    made: list[tuple[str, Tensor, int]] = []
    taken: list[tuple[str, Tensor, int]] = []

    def hook(name: str, norm: bool) -> Callable[..., None]:
        def seen(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if norm and inputs and isinstance(inputs[0], Tensor):
                taken.append((name, inputs[0], _writes(inputs[0])))
            elif not norm and isinstance(output, Tensor):
                made.append((name, output, _writes(output)))

        return seen

    hooks = [
        module.register_forward_hook(hook(known[raw], isinstance(module, _Norm)))
        for raw, module in model.named_modules()
        if isinstance(module, _Norm) or isinstance(getattr(module, "weight", None), Tensor)
    ]
    try:
        with undisturbed(model):
            feed(model, example)
    finally:
        for one in hooks:
            one.remove()
    layers, norms = [name for name, *_ in made], [name for name, *_ in taken]
    found: dict[str, str] = {}
    for name, output, written in made:
        behind = [(norm, again) for norm, x, again in taken if x is output]
        if len(behind) == 1 and layers.count(name) == 1:
            norm, again = behind[0]
            if again == written and norms.count(norm) == 1:
                found[f"{name}.weight" if name else "weight"] = norm
    return found


def _writes(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
