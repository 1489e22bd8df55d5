"""A few-bit quantizer of somebody else's, and a stage of its own."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State
from gossamer.core.quantizer import Quantizer, on_kept
from gossamer.quantize.fewbits import QUANTIZERS, FewBits
from gossamer.quantize.projected import Projected


def halves(weight: Tensor) -> Tensor:
    """-h, 0 or h, with h half of the largest magnitude."""
    half = weight.abs().max() / 2
    return half * (weight / half).round().clamp(-1, 1)


def build(layers: list[str], **_: Any) -> Quantizer:
    """The projection, trained straight through."""
    return Projected(on_kept(halves), clip=None, include=layers)


QUANTIZERS.register("toy-halves", FewBits(build, "0, ±max/2"))


class Halve(LayerStage):
    """Put weights on -h, 0, h at once."""

    stage: Literal["toy_halve"] = "toy_halve"
    rebuilds: ClassVar[bool] = True

    def run(self, state: State) -> None:
        with torch.no_grad():
            for weight in self.weights(state.model).values():
                weight.copy_(halves(weight))
