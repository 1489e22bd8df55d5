"""What one operation of a forward pass says of the units of its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from gossamer.structure.surgery.memory import compact

__all__ = ["Fold", "Given", "Grouped", "Ids", "Map", "Node", "Split"]

Ids = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Map:
    """Units along several axes of one tensor: what stays must be a tensor too.

    Attributes:
        ids: 0 where there is no unit.
        fixed: axes that keep their length.
        ordered: the units come in the order of the tensor, so that rows may lose different ones
            of the last axis, as long as they lose equally many.
    """

    ids: Ids
    fixed: tuple[int, ...] = ()
    ordered: bool = False

    @staticmethod
    def of(layer: Tensor, axes: list[int], fixed: tuple[int, ...] = ()) -> Map:
        """Of a layer that varies along these axes."""
        ids = compact(layer).squeeze([d for d in range(layer.ndim) if d not in axes]).numpy()
        return Map(ids, fixed, bool((np.diff(ids.reshape(-1)) > 0).all()))


@dataclass(frozen=True)
class Split:
    """An axis that the forward cuts into pieces, whose shares must stay what they were."""

    ids: Ids
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Grouped:
    """Inputs and outputs of a grouped convolution, by group; its weight's name."""

    weight: str
    inputs: Ids
    outputs: Ids
    groups: int
    transposed: bool


@dataclass(frozen=True)
class Fold:
    """Units that give a constant: what they add to the units behind, for their bias.

    Attributes:
        weight, bias: names; the bias is made where the module has none.
        inputs: the units that may go.
        outputs: the units behind.
        added: (inputs, outputs).
    """

    weight: str
    bias: str
    inputs: Ids
    outputs: Ids
    added: Tensor


@dataclass
class Node:
    """One operation of the forward pass.

    Attributes:
        op: its name.
        where: file and line of the forward, and the module.
        owner: the module of the user's whose forward it stands in.
        module: the innermost module.
        reads, writes: keys of storages.
        unions: pairs of units that are one.
        pins: units that have to stay, why, and whether only because their values are read.
        edges: (from, to, matrix): which unit's values the values of another depend on.
        axes: units of parameters' axes that the rule accounted for, and their role.
        maps, splits, grouped, folds: see there.
        sizes: attributes of the module that count units, and the units they count.
        aside: its limits hold only where an output depends on it.
    """

    op: str
    where: str = ""
    owner: nn.Module | None = None
    module: nn.Module | None = None
    reads: set[int] = field(default_factory=set)
    writes: set[int] = field(default_factory=set)
    unions: list[tuple[Ids, Ids]] = field(default_factory=list)
    pins: list[tuple[Ids, str, bool]] = field(default_factory=list)
    edges: list[tuple[Ids, Ids, Ids]] = field(default_factory=list)
    axes: list[tuple[Ids, str]] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    grouped: list[Grouped] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    sizes: dict[str, Ids] = field(default_factory=dict)
    aside: bool = False


@dataclass(frozen=True)
class Given:
    """A module's output that is the same for all inputs.

    Attributes:
        out: the tensor, in which others may have written since.
        value: of each channel.
        axis: of the channels.
        after: how many operations had been done when it was given.
    """

    out: Tensor
    value: Tensor
    axis: int
    after: int
