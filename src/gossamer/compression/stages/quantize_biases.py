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


_FINER = (12, 16, 32)


class QuantizeBiases(Stage):
    """Put what is not a weight (biases, batch-norm scales and shifts) on a uniform grid.

    Where that costs the run its floor, which it had before, a grid of 12 bits is taken, of 16, or
    none: they are few, and those of a recurrent layer count once a step.

    Attributes:
        bits: of the grid.
    """

    stage: Literal["quantize_biases"] = "quantize_biases"
    bits: Annotated[int, Field(ge=2, le=16)] = 8

    shares: ClassVar[bool] = True
    foreseen: ClassVar[bool] = True

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
        if not found:
            return
        before = {name: p.clone() for name, p in found.items()}

        def rounded(bits: int) -> None:
            """Set them to such a grid; of 32 bits: to what they were."""
            for name, p in found.items():
                was = before[name]
                p.copy_(was if bits == 32 else uniform(was, bits=bits, name=name).dequantize())

        for bits in (self.bits, *(b for b in _FINER if b > self.bits)):
            rounded(bits)
            if state.keeps_floor():
                break
        else:  # the floor was lost before
            rounded(bits := self.bits)
        if bits < 32:
            state.fixed |= set(found)
        if bits > self.bits:
            what = "as they were" if bits == 32 else f"on a grid of {bits} bits"
            state.progress.say(f"  biases stay {what}: {self.bits} bits cost the floor")
