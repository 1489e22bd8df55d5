"""What training needs of the processes that train one network together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from gossamer.core import nest

__all__ = ["Workers", "share"]


class Workers(Protocol):
    """This process among ``size`` that hold the same network and share every batch.

    :class:`gossamer.distribute.Processes` is one.

    Attributes:
        rank, size: this process and how many there are.
        about: how gradients are averaged, in words; a checkpoint resumes under the same only.
    """

    rank: int
    size: int
    about: str

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network to call instead: ``backward()`` through it averages gradients over all."""

    def settle(self, model: nn.Module) -> None:
        """Give the first process's buffers to all."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it: the same on all."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


def share(inputs: Any, targets: Any, rank: int, size: int) -> tuple[Any, Any, float]:
    """One process's part of a batch, and what its mean loss counts in the average of all.

    Every ``size``-th example from ``rank`` on. The average over all processes of weight times mean
    loss is the mean loss of the batch. A process without an example takes the whole batch with
    weight 0.

    >>> import torch
    >>> batch = torch.arange(5), torch.arange(5)
    >>> [(x.tolist(), round(w, 2)) for x, _, w in (share(*batch, rank, 2) for rank in range(2))]
    [([0, 2, 4], 1.2), ([1, 3], 0.8)]
    """
    number = nest.count(inputs)
    mine = len(range(rank, number, size))
    if not mine:
        return inputs, targets, 0.0
    own = nest.mapped(lambda t: t[rank::size], inputs)
    return own, nest.mapped(lambda t: t[rank::size], targets), mine * size / number
