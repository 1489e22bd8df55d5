"""Baselines: ternary and binary weight networks, DoReFa, learned steps, own projections."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from classifier import batch, net, step
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.pack import Archive, pack
from gossamer.quantize import LSQ, TTQ, Projected, binary, dorefa, lsq, projected, ttq, twn


def test_twn_by_hand_and_least_squares() -> None:
    w = torch.tensor([[1.0, -0.5], [0.25, -0.05]])
    # mean .45, Delta .315: 1 and -.5 stay
    assert twn.ternary(w).tolist() == [[0.75, -0.75], [0.0, 0.0]]
    w = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = twn.ternary(w)
    alpha = q.abs().max()
    for other in (0.99 * alpha, 1.01 * alpha):
        assert (w - q).square().sum() < (w - q.sign() * other).square().sum()


def test_binary_by_hand() -> None:
    w = torch.tensor([[0.5, -1.5], [0.0, -3.0]])
    assert binary.sign(w).tolist() == [[1, -1], [1, -1]]
    assert binary.scaled(w, per_filter=False).tolist() == [[1.25, -1.25], [1.25, -1.25]]
    assert binary.scaled(w, per_filter=True).tolist() == [[1.0, -1.0], [1.5, -1.5]]
    with pytest.raises(ArgumentError, match="two or more dimensions"):
        binary.scaled(torch.ones(3), per_filter=True)


def test_stochastic_binary_follows_its_probability() -> None:
    w = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0]).repeat(20_000, 1)
    q = binary.stochastic(w, generator=torch.Generator().manual_seed(0))
    assert set(q.unique().tolist()) == {-1.0, 1.0}
    mean = q.mean(0)
    assert (mean - w[0].clamp(-1, 1)).abs().max() < 4 / math.sqrt(20_000)
    assert mean[0] == -1
    assert mean[-1] == 1


@settings(deadline=None)
@given(st.integers(1, 8), st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=20))
def test_dorefa_levels_and_gradient(bits: int, values: list[float]) -> None:
    w = torch.tensor([*values, 0.7], dtype=torch.float64)
    q, slope = dorefa.quantize(w, bits=bits)
    if bits == 1:
        assert slope is None
        assert q.unique().numel() <= 2
        assert q[-1] == w.abs().mean()
        return
    n = 2**bits - 1
    largest = w.tanh().abs().max()
    exact = (w.tanh() / largest + 1) / 2 * n
    assert ((q + 1) / 2 * n - exact).abs().max() <= 0.5 + 1e-9
    assert torch.equal(((q + 1) / 2 * n).round(), ((q + 1) / 2 * n).round().clamp(0, n))
    latent = w.clone().requires_grad_()
    (latent.tanh() / largest).sum().backward()
    assert slope is not None
    assert latent.grad is not None
    torch.testing.assert_close(slope, latent.grad)


def test_dorefa_refuses() -> None:
    with pytest.raises(ArgumentError, match="bits=9"):
        dorefa.quantize(torch.ones(2), bits=9)
    with pytest.raises(ArgumentError, match="all zeros"):
        dorefa.quantize(torch.zeros(2), bits=2)
    with pytest.raises(ArgumentError, match="NaN"):
        dorefa.quantize(torch.tensor([float("nan")]), bits=2)


def test_lsq_gradients_by_hand() -> None:
    v = torch.tensor([0.6, -0.2, 9.0, -9.0], requires_grad=True)
    s = torch.tensor([0.5], requires_grad=True)
    c = lsq.codes(v, s, 3)
    assert c.tolist() == [1, 0, 3, -4]
    lsq.stepped(v, s, c, 3).backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert v.grad is not None
    assert s.grad is not None
    assert v.grad.tolist() == [1, 2, 0, 0]
    # (1 - 1.2) + 2 (0 + .4) + 3 * 3 - 4 * 4, over sqrt(4 weights * 3)
    assert float(s.grad) == pytest.approx((-0.2 + 0.8 + 9 - 16) / math.sqrt(12), rel=1e-6)


def test_lsq_starts_and_stays_on_its_grid() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    mean = model[2].weight.detach().abs().mean()
    method = LSQ(bits=3, weight_decay=0.0).attach(model, optimizer)
    assert method.steps()["2.weight"] == pytest.approx(float(2 * mean / 3**0.5))
    before = method.steps()["2.weight"]
    for i in range(10):
        step(model, optimizer, i)
    after = method.steps()["2.weight"]
    assert after > 0
    assert after != before
    levels = method.quantized()["2.weight"].codebook / after
    torch.testing.assert_close(levels, levels.round())
    assert levels.min() >= -4
    assert levels.max() <= 3
    assert names.parameters(model)["2.weight.step"].shape == (1,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSQ(bits=1, weight_decay=None), "bits=1"),
        (lambda: LSQ(bits=4, weight_decay=-1.0), "weight_decay"),
        (lambda: Projected("twm", clip=None), "'twm' is not one of twn"),
        (lambda: Projected("twn", clip=0.0), "clip=0.0"),
        (lambda: Projected("binaryconnect, stochastic", clip=1.0), "give generator="),
    ],
)
def test_arguments_are_checked(make, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (lambda w: w[:1], "is torch.float32 of shape"),
        (lambda w: w.double(), "is torch.float64"),
        (lambda w: w / 0, "gives NaN"),
    ],
)
def test_own_projections_are_checked_and_the_model_left(projection, message) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=message):
        Projected(projection, clip=None).attach(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_own_projection_trains_straight_through() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    method = Projected(lambda w: torch.round(w * 8) / 8, clip=0.3).attach(model, optimizer)
    latent = names.parameters(model)["2.weight"]
    start = latent.detach().clone()
    x, y = batch()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    grad = latent.grad
    assert grad is not None
    plain = net()  # the same network with the quantized values as plain weights
    with torch.no_grad():
        plain[2].weight.copy_(torch.round(start * 8) / 8)
    F.cross_entropy(plain(x), y).backward()
    torch.testing.assert_close(grad, plain[2].weight.grad)
    optimizer.step()
    torch.testing.assert_close(latent.detach(), (start - 0.5 * grad).clamp(-0.3, 0.3))
    assert torch.equal(model[2].weight, torch.round(latent * 8) / 8)
    with torch.no_grad():
        latent.fill_(0.25)
    method.refresh()
    assert (model[2].weight == 0.25).all()


def test_values_are_computed_once_a_step() -> None:
    model, calls = net(), []

    def counting(w: Tensor) -> Tensor:
        calls.append(1)
        return twn.ternary(w)

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Projected(counting, clip=None).attach(model, optimizer)
    for i in range(3):
        model(batch(i)[0])
        step(model, optimizer, i)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("name", "bits"),
    [("twn", 1.6), ("bwn", 1), ("binaryconnect", 1), *((f"dorefa-{k}", k) for k in (1, 2, 4, 8))],
)
def test_packs_to_its_true_size(name: str, bits: float, tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(300, 200, bias=False)
    nn.init.normal_(model.weight, std=0.1)
    assert name in projected.PROJECTIONS
    Projected(name, clip=None, ends=True).attach(model).finish()
    pack(model, tmp_path / "n.gsm")
    with Archive(tmp_path / "n.gsm") as archive:
        (row,) = archive.rows()
    # 64 bytes and 4 for each value of the code book
    assert row["bytes"] <= bits * 60_000 / 8 + 64 + 4 * 2**bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_learned_steps_pack_to_their_bits(bits: int, tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(300, 200, bias=False)
    LSQ(bits=bits, weight_decay=None, ends=True).attach(model).finish()
    pack(model, tmp_path / "n.gsm")
    with Archive(tmp_path / "n.gsm") as archive:
        (row,) = archive.rows()
    assert row["bytes"] <= bits * 60_000 / 8 + 64


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "make",
    [
        lambda: TTQ(threshold=0.05, start="fit", weight_decay=None, every=9),
        lambda: LSQ(bits=3, weight_decay=None),
        lambda: Projected("binaryconnect", clip=None),
        lambda: Projected(torch.sign, clip=1.0),
    ],
)
def test_a_latent_weight_that_is_no_number_is_named(make, bad: float) -> None:
    # codes of NaN are finite: the network would look whole, with a dead layer
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = make().attach(model, optimizer)
    for held in method._held.values():
        held.parameter.grad = torch.full_like(held.parameter, bad)
    clamped = method.clip is not None and not math.isnan(bad)
    if clamped:  # the clip makes infinite ones finite again
        optimizer.step()
        assert names.weights(model)["2.weight"].isfinite().all()
        return
    with pytest.raises(ArgumentError, match=r"the latent weight of 2\.weight holds NaN"):
        optimizer.step()


def test_the_functions_refuse_what_is_no_number() -> None:
    w, g = torch.tensor([1.0, float("nan")]), torch.Generator().manual_seed(0)
    for call in (
        lambda: ttq.codes(w, threshold=0.05, density=None),
        lambda: lsq.codes(w, torch.ones(1), 2),
        lambda: binary.sign(w),
        lambda: binary.stochastic(w, generator=g),
    ):
        with pytest.raises(ArgumentError, match="NaN"):
            call()
