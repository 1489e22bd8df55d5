"""Whole groups of weights trained to zero, then fine-tuned without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from torch import Tensor, nn

from gossamer.compression.floor import Rounds
from gossamer.compression.groups import (
    COUPLED,
    Consumers,
    CoupledOrKind,
    coupled,
    found,
    multiplications,
)
from gossamer.compression.layers import check_setting, per_layer, trying
from gossamer.compression.settings import ByLayer, NotNegative, Training
from gossamer.compression.stage import LayerStage
from gossamer.compression.state import State, ends_of
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.groups import Family, zero_masks
from gossamer.core.method import Masked
from gossamer.structure import GroupLasso

__all__ = ["GroupLassoStage"]


class _Emptied(ArgumentError):
    """Every group of a layer became zero."""


def _no_runs(kinds: dict[str, Any]) -> dict[str, Any]:
    if not kinds:
        raise ValueError("name a kind of groups and its strength, such as {filter: 0.005}")
    for kind in kinds:
        if ":" in kind:
            raise ValueError(f"{kind} keeps some weights of every group; take prune for it")
    return kinds


class GroupLassoStage(LayerStage):
    """Train under a price for each group that is not zero, then fine-tune without the price.

    Attributes:
        groups: kind of groups -> strength (lambda), one number or one by layer pattern; a layer
            that no pattern names has no such groups. ``coupled``: units through the whole network
            (:func:`gossamer.structure.coupled_groups`), which ``shrink`` can take out.
        relative: strengths say how often the lasso would shorten a group of its layer's mean norm
            to nothing within ``train``, if the data did not pull: one number for networks,
            learning rates and lengths of any size.
        rounds: lasso and fine-tuning in turn, each lasso ``growth`` times as strong as the one
            before; the last round has the strengths as given. The last round that keeps the run's
            floor is what the stage ends with.
        growth: from round to round.
        form: ``sub-gradient`` as published, ``smooth`` as published for LSTM units, ``proximal``.
        threshold: weights of the groups that are smaller become 0 after each step.
        sized: a group's norm counts times the root of its number of weights.
        consumers: of ``unit``: a recurrent layer -> what reads its outputs.
        train: under the lasso; its learning rate should fall towards 0.
        finetune: afterwards, groups that are zero held at zero.
    """

    stage: Literal["group_lasso"] = "group_lasso"
    groups: Annotated[dict[CoupledOrKind, ByLayer[NotNegative]], AfterValidator(_no_runs)]
    relative: bool = False
    rounds: Annotated[int, Field(ge=1, le=100)] = 1
    growth: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0
    form: Literal["sub-gradient", "smooth", "proximal"] = "sub-gradient"
    threshold: NotNegative = 1e-4
    sized: bool = False
    consumers: Consumers | None = None
    train: Training
    finetune: Training | None = None

    @property
    def retrains(self) -> bool:
        """Always."""
        return True

    def check(self, model: nn.Module) -> None:
        """Try the patterns, and whether the layers have such groups."""
        super().check(model)
        weights, count = self.weights(model), 0
        for kind, strength in self.groups.items():
            check_setting(model, weights, "groups", strength)
            with trying("groups", kind):
                count += kind == COUPLED or len(self._families(model, kind))
        if not count:
            with trying("groups"):
                raise ArgumentError(
                    "no layer has such groups at a strength above 0; weights are: "
                    + ", ".join([*weights][:40])
                )

    def covered(self, model: nn.Module) -> set[str] | None:
        """The weights that have groups under a price; of coupled ones those that may have any."""
        inside: set[str] = set()
        for kind in self.groups:
            if kind == COUPLED:
                inside |= set(per_layer(model, self.weights(model), self.groups[kind]))
            else:
                inside |= {n for f, _ in self._families(model, kind) for n in f.parameters}
        return inside

    def run(self, state: State) -> None:
        """Round by round: the lasso, the masks of what is zero, the fine-tuning."""
        pairs = [pair for kind in self.groups for pair in self._pairs(state, kind)]
        notes: dict[str, Any] = {}
        rounds = Rounds(state, self.rounds)
        for number in range(1, self.rounds + 1):
            part = self.growth ** (number - self.rounds)
            try:
                self._round(state, [(f, part * v) for f, v in pairs], number, notes)
            except _Emptied:
                if rounds.good is None:
                    raise
                rounds.reached = False  # too strong by now: as far as the round before
                break
            rounds.ended(number)
        rounds.back()
        weights = names.parameters(state.model)
        zeros = zero_masks([family for family, _ in pairs], weights)
        used = _counted(state)
        state.notes["group_lasso"] = {
            **notes,
            "groups": [_row(family, strength, weights) for family, strength in pairs],
            "layers": _layers({n: weights[n] for n in zeros if weights[n].ndim > 1}, used),
        }

    def _round(
        self,
        state: State,
        pairs: list[tuple[Family, float]],
        number: int,
        notes: dict[str, Any],
    ) -> None:
        before = names.parameters(state.model)
        lasso = [
            GroupLasso(
                [family],
                strength * (self._unit(family, before, state) if self.relative else 1.0),
                form=self.form,
                threshold=self.threshold,
                sized=self.sized,
            )
            for family, strength in pairs
        ]
        earlier = state.others(())
        ends = {"lasso": ends_of(state.train(self.train, [*lasso, *earlier], 2 * number - 1))}
        zeros = zero_masks([family for family, _ in pairs], names.parameters(state.model))
        for name, mask in zeros.items():
            if not mask.any() and set(self.groups) != {"depth"}:
                raise _Emptied(
                    f"stage {state.name}: every group of {name} became zero, which empties the "
                    "layer; lower its strength in groups"
                )
            state.masks[name] = state.masks[name] & mask if name in state.masks else mask
        state.masks.apply_(state.model)
        if self.finetune is not None and self.finetune.epochs:
            ends["finetune"] = ends_of(
                state.train(self.finetune, [Masked(state.masks)], 2 * number)
            )
        notes |= ends

    def _unit(self, family: Family, weights: Mapping[str, Tensor], state: State) -> float:
        """The strength that takes a group of the family's mean norm to zero within ``train``."""
        norms = family.norms(weights)
        alive = norms[norms > 0]
        if not len(alive):
            return 0.0
        each = -(-len(state.data.train) // self.train.batch_size)
        config = self.train.config(0)
        rate = config.rate(each)
        length = sum(rate(step) for step in range(each * config.epochs))
        if self.form != "proximal" and config.optimizer == "sgd":  # momentum repeats a gradient
            length /= 1 - config.momentum
        return float(alive.mean()) / length if length else 0.0

    def _pairs(self, state: State, kind: str) -> list[tuple[Family, float]]:
        if kind != COUPLED:
            return self._families(state.model, kind)
        weights = self.weights(state.model)
        by = per_layer(state.model, weights, self.groups[kind])
        named = {n: v for n, v in by.items() if v}
        return [
            (family.weights_only(), next(named[n] for n in family.parameters if n in named))
            for family in coupled(state, named)
        ]

    def _families(self, model: nn.Module, kind: str) -> list[tuple[Family, float]]:
        """Families of a kind, without biases, each with its strength."""
        weights, strength = self.weights(model), self.groups[kind]
        by = per_layer(model, weights, strength)
        named = self.include if not isinstance(strength, Mapping) else list(by)
        if not by:  # patterns of types may match nothing, so that a recipe serves many networks
            return []
        pairs = []
        for family in found(model, kind, by, named, self.consumers):
            first = next(n for n in family.parameters if n in by)
            if by[first]:
                pairs.append((family.weights_only(), by[first]))
        return pairs


def _counted(state: State) -> dict[str, float]:
    try:
        return multiplications(state)
    except ArgumentError:  # no layer that is known: the notes do without
        return {}


def _row(family: Family, strength: float, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    left = int((family.norms(weights) > 0).sum())
    return {
        "kind": family.kind,
        "layer": family.layer,
        "strength": strength,
        "groups": len(family),
        "left": left,
    }


def _layers(weights: Mapping[str, Tensor], used: Mapping[str, float]) -> list[dict[str, Any]]:
    """What is left of each lowered matrix; multiplications are of its rows times its columns."""
    rows = []
    for name, weight in weights.items():
        matrix = weight.detach().flatten(1) != 0
        left = (int(matrix.any(1).sum()), int(matrix.any(0).sum()))
        row = {
            "name": name,
            "rows": [matrix.shape[0], left[0]],
            "columns": [matrix.shape[1], left[1]],
            "density": int(matrix.sum()) / matrix.numel(),
        }
        if name in used:
            row["multiplications"] = [used[name] * matrix.numel(), used[name] * left[0] * left[1]]
        rows.append(row)
    return rows
