"""Training shared values: Deep Compression (Han, Mao, Dally, ICLR 2016), section 3.3.

The assignments stay; a centroid's gradient is the sum of its weights' gradients (eq. 3),
dL/dC_k = sum_ij dL/dW_ij [I_ij = k]. The code book itself becomes the module's parameter and the
weight is computed from it (``torch.nn.utils.parametrize``), so any optimizer, gradient scaler or
clipping sees a small parameter and needs to know nothing. Weight decay acts on the centroid once,
not once for each of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError
from gossamer.core.latent import Computed, dense
from gossamer.core.parametrized import Parametrized
from gossamer.quantize.scalar import find_step, native

__all__ = ["SharedWeights", "group_sum"]


def group_sum(values: Tensor, codes: Tensor, entries: int) -> Tensor:
    """Sum of ``values`` for each code: (entries,), summed in double, of the values' dtype.

    ``codes``: as many as values, in [0, entries); uint8 or int32.

    >>> group_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1], dtype=torch.uint8), 3)
    tensor([2., 5., 0.])
    """
    flat, code = values.detach().reshape(-1), codes.reshape(-1)
    kernel = native() if flat.device.type == "cpu" else None
    if kernel is not None and flat.dtype in (torch.float32, torch.float64):
        sums = np.empty(entries, np.float64)
        kernel.group_sum(
            flat.contiguous().numpy(), code.contiguous().numpy(), sums, torch.get_num_threads()
        )
        return torch.from_numpy(sums).to(values.dtype)
    zero = torch.zeros(entries, dtype=torch.float64, device=flat.device)
    return zero.index_add_(0, code.int(), flat.double()).to(values.dtype)


class _Look(torch.autograd.Function):
    """``book[codes]``; the gradient of an entry is the sum over its codes."""

    @staticmethod
    def forward(ctx: Any, book: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.entries = len(book)
        return book.index_select(0, codes.reshape(-1).int()).reshape(codes.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        return group_sum(dense(grad), codes, ctx.entries), None


class _Shared(Computed):
    """The parametrization: centroids, or the step of a grid, to the weight."""

    codes: Tensor
    levels: Tensor | None

    def __init__(self, codes: Tensor, levels: Tensor | None, start: Tensor) -> None:
        super().__init__(start)
        self.register_buffer("codes", codes)
        self.register_buffer("levels", levels)

    def book(self, latent: Tensor) -> Tensor:
        """The code book, zero first."""
        entries = latent if self.levels is None else self.levels * latent
        return torch.cat([entries.new_zeros(1), entries])

    def forward(self, latent: Tensor) -> Tensor:
        return _Look.apply(self.book(latent), self.codes)


class SharedWeights(Parametrized):
    """Train the shared values of weights whose assignments are fixed.

    From :meth:`attach` to :meth:`finish` the code book, without its zero, is the module's
    parameter; the optimizer's groups hold it in the weight's place with the group's options, and
    every read of the weight gives ``codebook[codes]``, zeros exactly zero. ``state_dict`` of the
    model carries code book and codes, so checkpoints and deep copies need nothing more.

    Args:
        shared: clean name -> codes and code book, as :func:`gossamer.quantize.share` and the
            other quantizers give them. Attaching writes them into the model.
        grid: the code books are multiples of a step, and only the step is trained: a uniform
            grid stays one.

    Raises :class:`ArgumentError` on attach for an unknown name, another shape, a weight that is
    parametrized already, a code book that is no grid (``grid=True``), or an optimizer that holds
    none of the weights; the model is left as it was.
    """

    def __init__(self, shared: Mapping[str, Quantized], *, grid: bool = False) -> None:
        super().__init__()
        if not shared:
            raise ArgumentError("shared is empty: no weight to share; run share_model() first")
        self.shared = dict(shared)
        self.grid = grid

    def _weights(self) -> Mapping[str, nn.Parameter]:
        parameters = names.parameters(self.model)
        for name in self.shared:
            if name not in parameters:
                raise ArgumentError(
                    f"shared weight {name!r} is no parameter; there are: {', '.join(parameters)}"
                )
        return {name: parameters[name] for name in self.shared}

    def _modules(self, weights: Mapping[str, nn.Parameter]) -> Mapping[str, Computed]:
        return {name: self._module(name, self.shared[name], p) for name, p in weights.items()}

    def _module(self, name: str, q: Quantized, p: nn.Parameter) -> _Shared:
        if q.codes.shape != p.shape:
            raise ArgumentError(
                f"codes of {name} have shape {tuple(q.codes.shape)}, the weight {tuple(p.shape)}"
            )
        small = torch.uint8 if len(q.codebook) <= 256 else torch.int32
        codes = q.codes.to(p.device, small)
        book = q.codebook.detach().to(p.device, p.dtype)
        if not self.grid:
            return _Shared(codes, None, book[1:].clone())
        found = find_step(book)
        if found is None and len(book) > 1:
            raise ArgumentError(
                f"the code book of {name} is no uniform grid; quantize it with uniform() or "
                "ecsq(grid=...), or leave grid=False"
            )
        levels, step = found if found is not None else (torch.zeros(1), 1.0)
        return _Shared(codes, levels[1:].to(p.device, p.dtype), book.new_tensor([step]))

    @torch.no_grad()
    def quantized(self) -> dict[str, Quantized]:
        """The present codes and code books; before :meth:`attach` those given."""
        for name, held in self._held.items():
            book = held.module.book(held.parameter.detach())
            self.shared[name] = Quantized(held.module.codes.clone(), book)
        return dict(self.shared)

    def finish(self) -> None:
        """Plain weights again, equal to ``codebook[codes]``, in the model and the optimizer."""
        self.quantized()
        super().finish()
