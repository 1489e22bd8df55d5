"""Batch-norm statistics absorbed into the layer's own scale and shift.

In evaluation a batch-norm layer computes ``y = weight * (x - mean) / sqrt(var + eps) + bias``:
four stored numbers a channel where two do. Absorbing leaves a layer of the same type and shape
that computes the same ``y`` from mean 0 and variance ``1 - eps``, constants that pack to nothing,
so the file halves its batch-norm bytes and loads into the user's unchanged model.
"""

from __future__ import annotations

import torch
from torch import nn

from gossamer import names
from gossamer.errors import ArgumentError

__all__ = ["absorb_batchnorm"]


@torch.no_grad()
def absorb_batchnorm(model: nn.Module) -> list[str]:
    """Absorb the running statistics of every affine batch-norm layer, in place.

    The output in evaluation mode stays the same to float rounding (about 1e-6 relative). It is
    a last step: in training mode a batch-norm layer normalises by its batch, and the absorbed
    scale would be applied on top.

    Returns the clean names of the layers changed. Layers without running statistics or without
    an affine map are left as they are.

    Raises :class:`ArgumentError` when a layer's statistics are not finite or its variance is
    negative; no layer is changed then.
    """
    layers = [
        (names.clean(name), module, module.running_mean, module.running_var)
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
    for _, module, mean, variance in tracked:
        # double: the fold's own rounding stays below the last float32 bit
        scale = module.weight.double() / torch.sqrt(variance.double() + module.eps)
        shift = module.bias.double() - mean.double() * scale
        module.weight.copy_(scale)
        module.bias.copy_(shift)
        mean.zero_()
        variance.fill_(1.0 - module.eps)
    return [name for name, *_ in tracked]
