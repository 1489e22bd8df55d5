"""The closed forms of straight-through estimators against quadrature, autograd and Monte Carlo."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.analysis import ste, ste_sampling
from gossamer.core.errors import ArgumentError

V_STAR = torch.tensor([1.0, -0.5, 0.8, -0.3], dtype=torch.float64)
every_estimator = pytest.mark.parametrize("estimator", ste.ESTIMATORS)


def point(theta: float, norm: float, seed: int, n: int = 5) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=g)).Q
    w_star = basis[0]
    w = norm * (math.cos(theta) * w_star + math.sin(theta) * basis[1])
    v = 1.5 * V_STAR + 0.3 * torch.randn(4, dtype=torch.float64, generator=g)
    return v, w, V_STAR, w_star


def quadrature(theta: float, norm: float) -> tuple[float, float]:
    """p and q as the paper prints them."""
    phi = torch.linspace(-math.pi / 2 + theta, math.pi / 2, 100_001, dtype=torch.float64)
    inner = ste.xi(1 / (phi.cos().clamp(min=1e-300) * norm))
    return tuple(
        float(torch.trapezoid(part * inner, phi)) / (2 * math.pi) for part in (phi.cos(), phi.sin())
    )


@pytest.mark.parametrize("theta", [0.0, 0.3, 1.2, math.pi / 2, 2.6, math.pi])
@pytest.mark.parametrize("norm", [0.2, 1.0, 4.0])
def test_p_and_q_are_the_papers_integrals(theta: float, norm: float) -> None:
    p, q = ste.p_q(theta, norm)
    assert (float(p), float(q)) == pytest.approx(quadrature(theta, norm), abs=1e-8)


def test_p_and_q_at_the_ends() -> None:
    p, q = ste.p_q(torch.tensor([0.0, math.pi]), 0.5)
    assert float(p[0]) == pytest.approx((1 - math.exp(-2)) / math.sqrt(2 * math.pi), abs=1e-15)
    assert float(q[0]) == 0
    assert float(p[1]) == pytest.approx(0, abs=1e-15)
    assert float(q[1]) == pytest.approx(0, abs=1e-15)


def test_xi_is_its_integral() -> None:
    r = torch.linspace(0, 1.7, 20_001, dtype=torch.float64)
    integral = torch.trapezoid(r.square() * torch.exp(-r.square() / 2), r)
    assert float(ste.xi(1.7)) == pytest.approx(float(integral), abs=1e-8)


def test_loss_by_hand() -> None:
    # m = 1: f = P(sigma differ) / 2 = theta / (2 pi) for v = v* = 1
    for theta in (0.0, 0.7, math.pi):
        f = ste.loss([1.0], [math.cos(theta), math.sin(theta)], [1.0], [1.0, 0.0])
        assert float(f) == pytest.approx(theta / (2 * math.pi), abs=1e-15)
    assert float(ste.loss([3.0], [0.0, 0.0], [1.0], [1.0, 0.0])) == 0.25
    assert ste.gradient_v([3.0], [0.0, 0.0], [1.0], [1.0, 0.0]).tolist() == [0.0]


@given(st.floats(0.3, math.pi - 0.3), st.floats(0.3, 3.0), st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_gradients_are_finite_differences_of_f(theta: float, norm: float, seed: int) -> None:
    v, w, v_star, w_star = at = point(theta, norm, seed)
    for k, slope in ((0, ste.gradient_v(*at)), (1, ste.gradient_w(*at))):
        for i in range(len(at[k])):
            ends = []
            for sign in (1, -1):
                moved = [v.clone(), w.clone(), v_star, w_star]
                moved[k][i] += sign * 1e-6
                ends.append(float(ste.loss(*moved)))
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(slope[i]), abs=1e-7)


@every_estimator
@given(st.floats(0, math.pi), st.floats(0.05, 5.0), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_inner_product_identities(estimator: str, theta: float, norm: float, seed: int) -> None:
    at = point(theta, norm, seed)
    direct = ste.coarse_gradient(estimator, *at) @ ste.gradient_w(*at)
    found = ste.inner_product(estimator, *at)
    assert float(direct) == pytest.approx(float(found), abs=1e-10)
    assert float(found) >= 0


@pytest.mark.parametrize("theta", [0.6, 1.5, 2.5])
def test_monte_carlo_agrees_with_every_closed_form(theta: float) -> None:
    v, w, v_star, w_star = at = point(theta, 0.6, 3)
    found = ste_sampling.monte_carlo(
        *at, samples=60_000, generator=torch.Generator().manual_seed(0)
    )
    closed = {
        "loss": ste.loss(*at),
        "gradient_v": ste.gradient_v(*at),
        "gradient_w": ste.gradient_w(*at),
        **{e: ste.coarse_gradient(e, v, w, v_star, w_star) for e in ste.ESTIMATORS},
    }
    assert set(found) == set(closed)
    for name, value in closed.items():
        assert float((found[name] - value).norm()) < 0.05 * float(value.norm()), name


@every_estimator
def test_sample_coarse_gradient_is_autograd_through_the_surrogate(estimator: str) -> None:
    v, w, v_star, w_star = at = point(1.0, 0.7, 1)
    g = torch.Generator().manual_seed(2)
    z = torch.randn(6, 4, 5, dtype=torch.float64, generator=g)
    surrogate = {
        "identity": lambda x: x,
        "relu": torch.relu,
        "clipped": lambda x: x.clamp(0, 1),
    }[estimator]
    for k in range(6):
        leaf = w.clone().requires_grad_()
        before = z[k] @ leaf
        residual = float(v @ (before > 0).double() - v_star @ (z[k] @ w_star > 0).double())
        (slope,) = torch.autograd.grad((v @ surrogate(before)) * residual, leaf)
        found = ste_sampling.sample_coarse_gradient(estimator, *at, z)[k]
        torch.testing.assert_close(found, slope, rtol=1e-12, atol=1e-12)
    y = (z @ w > 0).double() @ v - (z @ w_star > 0).double() @ v_star
    torch.testing.assert_close(ste_sampling.sample_loss(*at, z), y.square() / 2)
    leaf = v.clone().requires_grad_()
    ste_loss = ((z @ w > 0).double() @ leaf - (z @ w_star > 0).double() @ v_star).square() / 2
    (slope,) = torch.autograd.grad(ste_loss.sum(), leaf)
    torch.testing.assert_close(ste_sampling.sample_gradient_v(*at, z).sum(0), slope)


@every_estimator
@pytest.mark.parametrize("theta", [0.0, math.pi])
def test_no_zero_over_zero_at_the_ends(estimator: str, theta: float) -> None:
    w_star = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    at = ([0.4, 0.1, -1.0, 2.0], math.cos(theta) * 0.5 * w_star, V_STAR, w_star)
    assert ste.gradient_w(*at).tolist() == [0, 0, 0]
    assert float(ste.inner_product(estimator, *at)) == 0
    nearby = (at[0], at[1] + torch.tensor([1e-7, 0, 0]), *at[2:])
    found = ste.coarse_gradient(estimator, *at)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, ste.coarse_gradient(estimator, *nearby), rtol=0, atol=1e-6)


@every_estimator
def test_at_w_zero_the_coarse_gradient_is_that_of_silent_units(estimator: str) -> None:
    w_star = torch.tensor([0.6, 0.8], dtype=torch.float64)
    at = (V_STAR, torch.zeros(2, dtype=torch.float64), V_STAR, w_star)
    z = torch.randn(100_000, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampled = ste_sampling.sample_coarse_gradient(estimator, *at, z).mean(0)
    assert float((sampled - ste.coarse_gradient(estimator, *at)).norm()) < 0.03


def test_spurious_minimum() -> None:
    v = ste.spurious_minimum(V_STAR)
    eye, ones = torch.eye(4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float64)
    torch.testing.assert_close(v, torch.linalg.solve(eye + ones, (ones - eye) @ V_STAR))
    w_star = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    at = (v, -0.7 * w_star, V_STAR, w_star)
    assert float(ste.gradient_v(*at).norm()) < 1e-14
    for estimator in ("relu", "clipped"):
        assert float(ste.coarse_gradient(estimator, *at).norm()) < 1e-14
    left = float(ste.coarse_gradient("identity", *at).norm())
    assert left == pytest.approx(float(ste.identity_norm(V_STAR)), rel=1e-12)
    assert left > 0.09
    g = torch.Generator().manual_seed(0)
    low = float(ste.loss(*at))
    for _ in range(50):  # a minimum: every direction leads up
        dv = 1e-3 * torch.randn(4, dtype=torch.float64, generator=g)
        dw = 1e-3 * torch.randn(3, dtype=torch.float64, generator=g)
        assert float(ste.loss(v + dv, at[1] + dw, V_STAR, w_star)) > low


def test_saddle_has_no_gradient() -> None:
    v, theta = ste.saddle(V_STAR)
    w = torch.tensor([float(theta.cos()), float(theta.sin())], dtype=torch.float64)
    at = (v, w, V_STAR, [1.0, 0.0])
    assert float(ste.gradient_v(*at).norm()) < 1e-14
    assert float(ste.gradient_w(*at).norm()) < 1e-14
    assert 0 < float(theta) < math.pi


def test_descent_near_the_spurious_minimum() -> None:
    v = ste.spurious_minimum(V_STAR)
    w_star = torch.tensor([1.0, 0.0], dtype=torch.float64)
    w = torch.tensor([-0.2, 0.01], dtype=torch.float64)
    rises = {}
    for estimator in ste.ESTIMATORS:
        f, _, _ = ste.descend(estimator, v, w, V_STAR, w_star, rate=0.02, steps=150)
        assert f.shape == (151,)
        rises[estimator] = float(f.diff().max())
    assert rises["identity"] > 0.1
    assert max(rises["relu"], rises["clipped"]) <= 1e-6


def test_descent_reaches_the_global_minimum() -> None:
    f, v, w = ste.descend("relu", V_STAR, [0.6, 0.8], V_STAR, [1.0, 0.0], rate=0.3, steps=200)
    assert float(f[-1]) < 1e-3 < 0.05 < float(f[0])
    assert float(ste.angle(w, [1.0, 0.0])) < 0.01
    torch.testing.assert_close(v, V_STAR, rtol=0, atol=0.01)


def test_bad_input_is_named() -> None:
    with pytest.raises(ArgumentError, match="w_star has norm 2"):
        ste.loss([1.0], [1.0, 0.0], [1.0], [2.0, 0.0])
    with pytest.raises(ArgumentError, match="vectors of one length"):
        ste.loss([1.0, 2.0], [1.0, 0.0], [1.0], [1.0, 0.0])
    with pytest.raises(ArgumentError, match="'sign' is not one of identity"):
        ste.coarse_gradient("sign", [1.0], [1.0, 0.0], [1.0], [1.0, 0.0])
    with pytest.raises(ArgumentError, match="no spurious"):
        ste.spurious_minimum([1.0, 1.0, 1.0])
    with pytest.raises(ArgumentError, match=r"\(samples, 1, 2\)"):
        ste_sampling.sample_loss([1.0], [1.0, 0.0], [1.0], [1.0, 0.0], torch.zeros(3, 2, 2))
    with pytest.raises(ArgumentError, match="w is zero"):
        ste.angle([0.0, 0.0], [1.0, 0.0])
    with pytest.raises(ArgumentError, match=r"theta=3\.5"):
        ste.p_q(3.5, 1.0)
    with pytest.raises(ArgumentError, match="rate=0"):
        ste.descend("relu", [1.0], [1.0], [1.0], [1.0], rate=0.0, steps=1)
