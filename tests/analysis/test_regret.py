"""The bounds of quantized training against simulation and direct sums."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gossamer.analysis import regret
from gossamer.core.errors import ArgumentError


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


def learned(
    gradient: Callable[[int, Tensor], Tensor],
    start: Tensor,
    *,
    steps: int,
    rate: float,
    beta: float,
    alpha: float | None = None,
    delta: float = 0.0,
    bits: Callable[[Tensor], Tensor] = lambda g: g,
) -> tuple[Tensor, Tensor, bool]:
    """RMSProp in the box [-1, 1]^d, as the module states it: quantized weights and gradients of
    all steps, and whether sqrt(t v_t) never fell.
    """
    w, v, least = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    weights, gradients, rose = [], [], True
    for t in range(1, steps + 1):
        q = w if alpha is None else (w / (alpha * delta)).round() * alpha * delta
        q = q if alpha is None else q.clamp(-alpha, alpha)
        g = gradient(t, q)
        weights.append(q)
        gradients.append(g)
        sent = bits(g)
        v = beta * v + (1 - beta) * sent.square()
        now = (t * v).sqrt()
        rose = rose and bool((now >= least - 1e-12).all())
        least = now
        step = torch.where(v > 0, sent / v.clamp(min=1e-300).sqrt(), 0)
        w = (w - rate / math.sqrt(t) * step).clamp(-1, 1)
    return torch.stack(weights), torch.stack(gradients), rose


@pytest.mark.parametrize("d", [1, 8, 64])
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_the_rate_of_linear_losses_stays_under_its_bound(d: int, rate: float) -> None:
    steps, beta, size = 500, 0.9, 0.5
    # signs of one size: v only rises, as assumed
    signs = torch.sign(draws((steps + 1, d)) + 0.1)
    weights, g, rose = learned(
        lambda t, _: size * signs[t],
        torch.zeros(d, dtype=torch.float64),
        steps=steps,
        rate=rate,
        beta=beta,
    )
    assert rose
    best = -torch.sign(g.sum(0))
    found = float(((weights - best) * g).sum()) / steps
    scale = regret.rate_scale(gradient=size, diameter=2.0, rate=rate, beta=beta)
    assert 0 < found <= regret.average_regret(d, steps, scale=scale)


@pytest.mark.parametrize("levels", [1, 2])
def test_quantized_gradients_slow_no_more_than_their_factor(levels: int) -> None:
    # linear losses of uneven sizes; the expectation is over 40 streams of rounding
    d, steps, beta, rate, delta = 30, 200, 0.9, 0.5, 1 / levels
    sizes = torch.logspace(-2, 0, d, dtype=torch.float64)
    signs = torch.sign(draws((steps + 1, d), 3) + 0.2)
    total = 0.0
    for stream in range(40):
        g = torch.Generator().manual_seed(stream)

        def rounded_once(x: Tensor, g: torch.Generator = g) -> Tensor:
            top = float(x.abs().max())
            place = x.abs() / top * levels
            up = torch.rand(x.shape, dtype=x.dtype, generator=g) < place.frac()
            return x.sign() * (place.floor() + up.double()) * top / levels

        weights, seen, _ = learned(
            lambda t, _: sizes * signs[t],
            torch.zeros(d, dtype=torch.float64),
            steps=steps, rate=rate, beta=beta, bits=rounded_once,
        )  # fmt: skip
        best = -torch.sign(seen.sum(0))
        total += float(((weights - best) * seen).sum()) / steps / 40
    scale = regret.rate_scale(gradient=1.0, diameter=2.0, rate=rate, beta=beta)
    factor = regret.dimension_factor(d, delta)
    assert 0 < total <= regret.average_regret(d, steps, scale=scale, factor=factor)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_quadratic_losses_with_quantized_weights_stay_under_rate_and_floor(m: int) -> None:
    d, steps, lipschitz, rate, beta = 20, 400, 1.5, 0.3, 0.9
    alpha, delta = 0.6, regret.spacing(m)  # weights go beyond the range too
    targets = (draws((steps + 1, d), 5) * 0.2 + draws((d,), 6)).clamp(-1, 1)
    weights, g, _ = learned(
        lambda t, q: lipschitz * (q - targets[t]),
        torch.zeros(d, dtype=torch.float64),
        steps=steps, rate=rate, beta=beta, alpha=alpha, delta=delta,
    )  # fmt: skip
    mine = targets[1:]
    best = mine.mean(0)
    off = ((weights - mine).square().sum(1) - (best - mine).square().sum(1)) * lipschitz / 2
    diameter = 2 * math.sqrt(d)
    floor = regret.weight_floor(d, delta, alpha=alpha, diameter=diameter, lipschitz=lipschitz)
    # both terms of the floor by themselves
    assert float(g.norm(dim=1).max()) <= lipschitz * diameter
    scale = regret.rate_scale(gradient=2 * lipschitz, diameter=2.0, rate=rate, beta=beta)
    assert 0 < float(off.mean()) <= regret.average_regret(d, steps, scale=scale, floor=floor)


def test_the_rate_scale_is_its_formula() -> None:
    found = regret.rate_scale(gradient=3.0, diameter=2.0, rate=0.25, beta=0.84)
    assert found == pytest.approx(3 * (4 / 0.5 + 0.25 / 0.4))
    with pytest.raises(ArgumentError, match=r"beta=1\.0"):
        regret.rate_scale(gradient=1.0, diameter=1.0, rate=1.0, beta=1.0)


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
