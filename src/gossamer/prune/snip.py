"""SNIP: weights go before training, by the effect that each connection has on the loss.

Lee, Ajanthan, Torr, *SNIP: Single-shot Network Pruning based on Connection Sensitivity*,
ICLR 2019, arXiv 1810.02340.

- Equation 4-5: a mask variable c = 1 on every weight; g_j = dL(c * w) / dc_j, which is
  w_j * dL/dw_j, and s_j = |g_j| / sum_k |g_k| (:func:`scores`).
- Equation 6, algorithm 1: keep the kappa highest of the whole network (:func:`prune`), then train
  what is left (:class:`gossamer.core.method.Masked`).

The network is scored in evaluation mode, as the authors' code does (``is_train: False``): no
dropout, and batch-norm by its running statistics, which at initialisation are 0 and 1.

Deviations: biases are left out unless named (the authors include them; where they start at zero,
their score is zero and they go first); several batches count as one large one; at least ``floor``
weights of a layer stay, within the same budget; what is scored is what is trained (the authors'
code draws the weights anew after pruning).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import names, nest
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks, keep_top, warn_empty
from gossamer.core.modes import device_of, modes_kept
from gossamer.core.names import Tensors
from gossamer.training.tasks import cross_entropy
from gossamer.training.tasks.counts import IGNORED

__all__ = ["prune", "scores"]

Patterns = str | Iterable[str] | None
Batches = Iterable[tuple[Any, Tensor]]


def scores(
    model: nn.Module,
    batches: Batches,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    include: Patterns = None,
    exclude: Patterns = None,
    normalize: bool = True,
) -> Tensors:
    """|w * dL/dw| of every compressible weight, summing to 1 over all of them; higher = keep.

    The model ends bit for bit as it was: gradients, buffers, modes, torch's generators.

    Args:
        batches: pairs (inputs, targets), one or more; L is the mean over all their targets that
            count (class indices of -100 do not). Inputs of several tensors are a mapping by name
            or a tuple in order.
        loss: mean loss of a batch, ``loss(outputs, targets)``.
        include, exclude: patterns over parameter names (:func:`gossamer.core.names.weights`);
            ``include`` may name biases.
        normalize: False leaves the sum as it is.

    Returns clean name -> tensor of the weight's shape, float32 or wider.

    Raises :class:`ArgumentError` when there is no batch or an empty one, no weight to score, a
    weight that is frozen or does not reach the loss, a loss that is no scalar, no number or
    infinite, gradients that are not finite, or only zero scores.
    """
    weights = names.weights(model, include=include, exclude=exclude)
    if not weights:
        raise ArgumentError("the model has no weight to score; name some with include=")
    frozen = [name for name, w in weights.items() if not w.requires_grad]
    if frozen:
        raise ArgumentError(
            f"weights {', '.join(frozen)} have requires_grad=False; exclude= them, or unfreeze them"
        )
    total, sums = 0, {n: torch.zeros_like(w, dtype=_wide(w)) for n, w in weights.items()}
    with _untouched(model), torch.enable_grad():
        model.eval()
        for number, batch in enumerate(batches):
            count, gradients = _gradients(model, weights, batch, loss, number)
            total += count
            for name, gradient in gradients.items():
                sums[name].add_(gradient, alpha=count)
    if not total:
        raise ArgumentError(
            "batches is empty, or no target in it counts; give at least one (inputs, targets)"
        )
    found = {
        name: (w.detach().to(_wide(w)) * (sums[name] / total)).abs() for name, w in weights.items()
    }
    # float64, so that the quotients sum to 1 up to their own rounding
    whole = sum(float(s.double().sum()) for s in found.values())
    if whole == 0:
        raise ArgumentError(
            "every score is 0: no weight changes the loss of these batches; check that the "
            "weights are initialised and that the units are alive"
        )
    return {name: s / whole for name, s in found.items()} if normalize else found


def prune(
    model: nn.Module,
    batches: Batches,
    density: float,
    *,
    floor: int = 1,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Masks:
    """Masks of the highest scores of the whole network; the count kept is exact.

    Args:
        density: fraction kept, in (0, 1], of all scored weights together.
        floor: at least so many weights stay in each layer, taken from the same budget: a global
            budget may empty a layer, and the network is then cut in two. 0 only warns.

    Raises :class:`ArgumentError` as :func:`scores` does, for a density outside (0, 1], a negative
    floor, or one that the budget cannot pay. Warns with
    :class:`~gossamer.core.masks.EmptyLayerWarning` when a layer keeps nothing.
    """
    if not 0 < density <= 1:
        raise ArgumentError(f"density={density} is outside (0, 1] (the fraction kept)")
    if floor < 0:
        raise ArgumentError(f"floor={floor} must be at least 0")
    sizes = [w.numel() for w in names.weights(model, include=include, exclude=exclude).values()]
    least, budget = sum(min(floor, size) for size in sizes), int(density * sum(sizes) + 0.5)
    if sizes and least > budget:
        raise ArgumentError(
            f"density={density} keeps {budget} of {sum(sizes)} weights, floor={floor} needs "
            f"{least} in {len(sizes)} layers; raise the density or lower the floor"
        )
    ranked = scores(model, batches, loss=loss, include=include, exclude=exclude)
    masks = keep_top(ranked, density, scope="global", floor=floor)
    warn_empty(masks)
    return masks


def _wide(weight: Tensor) -> torch.dtype:
    # 16-bit products of small weights and small gradients underflow to zero
    return torch.promote_types(weight.dtype, torch.float32)


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Give modes, buffers and torch's generators back; let CUDA's recurrent layers run backward."""
    device = device_of(model)
    saved = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    with contextlib.ExitStack() as stack:
        if device.type == "cuda" and recurrent:  # cuDNN's have no backward in evaluation mode
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        cuda = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(modes_kept(model))
        try:
            yield
        finally:
            for module, name, buffer, value in saved:
                module._buffers[name] = buffer.copy_(value)


def _gradients(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    batch: tuple[Any, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    number: int,
) -> tuple[int, Tensors]:
    """How many targets a batch has, and dL/dw of its mean loss."""
    if isinstance(batch, Tensor) or len(batch) != 2:
        raise ArgumentError(
            f"batches[{number}] is no pair (inputs, targets); for one batch write "
            "[(inputs, targets)]"
        )
    device = device_of(model)
    inputs, targets = nest.moved(batch[0], device), batch[1].to(device)
    if not nest.count(inputs) or not targets.numel():
        raise ArgumentError(f"batches[{number}] is empty; give at least one example")
    value = loss(nest.feed(model, inputs), targets)
    if value.numel() != 1 or not value.requires_grad:
        raise ArgumentError(
            f"loss of batches[{number}] must be one number with a gradient, got shape "
            f"{tuple(value.shape)} with requires_grad={value.requires_grad}"
        )
    if not torch.isfinite(value):
        raise ArgumentError(
            f"loss of batches[{number}] is {value.item()}; check its inputs and the initial weights"
        )
    found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    gradients: Tensors = {}
    for name, gradient in zip(weights, found, strict=True):
        if gradient is None:
            raise ArgumentError(
                f"weight {name!r} does not reach the loss of batches[{number}]; exclude= it"
            )
        if not torch.isfinite(gradient).all():
            raise ArgumentError(
                f"gradient of {name!r} is not finite in batches[{number}]; check the inputs and "
                "the initial weights"
            )
        gradients[name] = gradient.detach()
    # the batch's mean is over these
    counted = targets.numel() if targets.is_floating_point() else int((targets != IGNORED).sum())
    return counted, gradients
