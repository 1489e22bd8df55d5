import itertools

import kmeans1d
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import ArgumentError
from gossamer.quantize import kmeans, scalar
from gossamer.quantize.kmeans import INITS, rate, share, share_model

NATIVE = scalar.native() is not None
both = pytest.mark.parametrize("native", [True, False] if NATIVE else [False])


@pytest.fixture
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setenv("GOSSAMER_NATIVE", "0")
    return request.param


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cost(x: torch.Tensor, q: scalar.Quantized) -> float:
    return float(((x.double() - q.dequantize().double()) ** 2).sum())


def oracle(x: torch.Tensor, k: int) -> float:
    """Least possible sum of squares, by another library."""
    values = x[x != 0].double().numpy()
    centroids = np.array(kmeans1d.cluster(values, k).centroids)
    return float(((values[:, None] - centroids) ** 2).min(1).sum())


@pytest.mark.parametrize("native", [True, False] if NATIVE else [False], indirect=True)
@pytest.mark.parametrize("k", [1, 2, 7, 31])
def test_optimal_is_optimal(native: bool, k: int) -> None:
    for x in (torch.randn(700, generator=gen(k)), torch.rand(700, generator=gen(k)) ** 4):
        assert cost(x, share(x, clusters=k, init="optimal")) <= oracle(x, k) * 1.0001


@pytest.mark.parametrize("native", [True, False] if NATIVE else [False], indirect=True)
def test_optimal_over_a_histogram(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Many values: no longer one point for each distinct value.
    monkeypatch.setattr(scalar, "_BINS", 1 << 10)
    monkeypatch.setattr(scalar, "_SORTED", 1 << 10)
    x = torch.randn(20_000, generator=gen())
    x[3] = 0
    assert cost(x, share(x, clusters=15, init="optimal")) <= oracle(x, 15) * 1.0001


def test_outlier_does_not_spoil_the_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalar, "_SORTED", 1 << 10)
    monkeypatch.setattr(scalar, "_BINS", 1 << 12)
    x = torch.randn(20_000, generator=gen())
    x[0] = 1e6
    assert cost(x, share(x, clusters=16, init="optimal")) <= oracle(x, 16) * 1.01


@given(
    st.lists(st.integers(-9, 9).map(float), min_size=1, max_size=8),
    st.integers(1, 5),
)
@settings(max_examples=60)
def test_optimal_against_every_partition(values: list[float], k: int) -> None:
    x = torch.tensor(values)
    kept = sorted(v for v in values if v)
    best = 0.0
    if kept:
        k = min(k, len(kept))
        best = min(
            sum(np.var(part) * len(part) for part in np.split(kept, list(cuts)))
            for cuts in itertools.combinations(range(1, len(kept)), k - 1)
        )
    assert cost(x, share(x, clusters=k, init="optimal")) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_invariants(init: str, dtype: torch.dtype) -> None:
    x = torch.randn(9, 40, generator=gen()).to(dtype)
    x[:, ::3] = 0
    q = share(x, bits=3, init=init, generator=gen(1))
    assert q.codebook.dtype == dtype
    assert len(q.codebook) <= 8
    assert q.codes.shape == x.shape
    assert q.codes.dtype == torch.uint8
    assert (q.codes[x == 0] == 0).all()
    if init != "uniform":  # the grid rounds small weights to zero
        assert (q.codes[x != 0] != 0).all()
    assert (q.codebook[1:].diff() > 0).all()
    assert set(q.codes.unique().tolist()) == set(range(len(q.codebook)))
    if dtype in (torch.float32, torch.float64):
        book = q.codebook if init == "uniform" else q.codebook[1:]
        nearest = (x[x != 0][:, None] - book).abs().min(1).values
        torch.testing.assert_close((x - q.dequantize())[x != 0].abs(), nearest)


def test_lloyd_reaches_a_fixed_point_by_hand() -> None:
    # linear start 0, 5, 10 over [0.5, 10.5]; clusters {.5, 1.5}, {6}, {10, 10.5}
    x = torch.tensor([0.5, 1.5, 6.0, 10.0, 10.5])
    q = share(x, clusters=3)
    assert q.codebook.tolist() == [0, 1.0, 6.0, 10.25]
    assert q.codes.tolist() == [1, 1, 2, 3, 3]
    none = share(x, clusters=3, iterations=0)
    assert none.codebook.tolist() == [0, 0.5, 5.5, 10.5]


def test_starting_points() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 100.0])
    assert share(x, clusters=2, init="density", iterations=0).codebook.tolist() == [0, 2, 5]
    drawn = share(x, clusters=4, init="forgy", iterations=0, generator=gen()).codebook
    assert set(drawn.tolist()) <= {0.0, *x.tolist()}
    again = share(x, clusters=4, init="forgy", iterations=0, generator=gen()).codebook
    assert torch.equal(drawn, again)


def test_empty_clusters_leave_the_code_book() -> None:
    # linear start over [0, 100]: nothing lies near the middle levels
    x = torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 100.0])
    q = share(x, clusters=5)
    assert len(q.codebook) == 3
    assert sorted(q.codes.unique().tolist()) == [1, 2]


def test_more_clusters_than_values_is_lossless() -> None:
    x = torch.tensor([[3.0, 0.0], [-1.0, 3.0]])
    for init in INITS:
        q = share(x, bits=8, init=init, generator=gen())
        assert q.codebook.tolist() == [0, -1, 3]
        assert torch.equal(q.dequantize(), x)
    x = torch.randn(300, generator=gen())
    q = share(x, clusters=300)
    assert q.codes.dtype == torch.int32
    assert torch.equal(q.dequantize(), x)


@pytest.mark.parametrize("native", [True, False] if NATIVE else [False], indirect=True)
@pytest.mark.parametrize("shape", [(0,), (), (3, 0), (4, 5)])
def test_empty_scalar_and_zero_tensors(native: bool, shape: tuple[int, ...]) -> None:
    q = share(torch.zeros(shape), bits=4)
    assert q.codebook.tolist() == [0]
    assert q.codes.shape == shape
    assert share(torch.tensor(2.5), bits=1).dequantize().item() == 2.5


@pytest.mark.parametrize("native", [True, False] if NATIVE else [False], indirect=True)
def test_bad_values_are_counted(native: bool) -> None:
    x = torch.ones(10)
    x[2], x[5], x[6] = float("nan"), float("inf"), -float("inf")
    with pytest.raises(ArgumentError, match="conv1 holds 3 NaN or infinite values of 10"):
        share(x, bits=2, name="conv1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of the two"),
        ({"bits": 2, "clusters": 3}, "give one of the two"),
        ({"bits": 0}, "bits=0"),
        ({"clusters": 70000}, "65535"),
        ({"clusters": 5000, "init": "optimal"}, "density"),
        ({"bits": 2, "init": "kmeans++"}, "linear, density"),
        ({"bits": 2, "init": "forgy"}, "generator"),
        ({"bits": 2, "iterations": -1}, "iterations=-1"),
        ({"bits": 2, "threads": 0}, "threads=0"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        share(torch.randn(9, generator=gen()), **settings)
    with pytest.raises(ArgumentError, match="floating-point"):
        share(torch.arange(3), bits=2)


@pytest.mark.skipif(not NATIVE, reason="kernel not built")
def test_kernel_agrees_with_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        x = rng.standard_normal(5000).astype(dtype)
        x[rng.random(5000) < 0.3] = 0
        for k in (1, 2, 3, 4, 16, 17, 18, 40, 400):
            t = np.sort(rng.standard_normal(k - 1)).astype(dtype)
            if k > 2:
                t[1] = t[0]  # an interval that nothing falls into
                t[-1] = 1e6  # one cell of the lookup table holds nearly all thresholds
            x[:20] = np.resize(t, 20) if k > 1 else 1  # ties
            labels = rng.permutation(k) + 1
            with monkeypatch.context() as m:
                m.setenv("GOSSAMER_NATIVE", "0")
                slow = scalar.assign(x, t, labels, 1)
            for level in ("scalar", "avx2"):
                monkeypatch.setenv("GOSSAMER_ISA", level)
                fast = scalar.assign(x, t, labels, 2)
                for a, b in zip(fast, slow, strict=True):
                    assert a.dtype == b.dtype
                    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not NATIVE, reason="kernel not built")
def test_kernel_refuses_what_would_overrun() -> None:
    kernel = scalar.native()
    x, two = np.ones(4, np.float32), np.zeros(2, np.float32)
    labels = np.arange(3, dtype=np.int32)
    with pytest.raises(ValueError, match="another length"):
        kernel.assign(x, two, labels, np.zeros(3, np.uint8), None, None, 1)
    with pytest.raises(ValueError, match="one threshold less"):
        kernel.assign(x, two, labels[:2], np.zeros(4, np.uint8), None, None, 1)
    with pytest.raises(ValueError, match="one entry a label"):
        kernel.assign(x, two, labels, None, np.zeros(2, np.int64), np.zeros(2), 1)
    with pytest.raises(ValueError, match="ascending"):
        kernel.assign(x, np.array([2, 1], np.float32), labels, None, None, None, 1)
    with pytest.raises(ValueError, match="outside the code book"):
        kernel.group_sum(x, np.array([0, 1, 2, 3], np.uint8), np.zeros(3), 1)
    with pytest.raises(ValueError, match="outside the code book"):
        kernel.group_sum(x, np.array([0, 1, 2, -1], np.int32), np.zeros(3), 1)
    with pytest.raises(ValueError, match="clusters <= points"):
        kernel.partition(np.ones(3), np.arange(3.0), np.zeros(5, np.int64), 1)


def test_threads_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalar, "_SORTED", 1 << 10)
    x = torch.randn(600_000, generator=gen())
    a, b = (share(x, bits=5, init="optimal", threads=t) for t in (1, 3))
    assert torch.equal(a.codebook, b.codebook)
    assert torch.equal(a.codes, b.codes)


@pytest.mark.parametrize("native", [True, False] if NATIVE else [False], indirect=True)
def test_partition_of_weighted_points(native: bool) -> None:
    weight, position = np.array([1.0, 100, 1, 1]), np.array([0.0, 1, 2, 10])
    # the heavy point stays near its mean; 10 is alone
    assert kmeans.partition(weight, position, 2, 1).tolist() == [0, 3, 4]
    assert kmeans.partition(weight, position, 4, 1).tolist() == [0, 1, 2, 3, 4]


def test_uniform_init_is_a_grid() -> None:
    x = torch.randn(500, generator=gen())
    q = share(x, bits=4, init="uniform")
    assert len(q.codebook) <= 16
    step = scalar.grid_step(float(x.min()), float(x.max()), 15)
    k = torch.round(q.codebook / step)
    assert torch.equal(q.codebook, k * torch.tensor(step, dtype=torch.float32))


def test_share_model_takes_bits_by_pattern() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(40, 30))
    before = {n: p.clone() for n, p in net.named_parameters()}
    shared = share_model(net, bits={"*": 3, "0": 5})
    assert len(shared["1.weight"].codebook) == 8
    assert 8 < len(shared["0.weight"].codebook) <= 32
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert list(share_model(net, bits=2, exclude="0")) == ["1.weight"]


def test_rate_of_the_papers_figure() -> None:
    assert rate(16, 4) == pytest.approx(3.2)


def weighted(x: torch.Tensor, q: scalar.Quantized, h: torch.Tensor) -> float:
    return float((h.double() * (x.double() - q.dequantize().double()) ** 2).sum())


@pytest.mark.parametrize("native", [True, False] if NATIVE else [False], indirect=True)
def test_importance_finds_the_weighted_optimum(native: bool) -> None:
    x = torch.randn(12, generator=gen())
    h = torch.rand(12, generator=gen(1)) ** 3
    order = x.argsort()
    best = float("inf")
    for cuts in itertools.combinations(range(1, 12), 2):  # clusters are runs of sorted values
        total = 0.0
        for part in torch.tensor_split(order, cuts):
            mean = (h[part] * x[part]).double().sum() / h[part].double().sum()
            total += float((h[part].double() * (x[part].double() - mean) ** 2).sum())
        best = min(best, total)
    q = share(x, clusters=3, init="optimal", importance=h)
    assert weighted(x, q, h) == pytest.approx(best, rel=1e-4)
    assert weighted(x, share(x, clusters=3, init="linear", importance=h), h) >= best * 0.9999


@pytest.mark.parametrize("init", ["linear", "density", "optimal"])
def test_equal_importance_changes_nothing(init: str) -> None:
    x = torch.randn(500, generator=gen())
    plain = share(x, clusters=7, init=init)
    for h in (torch.full_like(x, 0.25), torch.full_like(x, 3.0)):
        same = share(x, clusters=7, init=init, importance=h)
        torch.testing.assert_close(same.dequantize(), plain.dequantize())


def test_importance_over_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5000, generator=gen())
    h = torch.rand(5000, generator=gen(1)) ** 4
    exact = weighted(x, share(x, clusters=15, init="optimal", importance=h), h)
    assert exact < weighted(x, share(x, clusters=15, init="optimal"), h)
    monkeypatch.setattr(scalar, "_BINS", 1 << 9)
    near = weighted(x, share(x, clusters=15, init="optimal", importance=h), h)
    assert exact <= near <= 1.001 * exact


def test_weights_without_importance_have_no_say() -> None:
    x = torch.tensor([0.0, 1.0, 1.2, 5.0, 9.0])
    h = torch.tensor([1.0, 1.0, 3.0, 1.0, 0.0])
    q = share(x, clusters=2, init="optimal", importance=h)
    assert q.dequantize().tolist() == pytest.approx([0, 1.15, 1.15, 5, 5])
    flat = share(x, clusters=2, init="optimal", importance=torch.zeros(5))
    torch.testing.assert_close(flat.dequantize(), share(x, clusters=2, init="optimal").dequantize())
    for bad, message in ((torch.ones(4), "shape"), (-h, "at least 0"), (h / 0, "finite")):
        with pytest.raises(ArgumentError, match=message):
            share(x, clusters=2, importance=bad)
