"""A path of growing strengths: group lasso in rounds, until a layer is as small as asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from gossamer.core import names
from gossamer.core.groups import Family, zero_masks
from gossamer.core.layer_groups import layer_groups
from gossamer.core.masks import Masks
from gossamer.core.method import Masked
from gossamer.datasets import Dataset
from gossamer.structure import GroupLasso
from gossamer.training import TrainConfig, train

__all__ = ["Pull", "dead", "path"]

Pull = tuple[str, str, float]
"""Layer, kind of its groups, and the strength relative to the path's."""


def _families(net: nn.Module, pulls: Sequence[Pull]) -> list[tuple[Family, float]]:
    return [
        (family.weights_only(), weight)
        for layer, kind, weight in pulls
        for family in layer_groups(net, kind, include=layer)
    ]


def dead(net: nn.Module, pulls: Sequence[Pull]) -> Masks:
    """Masks that hold the groups which are zero."""
    return zero_masks([f for f, _ in _families(net, pulls)], names.parameters(net))


def path(
    net: nn.Module,
    data: Dataset,
    pulls: Sequence[Pull],
    strengths: Sequence[float],
    config: TrainConfig,
    cost: Callable[[nn.Module], float],
    targets: Sequence[float],
    remove: Callable[[nn.Module], nn.Module],
    work: Path,
) -> Iterator[tuple[float, float, nn.Module]]:
    """Train a round at each strength, taking out what died, and yield at each target reached.

    Args:
        strengths: lambda of each round.
        config: of a round; its learning rate falls to 0, so that groups come to rest.
        cost: what must fall below the targets, which fall themselves.
        remove: the network without what is dead; it goes on with that.
        work: prefix of the rounds' checkpoints.

    Yields target, strength and network; a target that no strength reaches is left out.
    """
    waiting = list(targets)
    for number, strength in enumerate(strengths):
        lasso = [
            GroupLasso([family], strength * weight) for family, weight in _families(net, pulls)
        ]
        frozen = dead(net, pulls)
        train(
            net,
            data,
            replace(config, seed=config.seed + 1 + number),
            methods=[*lasso, Masked(frozen)],
            checkpoint=work.with_name(f"{work.name}-round-{number}.pt"),
        )
        net = remove(net)
        while waiting and cost(net) <= waiting[0]:
            yield waiting.pop(0), strength, net
        if not waiting:
            return
