"""The fit of one layer's responses: by hand, by brute force, and what cannot be beaten."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.structure.low_rank import (
    Pairs,
    energies,
    fit_linear,
    fit_nonlinear,
    objective,
    relu_error,
    solve_targets,
)


def correlated(n: int, d: int, seed: int, mean: float = 0.5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64) * torch.logspace(0, -1, d)
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + mean


def test_principal_components_by_hand() -> None:
    # about (1, 2): spread 3 along the first axis, 1 along the second
    y = torch.tensor([[4.0, 2.0], [-2.0, 2.0], [1.0, 3.0], [1.0, 1.0]])
    pairs = Pairs.of(y, y)
    torch.testing.assert_close(energies(pairs), torch.tensor([18.0, 2.0], dtype=torch.float64))
    found = fit_linear(pairs, 1)
    torch.testing.assert_close(found.second.abs(), torch.tensor([[1.0], [0.0]]).double())
    torch.testing.assert_close(found.bias, torch.tensor([0.0, 2.0]).double())
    torch.testing.assert_close(
        found(y.double()), torch.tensor([[4.0, 2], [-2, 2], [1, 2], [1, 2]]).double()
    )


def test_sums_of_batches_are_the_sum_of_all() -> None:
    y, z = correlated(60, 5, 0), correlated(60, 5, 1)
    whole = Pairs.of(y, z)
    parts = Pairs.of(y[:20], z[:20]) + Pairs.of(y[20:], z[20:])
    for a, b in zip(whole.centred(), parts.centred(), strict=True):
        torch.testing.assert_close(a, b)
    assert parts.count == 60


@settings(max_examples=40)
@given(
    y=st.floats(0, 3),
    given_=st.floats(-4, 4),
    weight=st.sampled_from([0.01, 0.1, 1.0, 10.0]),
)
def test_targets_are_those_of_brute_force(y: float, given_: float, weight: float) -> None:
    target, at = torch.tensor(y).double(), torch.tensor(given_).double()
    grid = torch.linspace(-5, 5, 20001, dtype=torch.float64)
    cost = (target - grid.clamp_min(0)) ** 2 + weight * (grid - at) ** 2
    z = solve_targets(target, at, weight)
    mine = float((target - z.clamp_min(0)) ** 2 + weight * (z - at) ** 2)
    assert mine <= float(cost.min()) + 1e-9
    assert abs(mine - float(cost.min())) < 1e-5 * (1 + weight)  # the grid's step


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5), weight=st.sampled_from([0.1, 1.0]))
def test_the_objective_never_rises_for_a_fixed_lambda(seed: int, rank: int, weight: float) -> None:
    now, wanted = correlated(80, 5, seed), correlated(80, 5, seed + 1)
    target = wanted.clamp_min(0)
    found, last = fit_linear(Pairs.of(now, wanted), rank), math.inf
    for _ in range(8):
        z = solve_targets(target, found(now), weight)
        between = objective(target, z, found(now), weight)
        found = fit_linear(Pairs.of(now, z), rank)
        after = objective(target, z, found(now), weight)
        assert between <= last * (1 + 1e-9) + 1e-9
        assert after <= between * (1 + 1e-9) + 1e-9
        last = after


def test_no_truncation_and_no_random_start_is_nearer() -> None:
    y, z = correlated(200, 6, 3), correlated(200, 6, 3).clamp_min(0) @ correlated(6, 6, 4)
    rank = 2
    mine = fit_linear(Pairs.of(y, z), rank)
    least = float((z - mine(y)).square().sum())
    yc, zc = y - y.mean(0), z - z.mean(0)
    whole = torch.linalg.lstsq(yc, zc).solution.T
    u, s, v = torch.linalg.svd(whole)
    plain = u[:, :rank] * s[:rank] @ v[:rank]
    assert least <= float((zc - yc @ plain.T).square().sum()) * (1 + 1e-12)
    g = torch.Generator().manual_seed(0)
    for _ in range(500):  # each start with the best second factor for it
        q = torch.randn(rank, 6, generator=g, dtype=torch.float64)
        p = torch.linalg.lstsq(yc @ q.T, zc).solution.T
        assert least <= float((zc - yc @ q.T @ p.T).square().sum()) * (1 + 1e-12)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_through_relu_is_no_worse_than_linearly(rank: int) -> None:
    now, wanted = correlated(300, 6, 8, mean=-0.2), correlated(300, 6, 8, mean=-0.2)
    target = wanted.clamp_min(0)
    linear = relu_error(fit_linear(Pairs.of(now, wanted), rank), now, target)
    assert relu_error(fit_nonlinear(now, wanted, rank), now, target) < linear


def test_full_rank_gives_the_responses_and_dependent_ones_too() -> None:
    y = correlated(50, 4, 0)
    torch.testing.assert_close(fit_linear(Pairs.of(y, y), 4)(y), y, rtol=1e-8, atol=1e-8)
    twice = torch.cat([y, y], 1)  # singular sums
    torch.testing.assert_close(
        fit_linear(Pairs.of(twice, twice), 4)(twice), twice, rtol=1e-6, atol=1e-6
    )
    still = torch.ones(5, 3)  # no spread at all
    torch.testing.assert_close(fit_nonlinear(still, still, 1)(still.double()), still.double())


def test_bad_input() -> None:
    y = correlated(9, 3, 0)
    for rank in (0, 4):
        with pytest.raises(ArgumentError, match=f"rank={rank} is outside 1 to 3"):
            fit_linear(Pairs.of(y, y), rank)
    with pytest.raises(ArgumentError, match="NaN or infinity"):
        Pairs.of(y, y * math.nan)
    with pytest.raises(ArgumentError, match=r"\(9, 3\) and \(9, 2\)"):
        Pairs.of(y, y[:, :2])
    with pytest.raises(ArgumentError, match="turns"):
        fit_nonlinear(y, y, 1, turns=[(0.0, 3)])
