"""A gradient codec of somebody else's: ternary by the mean magnitude."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from gossamer.distribute import CODECS, Family, GradCodec
from gossamer.distribute.codecs.eager import Layout


@final
@dataclass(frozen=True)
class Mean(GradCodec):
    """Three levels, scaled by twice the mean magnitude."""

    id: ClassVar[int] = 99

    @property
    def name(self) -> str:
        return "toy-mean"

    @property
    def layout(self) -> Layout:
        return Layout(levels=1, planes=1)

    @property
    def bias(self) -> float:
        return 1.0

    def scale(self, g: Tensor) -> Tensor:
        return g.abs().max()


CODECS.register("toy", Family(Mean, "toy-mean", "toy-mean"))
