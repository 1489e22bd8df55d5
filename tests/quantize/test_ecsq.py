import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.codebook import Quantized
from gossamer.core.errors import ArgumentError
from gossamer.quantize.ecsq import ecsq, entropy, envelope
from gossamer.quantize.kmeans import share
from gossamer.quantize.scalar import find_step, grid_step, grid_values
from gossamer.quantize.uniform import uniform


def gaussian(n: int = 30_000) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0)) * 0.02


def laplace(n: int = 30_000) -> torch.Tensor:
    u = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    return (-0.02 * u.sign() * torch.log1p(-2 * u.abs())).float()


def mse(x: torch.Tensor, q: Quantized) -> float:
    return float((x.double() - q.dequantize().double()).square().mean())


def cost(x: torch.Tensor, q: Quantized, lam: float) -> float:
    return mse(x, q) + lam * entropy(q)


# uniform ----------------------------------------------------------------------------------------


def test_uniform_by_hand() -> None:
    x = torch.tensor([0.0, 0.24, 0.25, -0.25, 0.74, 0.75, -0.76, 2.0])
    q = uniform(x, step=0.5)
    assert q.dequantize().tolist() == [0, 0, 0.5, -0.5, 0.5, 1, -1, 2]
    assert q.codebook.tolist() == [0, -1, -0.5, 0.5, 1, 2]
    wide = uniform(x, step=0.5, dead_zone=1.5)
    assert wide.dequantize().tolist() == [0, 0, 0, 0, 0, 1, -1, 2]
    assert uniform(x, step=0.5, dead_zone=9).dequantize().tolist() == [0] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_uniform_is_exactly_on_its_grid(dtype: torch.dtype) -> None:
    x = gaussian(2000).to(dtype)
    q = uniform(x, step=0.0037)
    assert q.codebook.dtype == dtype
    rounding = torch.finfo(dtype).eps * float(x.abs().max())
    off = (x.double() - q.dequantize().double()).abs()
    assert float(off.max()) <= 0.0037 * 0.5 + rounding
    found = find_step(q.codebook)
    assert found is not None
    assert torch.equal(grid_values(*found, dtype), q.codebook)
    if dtype == torch.float32:
        k = torch.round(q.codebook / 0.0037)
        assert torch.equal(q.codebook, k * torch.tensor(0.0037))


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shift", [0.0, 0.05, -3.0])
def test_uniform_bits_bound_the_code_book(bits: int, shift: float) -> None:
    x = gaussian(2000) + shift
    assert len(uniform(x, bits=bits).codebook) <= 1 << bits


@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(1, 300))
@settings(max_examples=100)
def test_grid_step_bounds_the_levels(a: float, b: float, levels: int) -> None:
    low, high = min(a, b), max(a, b)
    if max(abs(low), abs(high)) < 1e-3:
        return
    step = grid_step(low, high, levels)
    assert round(max(high, 0) / step) - round(min(low, 0) / step) <= levels


def test_find_step() -> None:
    for ks in ([0, -3, 5, 700], [0, 2], [0, -9, -6, 4], [0, -127, -126, 1]):
        for step in (0.1, 1e-6, 3.7e4):
            book = grid_values(torch.tensor(ks), step, torch.float32)
            found = find_step(book)
            assert found is not None
            assert torch.equal(grid_values(*found, torch.float32), book)
    assert find_step(torch.tensor([0.0, 1.0, 2.5001, 3.3])) is None
    assert find_step(torch.tensor([0.0])) is None


def test_uniform_errors() -> None:
    x = gaussian(100)
    with pytest.raises(ArgumentError, match="give one"):
        uniform(x)
    with pytest.raises(ArgumentError, match="step=0"):
        uniform(x, step=0.0)
    with pytest.raises(ArgumentError, match="use a step of"):
        uniform(x, step=1e-9)
    with pytest.raises(ArgumentError, match="dead_zone"):
        uniform(x, step=1.0, dead_zone=-1)
    with pytest.raises(ArgumentError, match="1 NaN"):
        uniform(torch.tensor([float("nan")]), step=1.0)
    assert uniform(torch.zeros(0, 3), bits=4).codes.shape == (0, 3)


# envelope -------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=9, unique=True),
    st.data(),
)
@settings(max_examples=150)
def test_envelope_against_every_level(levels: list[float], data: st.DataObject) -> None:
    c = np.sort(np.array(levels))
    finite = st.floats(0, 9, width=32)
    penalty = np.array([data.draw(finite) for _ in c])
    penalty[1:] = np.where(penalty[1:] > 8, np.inf, penalty[1:])
    used, at = envelope(c, penalty)
    x = np.linspace(-7, 7, 301)
    got = used[np.searchsorted(at, x, side="right")]
    every = (x[:, None] - c) ** 2 + penalty
    np.testing.assert_allclose(every[np.arange(len(x)), got], every.min(1), rtol=1e-9, atol=1e-9)


# ecsq -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [gaussian, laplace])
@pytest.mark.parametrize("clusters", [4, 8, 32])
def test_rate_at_equal_error(source, clusters: int) -> None:
    """Entropy constrained <= uniform <= least squares, at the error of least squares."""
    x = source()
    least = share(x, clusters=clusters, init="optimal")
    error = mse(x, least)
    # uniform: the coarsest step whose error is no larger
    low, high = 1e-4, 0.5
    for _ in range(30):
        step = (low * high) ** 0.5
        low, high = (step, high) if mse(x, uniform(x, step=step)) <= error else (low, step)
    grid = uniform(x, step=low)
    low, high = error / 100, error * 100
    for _ in range(20):
        lam = (low * high) ** 0.5
        low, high = (lam, high) if mse(x, ecsq(x, lam)) <= error else (low, lam)
    constrained = ecsq(x, low)
    assert mse(x, constrained) <= error
    assert entropy(constrained) <= entropy(grid) + 0.01
    assert entropy(grid) <= entropy(least) + 0.01


@pytest.mark.parametrize("lam", [1e-6, 1e-4, 1e-3])
def test_cost_is_below_the_alternatives(lam: float) -> None:
    x = laplace()
    q = ecsq(x, lam)
    rivals = [uniform(x, step=s) for s in (0.002, 0.005, 0.01, 0.02, 0.04, 0.08)]
    rivals += [share(x, clusters=k, init="optimal") for k in (2, 4, 8, 16)]
    assert cost(x, q, lam) <= min(cost(x, r, lam) for r in rivals)
    on_grid = ecsq(x, lam, grid=0.005)
    assert cost(x, on_grid, lam) <= cost(x, uniform(x, step=0.005), lam)
    # no single weight can move to its advantage at the present rates
    counts = torch.bincount(q.codes.long(), minlength=len(q.codebook)).double()
    price = (x[:500, None] - q.codebook).double() ** 2 - lam * torch.log2(counts / len(x))
    chosen = price.gather(1, q.codes[:500, None].long())
    assert (chosen <= price.min(1, keepdim=True).values + lam * 0.02).all()


def test_price_of_a_bit_prunes() -> None:
    x = laplace()
    density = [float((ecsq(x, lam).codes != 0).float().mean()) for lam in (0, 1e-5, 1e-4, 1e-3)]
    assert density == sorted(density, reverse=True)
    assert density[-1] < 0.3 < density[0]
    assert ecsq(x, 1.0).codebook.tolist() == [0]
    assert mse(x, ecsq(x, 0.0, max_levels=64)) <= mse(x, uniform(x, bits=6)) * 1.01


@pytest.mark.parametrize("target", [0.5, 2.0, 4.0])
def test_target_bits(target: float) -> None:
    x = gaussian(10_000)
    got = entropy(ecsq(x, target_bits=target))
    assert target - 0.1 < got <= target + 0.01
    got = entropy(ecsq(x, target_bits=target, grid=0.001))
    assert target - 0.1 < got <= target + 0.01


def test_zeros_of_a_pruned_tensor() -> None:
    x = gaussian(10_000)
    x[:9000] = 0
    for zeros in ("free", "fixed"):
        q = ecsq(x, 1e-5, zeros=zeros)
        assert (q.codes[:9000] == 0).all()
    # where nine in ten are zero, zero is cheap: more of the rest join it
    free = int((ecsq(x, 1e-5, zeros="free").codes != 0).sum())
    fixed = int((ecsq(x, 1e-5, zeros="fixed").codes != 0).sum())
    assert free < fixed <= 1000


def test_grid_levels_are_exact() -> None:
    x = laplace(5000)
    q = ecsq(x, 1e-5, grid=0.003)
    k = torch.round(q.codebook / 0.003)
    assert torch.equal(q.codebook, k * torch.tensor(0.003))
    with pytest.raises(ArgumentError, match="max_levels is 8"):
        ecsq(x, 1e-5, grid=0.003, max_levels=8)


def test_importance_moves_the_error_to_where_it_does_not_matter() -> None:
    x = gaussian()
    h = torch.ones_like(x)
    h[::2] = 100.0
    lam = 2e-4
    q, flat = ecsq(x, lam, importance=h), ecsq(x, lam * 50)
    error = (x - q.dequantize()).square()
    assert error[::2].mean() < 0.2 * error[1::2].mean()

    def total(r: Quantized) -> float:
        return float((h * (x - r.dequantize()).square()).mean()) + lam * entropy(r)

    assert total(q) < total(flat)
    assert total(q) < total(ecsq(x, lam))
    same = ecsq(x, lam, importance=torch.ones_like(x))
    assert cost(x, same, lam) == pytest.approx(cost(x, ecsq(x, lam), lam), rel=1e-3)
    assert (ecsq(x, lam, importance=torch.zeros_like(x)).codes == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_and_shapes(dtype: torch.dtype) -> None:
    x = gaussian(1000).reshape(10, 100).to(dtype)
    q = ecsq(x, 1e-6)
    assert q.codebook.dtype == dtype
    assert q.codes.shape == x.shape
    assert (q.codebook[1:].diff() > 0).all()
    for shape in ((0,), (), (2, 0)):
        assert ecsq(torch.zeros(shape, dtype=dtype), 1e-6).codes.shape == shape
    assert ecsq(torch.tensor(3.0, dtype=dtype), 0.0).dequantize().item() == 3


def test_ecsq_errors() -> None:
    x = gaussian(100)
    for kwargs, message in (
        ({}, "give one"),
        ({"lam": -1.0}, "lam=-1"),
        ({"lam": 1.0, "grid": 0.0}, "grid=0"),
        ({"lam": 1.0, "zeros": "some"}, "free"),
        ({"lam": 1.0, "max_levels": 1}, "max_levels=1"),
        ({"lam": 1.0, "importance": torch.ones(3)}, "shape"),
        ({"lam": 1.0, "importance": -torch.ones(100)}, "at least 0"),
        ({"lam": 1.0, "iterations": 0}, "iterations=0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ecsq(x, **kwargs)
