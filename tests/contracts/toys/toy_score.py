"""A pruning score of somebody else's: magnitude over the layer's largest."""

from collections.abc import Mapping

from torch import Tensor

from gossamer.prune.scores import SCORES, Score


def relative(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|w| / max |w|; higher = keep."""
    return {name: w.detach().abs() / w.detach().abs().max() for name, w in weights.items()}


SCORES.register("toy-relative", Score(relative))
