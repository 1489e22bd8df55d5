"""Train weights projected onto few values: one method, a table of the published projections.

What distinguishes the baselines is the function from a latent weight to its quantized values; a
researcher's own is a function too::

    Projected(lambda w: torch.round(w * 8) / 8, clip=1.0).attach(model, optimizer)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.core.latent import Computed, Latent
from gossamer.core.quantizer import Quantizer, Straight, fitting, rule_of
from gossamer.quantize import binary, dorefa, twn
from gossamer.quantize.uniform import uniform

__all__ = ["PROJECTIONS", "Projected", "Projection"]

# weight -> values, or -> (values, factor on the gradient or None)
Projection = Callable[..., "Tensor | tuple[Tensor, Tensor | None]"]


def _uniform(weight: Tensor, *, bits: int) -> Tensor:
    return uniform(weight, bits=bits).dequantize()


PROJECTIONS: dict[str, Projection] = {
    "twn": twn.ternary,
    "binaryconnect": binary.sign,
    "binaryconnect, stochastic": binary.stochastic,
    "bwn": partial(binary.scaled, per_filter=False),
    "bwn, per filter": partial(binary.scaled, per_filter=True),
    **{f"dorefa-{bits}": partial(dorefa.quantize, bits=bits) for bits in range(1, 9)},
    **{f"uniform-{bits}": partial(_uniform, bits=bits) for bits in range(2, 9)},
}


class Projected(Quantizer):
    """Train latent weights under a projection, with the gradient straight through.

    Args:
        projection: a name of :data:`PROJECTIONS`, or a function of the latent weight that returns
            values of its shape, dtype and device, and may return a factor on the gradient beside
            them.
        generator: handed to a projection that draws, as ``generator=``; its state is part of
            :meth:`state_dict`.
        clip: latent weights stay in [-clip, clip] (BinaryConnect: 1); None: free.
        include, exclude, ends: what is quantized (:func:`gossamer.core.quantizer.chosen`).

    Raises :class:`ArgumentError` as :class:`gossamer.core.quantizer.Quantizer` does, for an unknown
    name, a missing generator, and a projection whose result does not fit.
    """

    def __init__(
        self,
        projection: str | Projection,
        *,
        clip: float | None,
        generator: torch.Generator | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        ends: bool = False,
    ) -> None:
        super().__init__(clip=clip, include=include, exclude=exclude, ends=ends)
        projection = rule_of(projection, PROJECTIONS, "the weight")
        if projection is binary.stochastic and generator is None:
            raise ArgumentError("a stochastic projection draws: give generator=")
        self.projection: Projection = projection
        if generator is not None:
            self.projection = partial(projection, generator=generator)
        self.generator = generator

    def _project(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        found = self.projection(weight)
        value, slope = found if isinstance(found, tuple) else (found, None)
        if slope is not None:
            slope = fitting(slope, weight, f"the slope of {name}")
        return fitting(value, weight, name), slope

    def _module(self, name: str, weight: Tensor) -> Computed:
        return Straight(weight, *self._project(name, weight))

    def _update(self, name: str, held: Latent) -> None:
        held.module.take(*self._project(name, held.parameter.detach()))

    def _state(self) -> dict[str, Any]:
        """The generator's state; weights and values are in the model's ``state_dict``."""
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def _load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`_state` returned."""
        if self.generator is not None:
            self.generator.set_state(state["generator"])
