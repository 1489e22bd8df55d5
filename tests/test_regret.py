"""The bounds of quantized training against simulation and direct sums."""

import math

import pytest
import torch
from torch import Tensor

from gossamer.errors import ArgumentError
from gossamer.theory import regret


def draws(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=g)


def rounded(g: Tensor, scale: float, levels: int, times: int) -> Tensor:
    """SQm as defined, (times, d)."""
    x = g.abs() / scale * levels
    up = torch.rand(
        (times, len(g)), dtype=torch.float64, generator=torch.Generator().manual_seed(9)
    )
    return g.sign() * (x.floor() + (up < x - x.floor()).double()) * scale / levels


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_variance_is_that_of_stochastic_rounding(bits: int) -> None:
    g = draws((7,))
    delta = regret.spacing(bits)
    q = rounded(g, float(g.abs().max()), round(1 / delta), 60_000)
    assert torch.allclose(q.mean(0), g, atol=0.03)
    measured = float((q - g).square().sum(1).mean())
    assert measured == pytest.approx(regret.variance(g, delta), rel=0.03)


def test_variance_bound_on_100_vectors() -> None:
    for seed in range(100):
        g = draws((40,), seed) ** (1 + 2 * (seed % 2))
        for bits in (2, 3, 4):
            delta = regret.spacing(bits)
            exact = regret.variance(g, delta)
            assert exact <= regret.variance_bound(g, delta)
            square = exact + float(g.square().sum())
            assert square <= regret.dimension_factor(40, delta) ** 2 * float(g.square().sum())


def test_dimension_factor_on_the_worst_vectors() -> None:
    # one large entry: ||g||_inf ||g||_1 / ||g||^2 reaches (1 + sqrt(d)) / 2
    for d in (1, 2, 10, 1000):
        g = torch.full((d,), 1 / (1 + math.sqrt(d)), dtype=torch.float64)
        g[0] = 1
        ratio = 1 + regret.variance(g, 1.0) / float(g.square().sum())
        assert ratio <= regret.dimension_factor(d, 1.0) ** 2
        assert regret.variance_bound(g, 1.0) / float(g.square().sum()) == pytest.approx(
            (1 + math.sqrt(d)) / 2
        )


@pytest.mark.parametrize(("c", "published"), [(1.0, 0.151), (2.0, 0.0115), (3.0, 0.00041)])
def test_clip_error(c: float, published: float) -> None:
    found = regret.clip_error(c)
    assert found == pytest.approx(published, rel=0.02)
    x = torch.linspace(c, 40, 400_001, dtype=torch.float64)
    density = 2 * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    assert found == pytest.approx(float(torch.trapezoid((x - c).square() * density, x)), rel=1e-6)
    assert regret.clip_error(c, 3.0, 5) == pytest.approx(45 * found)
    g = 3 * draws((20_000, 5))
    far = (g.clamp(-3 * c, 3 * c) - g).norm(dim=1).mean()
    assert 2 * float(far) <= regret.clip_regret(c, 3.0, 5, diameter=2.0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("c", [1.0, 2.5])
def test_clipped_ratio(bits: int, c: float) -> None:
    g = draws((400_000,)).clamp(-c, c)
    delta = regret.spacing(bits)
    ratio = (regret.variance(g, delta) + float(g.square().sum())) / len(g)
    assert regret.clipped_ratio(c, delta) == pytest.approx(ratio, rel=0.01)
    if bits == 2:
        assert ratio <= regret.clip_factor(c, delta) ** 2


def test_unclipped_ratio_grows_with_the_dimension() -> None:
    for d in (100, 2000):
        ratios = [1 + regret.variance(g, 1.0) / float(g.square().sum()) for g in draws((400, d), d)]
        mean = sum(ratios) / len(ratios)
        assert regret.unclipped_ratio(d, 1.0) == pytest.approx(mean, rel=0.03)
    assert regret.unclipped_ratio(100_000, 1.0) == pytest.approx(3.61, abs=0.02)
    assert regret.unclipped_ratio(1, 1.0) == pytest.approx(2 / math.pi)


def test_weight_floor_covers_the_rounding_of_weights() -> None:
    alpha, delta = 0.7, regret.spacing(3)
    w = 2 * alpha * (torch.rand(50, generator=torch.Generator().manual_seed(0)) - 0.5)
    far = (w - alpha * delta * torch.round(w / (alpha * delta))).square().sum()
    floor = regret.weight_floor(50, delta, alpha=alpha, diameter=1e-6, lipschitz=2.0)
    assert 2e-6 * math.sqrt(float(far)) <= floor
    assert regret.weight_floor(5, 0.0, alpha=alpha, diameter=3.0, lipschitz=2.0) == 18
    floors = [regret.weight_floor(d, delta, alpha=1, diameter=1, lipschitz=1) for d in (1, 10, 100)]
    assert floors == sorted(floors)


def test_average_regret() -> None:
    assert regret.average_regret(8, 16, scale=0.5, factor=3.0, floor=0.25) == 3.25
    assert regret.average_regret(8, 10**12, scale=0.5, floor=0.25) == pytest.approx(0.25, abs=1e-5)


def test_bad_input_is_named() -> None:
    with pytest.raises(ArgumentError, match="bits=1"):
        regret.spacing(1)
    with pytest.raises(ArgumentError, match=r"delta_g=0\.4"):
        regret.variance(torch.ones(3), 0.4)
    with pytest.raises(ArgumentError, match="c=0"):
        regret.clip_error(0.0)
    with pytest.raises(ArgumentError, match="finite"):
        regret.variance_bound(torch.tensor([1.0, float("nan")]), 1.0)
    with pytest.raises(ArgumentError, match=r"delta_g=0\.5 must be 1"):
        regret.unclipped_ratio(10, 0.5)
    with pytest.raises(ArgumentError, match="d=0"):
        regret.dimension_factor(0, 1.0)
    assert regret.variance(torch.zeros(3), 1.0) == 0
