"""Linear layers as products of two smaller ones."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from gossamer.compression import records
from gossamer.compression.layers import per_layer
from gossamer.compression.settings import ByLayer, LayerDensity, Training
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State, ends_of
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.structure import factorize, svd_size

__all__ = ["Svd"]


class Svd(LayerStage):
    """Linear layers as products of two smaller ones, by truncated singular value decomposition.

    Layers that would not get smaller stay as they are. Later stages name the factors ``LAYER.0``
    and ``LAYER.1``; patterns such as ``LAYER`` or ``LAYER*`` hold for both.

    Attributes:
        rank: one number, or one by layer pattern (a layer that none names is left alone).
        energy: in place of a rank: the least that keeps this part of the squared singular values.
        train: the training of the factors.
    """

    stage: Literal["svd"] = "svd"
    rank: ByLayer[Annotated[int, Field(ge=1)]] | None = None
    energy: LayerDensity | None = None
    train: Training | None = None

    rebuilds: ClassVar[bool] = True
    by_layer: ClassVar[tuple[str, ...]] = ("rank", "energy")

    @model_validator(mode="after")
    def _one_way(self) -> Svd:
        if (self.rank is None) == (self.energy is None):
            raise ValueError("give either rank or energy (the part that is kept)")
        return self

    @property
    def retrains(self) -> bool:
        """Where it trains at all."""
        return self.train is not None

    def covered(self, model: nn.Module) -> set[str] | None:
        """Of the weights those of linear layers."""
        linear = {f"{n}.weight" for n, m in names.modules(model).items() if type(m) is nn.Linear}
        return (super().covered(model) or set()) & linear

    def run(self, state: State) -> None:
        """Linear layers as two, where that is smaller, and their training."""
        ranks = self._ranks(state)
        model, rows, made = state.model, [], {}
        for name, rank in ranks.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)  # _ranks has looked
            made[name] = factorize(layer, rank)
            size = svd_size(layer.in_features, layer.out_features, rank)
            rows.append({"name": name, "rank": rank, "before": size.before, "after": size.after})
        record = records.LowRank(ranks=ranks)
        model = records.rebuild(model, [record])
        for name, pair in made.items():
            model.get_submodule(name).load_state_dict(pair.state_dict())
            state.factored(name, bias=f"{name}.1.bias")
        state.change(model, record)
        notes: dict[str, Any] = {"layers": rows}
        if self.train is not None and self.train.epochs:
            notes |= ends_of(state.train(self.train, state.others(())))
        state.notes["svd"] = notes

    def _ranks(self, state: State) -> dict[str, int]:
        """The rank of each linear layer that gets smaller."""
        weights = list(self.weights(state.model))
        given: Any = self.energy if self.rank is None else self.rank
        tied = names.tied(state.model)
        ranks: dict[str, int] = {}
        for weight, value in per_layer(state.model, weights, given).items():
            name = weight.removesuffix(".weight")
            layer = state.model.get_submodule(name) if weight.endswith(".weight") else None
            if type(layer) is not nn.Linear:
                continue
            if weight in tied.values():
                raise ArgumentError(f"{weight} is tied to another place; exclude it")
            rank = int(value) if self.energy is None else _rank_of(layer, float(value))
            if rank * (layer.in_features + layer.out_features) < layer.weight.numel():
                ranks[name] = rank
        if not ranks:
            raise ArgumentError(
                f"stage {state.name}: no linear layer gets smaller; give a lower rank or energy, "
                "or leave the stage out"
            )
        return ranks


def _rank_of(layer: nn.Linear, energy: float) -> int:
    squares = torch.linalg.svdvals(layer.weight.detach().double()).square().cumsum(0)
    # the last sum is all of it, whatever rounding says of the others
    return min(len(squares), int((squares < energy * squares[-1]).sum()) + 1)
