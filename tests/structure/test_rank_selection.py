"""Greedy ranks against all there are."""

import math

import pytest
import torch

from gossamer.core.errors import ArgumentError
from gossamer.structure.rank_selection import Ladder, choose_ranks


def toy(seed: int) -> list[Ladder]:
    """Three layers of 12 to 24 filters, energies falling as responses' do."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for number in range(3):
        d = int(torch.randint(12, 25, (1,), generator=g))
        values = torch.rand(d, generator=g, dtype=torch.float64).mul(-0.7).exp().cumprod(0)
        unit = float(torch.randint(20, 200, (1,), generator=g))
        kept = (values.cumsum(0) / values.sum()).clamp(max=1.0).tolist()
        made.append(Ladder(str(number), kept, [unit * (i + 1) for i in range(d)], 0.8 * unit * d))
    return made


def exhaustive(ladders: list[Ladder], budget: float) -> float:
    """The most energy of all combinations within a budget."""
    loss, cost = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for a in ladders:
        every = [None, *range(len(a.costs))]
        loss = (
            loss[:, None] + torch.tensor([a.loss(b) for b in every], dtype=torch.float64)
        ).flatten()
        cost = (
            cost[:, None] + torch.tensor([a.cost(b) for b in every], dtype=torch.float64)
        ).flatten()
    return math.exp(-float(loss[cost <= budget].min()))


@pytest.mark.parametrize("seed", range(12))
def test_near_the_best_and_within_the_budget(seed: int) -> None:
    ladders = toy(seed)
    whole = sum(ladder.whole for ladder in ladders)
    for ratio in (1.3, 2.0, 3.0):
        best = exhaustive(ladders, whole / ratio)
        found = choose_ranks(ladders, whole / ratio)
        cost = sum(a.cost(found[a.name]) for a in ladders)
        kept = math.exp(-sum(a.loss(found[a.name]) for a in ladders))
        assert cost <= whole / ratio
        assert kept >= 0.99 * best
        # no filter more fits anywhere
        for a in ladders:
            level = found[a.name]
            if level is not None and level + 1 < len(a.costs):
                assert cost - a.costs[level] + a.costs[level + 1] > whole / ratio


def test_what_is_enough_already_stays_and_what_is_fixed_counts() -> None:
    ladder = Ladder("a", [0.5, 1.0], [1.0, 4.0], 3.0)
    assert choose_ranks([ladder], 3.0) == {"a": None}
    assert choose_ranks([ladder], 3.5, fixed=1.0) == {"a": 0}
    with pytest.raises(ArgumentError, match="is below 2"):
        choose_ranks([ladder], 1.5, fixed=1.0)
    with pytest.raises(ArgumentError, match="2 energies and 1 costs"):
        Ladder("a", [0.5, 1.0], [1.0], 3.0)
    with pytest.raises(ArgumentError, match="finite"):
        Ladder("a", [math.nan], [1.0], 3.0)
