"""Entropy-constrained quantization."""

from __future__ import annotations

from typing import ClassVar, Literal

from gossamer.compression.layers import per_layer
from gossamer.compression.parts import Importance, importance_labels, importances, put_quantized
from gossamer.compression.settings import (
    Strength,
    Training,
)
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State
from gossamer.quantize import ecsq

__all__ = ["Ecsq"]


class Ecsq(LayerStage):
    """Entropy-constrained quantization: trade squared error against bits, then fine-tune.

    ``lam`` is the price of a bit in units of the layer's variance: larger, fewer bits.
    ``importance``: as in ``share``, in parts of the layer's mean.
    """

    stage: Literal["ecsq"] = "ecsq"
    lam: Strength
    importance: Importance = "equal"
    finetune: Training | None = None

    shares: ClassVar[bool] = True
    by_layer: ClassVar[tuple[str, ...]] = ("lam",)

    @property
    def labels(self) -> str:
        """Where the Hessian is asked for."""
        return importance_labels(self.importance)

    def run(self, state: State) -> None:
        """Quantize each layer at its price, then fine-tune."""
        weights = self.weights(state.model)
        found = {}
        prices = per_layer(state.model, weights, self.lam)
        costs = importances(state, self.importance, prices)
        for name, lam in prices.items():
            w = weights[name].detach()
            kept = w[w != 0]
            scale = float(kept.var(correction=0)) if kept.numel() else 0.0
            found[name] = ecsq(w, lam * scale, importance=costs.get(name), name=name)
        put_quantized(state, found, self.finetune)
