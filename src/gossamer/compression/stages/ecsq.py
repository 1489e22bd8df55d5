"""Entropy-constrained quantization."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch

from gossamer.compression.layers import per_layer
from gossamer.compression.parts import Importance, importance_labels, importances, put_quantized
from gossamer.compression.settings import (
    Strength,
    Training,
)
from gossamer.compression.size import Size, priced
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State
from gossamer.core import names
from gossamer.core.codebook import Quantized
from gossamer.core.plain import copied
from gossamer.quantize import ecsq

__all__ = ["Ecsq"]


class Ecsq(LayerStage):
    """Entropy-constrained quantization: trade squared error against bits, then fine-tune.

    ``lam`` is the price of a bit in units of the layer's variance: larger, fewer bits. With the
    run's ``max_bytes`` all are multiplied by the factor whose file has that size.
    ``importance``: as in ``share``, in parts of the layer's mean.
    """

    stage: Literal["ecsq"] = "ecsq"
    lam: Strength
    importance: Importance = "equal"
    finetune: Training | None = None

    shares: ClassVar[bool] = True
    by_layer: ClassVar[tuple[str, ...]] = ("lam",)

    @property
    def aims(self) -> bool:
        """Always: every layer has a price."""
        return True

    @property
    def labels(self) -> str:
        """Where the Hessian is asked for."""
        return importance_labels(self.importance)

    def run(self, state: State) -> None:
        """Quantize each layer at its price, then fine-tune."""
        weights = self.weights(state.model)
        prices = per_layer(state.model, weights, self.lam)
        costs = importances(state, self.importance, prices)

        def quantized(factor: float) -> dict[str, Quantized]:
            """Each layer's values at its price times a factor."""
            found = {}
            for name, lam in prices.items():
                w = weights[name].detach()
                kept = w[w != 0]
                scale = float(kept.var(correction=0)) if kept.numel() else 0.0
                found[name] = ecsq(w, factor * lam * scale, importance=costs.get(name), name=name)
            return found

        factor = 1.0 if state.size is None else self._sized(state, state.size, quantized)
        put_quantized(state, quantized(factor), self.finetune)

    def _sized(
        self, state: State, size: Size, quantized: Callable[[float], dict[str, Quantized]]
    ) -> float:
        """The factor of all prices whose file has the size."""
        trial = copied(state.model)
        parameters = names.parameters(trial)

        def measured(factor: float) -> int:
            """Bytes of the file at this factor."""
            with torch.no_grad():
                for name, made in quantized(factor).items():
                    parameters[name].copy_(made.dequantize())
            found = size.of(state, trial)
            state.progress.say(f"  prices times {factor:.3g}: {found:,} bytes")
            return found

        # fine-tuned values take the bytes of those before, to a few
        factor, found = priced(size.most - size.most // 1000, 1.0, measured)
        state.notes["size"] = {"most": size.most, "factor": factor, "bytes": found}
        return factor
