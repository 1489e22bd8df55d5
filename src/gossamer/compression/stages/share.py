"""Values shared within a layer, by k-means."""

from __future__ import annotations

from typing import ClassVar, Literal

from gossamer.compression.layers import per_layer
from gossamer.compression.parts import Importance, importance_labels, importances, put_quantized
from gossamer.compression.settings import (
    Bits,
    Training,
)
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State
from gossamer.quantize import share

__all__ = ["Share"]


class Share(LayerStage):
    """Share values within each layer by k-means, and fine-tune the shared values.

    ``bits`` counts the reserved zero: 2^bits - 1 values. A mapping gives bits by layer pattern
    (a later pattern wins; a layer that none names is not shared).

    Attributes:
        importance: what a weight's squared error costs: all the same, or the diagonal of the
            ``fisher`` matrix (without labels that of the outputs) or of the ``hessian``.
    """

    stage: Literal["share"] = "share"
    bits: Bits
    init: Literal["linear", "density", "forgy", "optimal", "uniform"] = "linear"
    importance: Importance = "equal"
    finetune: Training | None = None

    shares: ClassVar[bool] = True
    by_layer: ClassVar[tuple[str, ...]] = ("bits",)

    @property
    def labels(self) -> str:
        """Where the Hessian is asked for."""
        return importance_labels(self.importance)

    def run(self, state: State) -> None:
        """Share, then fine-tune."""
        weights = self.weights(state.model)
        generator = state.generator()
        widths = per_layer(state.model, weights, self.bits)
        costs = importances(state, self.importance, widths)
        found = {
            name: share(
                weights[name],
                bits=bits,
                init=self.init,
                generator=generator,
                importance=costs.get(name),
                name=name,
            )
            for name, bits in widths.items()
        }
        put_quantized(state, found, self.finetune)
