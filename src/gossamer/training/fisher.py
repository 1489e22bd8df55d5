"""The diagonal of the Fisher information matrix: how much the loss feels each weight.

Mean over examples of the squared gradient of one example's loss (the empirical Fisher, as
Kim et al., *SqueezeLLM*, arXiv 2306.07629, weigh weights by). Without labels it is that of a
Gaussian around the network's own outputs y: the diagonal of J^T J, J = dy/dw, which is also the
Gauss-Newton diagonal of half the squared error of the outputs. One random vector v of signs an
example gives it without bias: E (d(v . y)/dw)^2 = sum_k (dy_k/dw)^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gossamer.core import names, nest
from gossamer.core.errors import ArgumentError
from gossamer.core.graph import undisturbed
from gossamer.core.modes import device_of
from gossamer.core.names import Tensors
from gossamer.datasets import Split
from gossamer.training.tasks import Task

__all__ = ["fisher_diagonal"]


def fisher_diagonal(
    model: nn.Module,
    split: Split,
    task: Task,
    *,
    examples: int,
    generator: torch.Generator,
    include: Iterable[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensors:
    """The diagonal by each parameter: clean name -> its shape, entries >= 0.

    The network runs in evaluation mode, an example at a time, and stays as it is.

    Args:
        model: any.
        split: where examples are drawn from, without putting back.
        task: its loss is differentiated where it reads labels, else the outputs themselves.
        examples: how many, at most the split's.
        generator: of the examples and of the signs.
        include: patterns of names (:func:`gossamer.core.names.select`); all by default.
        progress: called with (examples done, examples in all).

    Raises :class:`ArgumentError` for fewer than one example, an empty split, a pattern that
    matches nothing, outputs without floating-point tensors, and gradients that are NaN or
    infinite.
    """
    if examples < 1 or not len(split):
        raise ArgumentError(f"examples={examples} of {len(split)}; at least one is needed")
    parameters = names.parameters(model)
    chosen = names.select(parameters, include) if include is not None else list(parameters)
    weights = [parameters[n] for n in chosen]
    found = [torch.zeros_like(w, dtype=torch.float64) for w in weights]
    rows = torch.randperm(len(split), generator=generator)[:examples]
    required = [w.requires_grad for w in weights]
    try:
        for w in weights:
            w.requires_grad_()
        with undisturbed(model), torch.enable_grad():
            for number, row in enumerate(rows.split(1), 1):
                inputs, targets = nest.moved(split.batch(row), device_of(model))
                outputs = task.feed(model, inputs)
                value = (
                    task.loss(outputs, targets, inputs)
                    if task.labelled
                    else _projected(outputs, generator)
                )
                slopes = torch.autograd.grad(value, weights, allow_unused=True)
                for total, slope in zip(found, slopes, strict=True):
                    if slope is not None:
                        total += slope.double().square()
                if progress is not None:
                    progress(number, len(rows))
    finally:
        for w, was in zip(weights, required, strict=True):
            w.requires_grad_(was)
    means = {n: total / len(rows) for n, total in zip(chosen, found, strict=True)}
    for name, mean in means.items():
        if not bool(torch.isfinite(mean).all()):
            raise ArgumentError(f"{name}: gradients are NaN or infinite; look at the inputs")
    return {n: mean.to(parameters[n].dtype) for n, mean in means.items()}


def _projected(outputs: object, generator: torch.Generator) -> Tensor:
    """The sum of all outputs times random signs."""
    tensors = [t for t in nest.leaves(outputs) if t.is_floating_point() and t.requires_grad]
    if not tensors:
        raise ArgumentError(f"outputs {nest.shown(outputs)} hold nothing to differentiate")
    total = torch.zeros((), device=tensors[0].device)
    for t in tensors:
        signs = torch.randint(2, t.shape, generator=generator).mul_(2).sub_(1)
        total = total + (t * signs.to(t)).sum()
    return total
