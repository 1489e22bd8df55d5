"""How often each weight multiplies: its multiply-accumulates an example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.modes import evaluating

__all__ = ["uses"]


def uses(model: nn.Module, feed: Callable[[nn.Module], Any], examples: int) -> dict[str, float]:
    """Clean name of a weight -> multiplications an example, by the layers that are run.

    Convolutions, linear layers (``Conv1D`` of transformers too), recurrent layers and cells, and
    torch's attention; a weight of another module, or of a layer that does not run, has none. A
    weight multiplies as often as its layer has positions, or steps.

    Args:
        feed: runs the model on a batch.
        examples: of the batch.
    """
    known, found = names.cleaned(model), dict[str, float]()
    handles = []
    for prefix, module in model.named_modules():
        if isinstance(module, _COUNTED) or type(module).__name__ == "Conv1D":
            own = {
                leaf: known[f"{prefix}.{leaf}".lstrip(".")]
                for leaf, p in module.named_parameters()
                if p.ndim > 1
            }
            handles.append(module.register_forward_hook(_counter(own, found, examples)))
    try:
        with evaluating(model), torch.no_grad():
            feed(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


_COUNTED = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


def _counter(
    own: dict[str, str], found: dict[str, float], examples: int
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        times = _positions(module, inputs[0] if inputs else None, output) / examples
        for name in own.values():
            found[name] = found.get(name, 0.0) + times

    return count


def _positions(module: nn.Module, given: Any, output: Any) -> float:
    """Places that a batch's weights are applied at."""
    made: Tensor = output[0] if isinstance(output, tuple) else output
    if isinstance(given, nn.utils.rnn.PackedSequence):
        return len(given.data)
    if isinstance(module, nn.modules.conv._ConvNd) and module.transposed:
        return given.numel() / module.in_channels
    if isinstance(module, nn.modules.conv._ConvNd):
        return made.numel() / module.out_channels
    if isinstance(module, nn.RNNBase):
        return made.numel() / (
            (1 + module.bidirectional) * (module.proj_size or module.hidden_size)
        )
    return made.numel() / made.shape[-1]
