"""Batch-norm statistics of a changed network, measured anew on inputs without labels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import nest
from gossamer.core.modes import evaluating, modes_kept
from gossamer.training.layer_inputs import feed

__all__ = ["distance", "reestimate"]


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._NormBase]:
    found = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [m for m in found if m.running_mean is not None]


def _tensors(outputs: Any) -> list[Tensor]:
    """The floating tensors of whatever a network gives."""
    return [t for t in nest.leaves(outputs) if t.is_floating_point()]


@torch.no_grad()
def distance(model: nn.Module, original: nn.Module, batches: Iterable[Any]) -> float:
    """Mean square difference of two networks' outputs, as a part of the original's power."""
    left, power = 0.0, 0.0
    with evaluating(model), evaluating(original):
        for batch in batches:
            pairs = zip(_tensors(feed(model, batch)), _tensors(feed(original, batch)), strict=True)
            for now, before in pairs:
                left += float((now.double() - before.double()).square().sum())
                power += float(before.double().square().sum())
    return left / power if power else left


@torch.no_grad()
def reestimate(
    model: nn.Module, original: nn.Module, batches: Iterable[Any], held: Iterable[Any]
) -> bool | None:
    """Measure running means and variances on ``batches``; keep them where ``held`` is the nearer.

    Nearer to the original network's outputs, on batches that took no part. Returns whether they
    were kept; None where there is nothing to measure.
    """
    norms, apart = _norms(model), list(held)
    if not norms or not apart:
        return None
    before = distance(model, original, apart)
    keep = [{k: b.clone() for k, b in m.named_buffers(recurse=False)} for m in norms]
    moments = [m.momentum for m in norms]
    # one value a channel has no variance: what is measured then is not kept
    with modes_kept(model), contextlib.suppress(ValueError):
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
        for batch in batches:
            feed(model, batch)
    for norm, momentum, buffers in zip(norms, moments, keep, strict=True):
        norm.momentum = momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.copy_(buffers["num_batches_tracked"])
    if distance(model, original, apart) < before:
        return True
    for norm, buffers in zip(norms, keep, strict=True):
        for key, value in buffers.items():
            getattr(norm, key).copy_(value)
    return False
