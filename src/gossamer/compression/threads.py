"""How many torch threads a command takes when nobody says: so many that they cannot hurt.

Threads of one operation wait for each other. On a small network that costs more than it gives, and
beside other busy processes very much more: each wait lasts as long as the slowest thread is kept
from its core.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.compression.progress import Reporter
from gossamer.core import nest
from gossamer.core.errors import ArgumentError
from gossamer.core.modes import device_of, modes_kept
from gossamer.datasets import Dataset

__all__ = ["asked_for", "chosen", "settled"]

# Multiply-adds of an example up to which one thread is as fast, at batches of 64.
SMALL = 20_000_000
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def asked_for() -> bool:
    """Whether the environment names a number of threads, which torch has taken by itself."""
    return any(os.environ.get(name) for name in _VARIABLES)


def chosen(model: nn.Module, data: Dataset) -> int:
    """One thread for a small network; for others torch's own number, no more than idle cores.

    Idle: cores less the load average of the last minute, where the system tells it.
    """
    own = torch.get_num_threads()
    if own == 1 or multiply_adds(model, data) <= SMALL:
        return 1
    cores = os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        load = 0.0
    return max(1, min(own, cores - round(load)))


def multiply_adds(model: nn.Module, data: Dataset) -> int:
    """Multiply-adds of one example in linear, convolution and recurrent layers, by their shapes.

    A network that cannot take the data counts as small; what is wrong is told elsewhere.
    """
    total = 0

    def count(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal total
        found = output[0] if isinstance(output, tuple) else output
        places = found.numel() // max(1, found.shape[-1]) if isinstance(found, Tensor) else 1
        if isinstance(module, nn.modules.conv._ConvNd) and isinstance(found, Tensor):
            places = found.numel() // max(1, found.shape[1])
        for p in module.parameters(recurse=False):
            total += p.numel() * places if p.ndim >= 2 else 0

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            nest.feed(model, nest.moved(data.test.batch(slice(0, 1))[0], device_of(model)))
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError):
        return 0
    finally:
        for hook in hooks:
            hook.remove()
    return total


def settled(
    asked: int | Literal["auto"] | None,
    began: int | None,
    model: nn.Module,
    data: Dataset,
    say: Reporter,
) -> int:
    """The number of threads of a run: of one that is gone on with, what it ``began`` with.

    ``asked``: a number, ``auto`` for :func:`chosen`, or None for what the process has.

    Raises :class:`ArgumentError` for another number than the run began with.
    """
    if began is not None:
        if isinstance(asked, int) and asked != began:
            raise ArgumentError(
                f"threads={asked}, but the run began with {began}, and other threads add up in "
                "another order, to other bits; go on with that number, or start anew with "
                "--restart (restart=True)"
            )
        if began != torch.get_num_threads():
            say.say(f"torch threads: {began}, as the run began")
        return began
    if asked == "auto":
        return chosen(model, data)
    return torch.get_num_threads() if asked is None else asked
