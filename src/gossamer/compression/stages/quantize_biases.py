"""Biases and batch-norm parameters on a grid."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from gossamer.compression.stage import Stage
from gossamer.compression.state import State
from gossamer.core import access, names
from gossamer.quantize import uniform

__all__ = ["QuantizeBiases"]


class QuantizeBiases(Stage):
    """Put what is not a weight (biases, batch-norm scales and shifts) on a uniform grid."""

    stage: Literal["quantize_biases"] = "quantize_biases"
    bits: Annotated[int, Field(ge=2, le=16)] = 8

    shares: ClassVar[bool] = True

    @torch.no_grad()
    def run(self, state: State) -> None:
        """Round every vector of parameters."""
        weights = names.weights(state.model)
        found = {
            name: p
            for name, p in names.parameters(state.model).items()
            if name not in weights and p.is_floating_point() and p.ndim <= 1
        }
        access.check_weights(state.model, found)
        for name, p in found.items():
            p.copy_(uniform(p, bits=self.bits, name=name).dequantize())
