"""Batch-norm statistics absorbed into the layer's own scale and shift.

In evaluation a batch-norm layer computes ``y = weight * (x - mean) / sqrt(var + eps) + bias``:
four stored numbers a channel where two do. Absorbing leaves a layer of the same type and shape
that computes the same ``y`` from mean 0 and variance ``1 - eps``, constants that pack to nothing,
so the file halves its batch-norm bytes and loads into the user's unchanged model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gossamer.core import access, names
from gossamer.core.errors import ArgumentError
from gossamer.core.graph import check_or_restore

__all__ = ["absorb_batchnorm"]


@torch.no_grad()
def absorb_batchnorm(model: nn.Module, example: Any = None) -> list[str]:
    """Absorb the running statistics of every affine batch-norm layer, in place.

    The output in evaluation mode stays the same to float rounding (about 1e-6 relative). It is
    a last step: in training mode a batch-norm layer normalises by its batch, and the absorbed
    scale would be applied on top.

    Returns the clean names of the layers changed. Layers without running statistics or without
    an affine map are left as they are.

    Args:
        model: any.
        example: one batch of inputs, on which the outputs before and after are compared.

    Raises :class:`ArgumentError`, with nothing changed, when a layer's statistics are not finite
    or its variance is negative, when its scale or shift is computed from others, when one of its
    four tensors belongs to another layer too, and when outputs differ on ``example``.
    """
    known = names.cleaned(model)
    layers = [
        (known[name], module, module.running_mean, module.running_var)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine
    ]
    tracked = [
        (n, m, mean, var) for n, m, mean, var in layers if mean is not None and var is not None
    ]
    for name, _, mean, variance in tracked:
        for statistic, values in (("running_mean", mean), ("running_var", variance)):
            bad = int((~torch.isfinite(values)).sum())
            if bad:
                raise ArgumentError(
                    f"{name}.{statistic} holds {bad} values that are NaN or infinite; "
                    "train or calibrate the model before absorbing its batch-norm statistics"
                )
        if bool((variance < 0).any()):
            raise ArgumentError(f"{name}.running_var is negative; the state is corrupt")
    _check_own(model, [(name, module) for name, module, *_ in tracked])
    if not tracked:
        return []
    before = access.copied(model) if example is not None else None
    state = [(t, t.clone()) for _, m, mean, var in tracked for t in (m.weight, m.bias, mean, var)]
    for _, module, mean, variance in tracked:
        # double: the fold's own rounding stays below the last float32 bit
        scale = module.weight.double() / torch.sqrt(variance.double() + module.eps)
        shift = module.bias.double() - mean.double() * scale
        module.weight.copy_(scale)
        module.bias.copy_(shift)
        mean.zero_()
        variance.fill_(1.0 - module.eps)
    if before is not None:
        what = "the network with absorbed batch-norm"
        check_or_restore(before, model, example, what, state)
    return [name for name, *_ in tracked]


def _check_own(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> None:
    """Refuse layers whose tensors are computed, or have another reader."""
    places: dict[int, list[str]] = {}
    known = names.cleaned(model)
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    modules = {id(m): known[n] for n, m in model.named_modules()}
    # one layer in two places is one layer: places are told by the owner, not by the path
    for raw, tensor in named:
        owner = modules[id(model.get_submodule(raw.rpartition(".")[0]))]
        held = places.setdefault(id(tensor), [])
        held += [owner] if owner not in held else []
    near = access.aliases(model)
    for name, module in layers:
        access.check_plain(module, name, "absorbed")
        for what in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, what)
            others = [o for o in places[id(tensor)] if o != name] + near.get(id(tensor), [])
            if others:
                raise ArgumentError(
                    f"{name}.{what} is shared with {others[0]}, which would change too; give each "
                    "layer its own (clone() it), or leave the statistics as they are"
                )
