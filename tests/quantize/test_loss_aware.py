import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from classifier import net, step
from gossamer.core import names, optimizers
from gossamer.core.errors import ArgumentError
from gossamer.pack import Archive, pack
from gossamer.quantize import LossAware
from gossamer.quantize.loss_aware import (
    PROJECTIONS,
    binary,
    linear,
    logarithmic,
    objective,
    ternary,
)


def pair(n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, generator=g, dtype=torch.float64)
    return w, torch.rand(n, generator=g, dtype=torch.float64).square() + 1e-4


def least(w: Tensor, d: Tensor, levels: list[float]) -> float:
    """The smallest objective over all codes, each with its best scale >= 0."""
    codes = torch.tensor(list(itertools.product(levels, repeat=len(w))), dtype=w.dtype)
    above, below = codes @ (d * w), codes.square() @ d
    gain = torch.where((below > 0) & (above > 0), above.square() / below, 0)
    return float((d * w.square()).sum() - gain.max())


@pytest.mark.parametrize("n", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("seed", range(2))
def test_exact_ternary_is_what_brute_force_finds(n: int, seed: int) -> None:
    w, d = pair(n, seed)
    assert objective(w, d, ternary(w, d, scales=1)) == pytest.approx(
        least(w, d, [-1, 0, 1]), rel=1e-9, abs=1e-12
    )
    up, down = w > 0, w < 0
    want = sum(least(w[side], d[side], [-1, 0, 1]) for side in (up, down) if side.any())
    assert objective(w, d, ternary(w, d, scales=2)) == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert objective(w, d, binary(w, d)) == pytest.approx(least(w, d, [-1, 1]), rel=1e-9)


def test_by_hand() -> None:
    w, d = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 3.0, 1.0])
    # sums d|w|: 2, 5, 5.5; sums d: 1, 4, 5; gains 4, 6.25, 6.05
    assert ternary(w, d, scales=1).tolist() == [1.25, -1.25, 0.0]
    assert binary(w, d).tolist() == pytest.approx([1.1, -1.1, 1.1])
    # 2 | .5 against d: gains 4 and (2.5)^2 / 2; the negative side alone is exact
    assert ternary(w, d, scales=2).tolist() == [2.0, -1.0, 0.0]


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 5), st.integers(0, 10_000), st.booleans())
def test_the_alternation_never_raises_the_objective(bits: int, seed: int, log: bool) -> None:
    w, d = pair(40, seed)
    rule = logarithmic if log else linear
    losses = [objective(w, d, rule(w, d, bits=bits, iterations=i, tolerance=0)) for i in range(12)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0] or losses[1] == losses[0]


@pytest.mark.parametrize("bits", [2, 3])
def test_the_alternation_is_near_the_best_and_never_below(bits: int) -> None:
    n = 2 ** (bits - 1) - 1
    levels = [k / n for k in range(-n, n + 1)]
    for seed in range(6):
        w, d = pair(5, seed)
        best = least(w, d, levels)
        found = objective(w, d, linear(w, d, bits=bits))
        assert best - 1e-12 <= found <= best + 0.1 * float((d * w.square()).sum())


def test_the_authors_scale_is_the_same_for_ternary_codes_only() -> None:
    w, d = pair(50, 1)
    assert torch.equal(linear(w, d, bits=2), linear(w, d, bits=2, scale="authors"))
    ours, theirs = linear(w, d, bits=3), linear(w, d, bits=3, scale="authors")
    assert objective(w, d, ours) < objective(w, d, theirs)


def test_levels() -> None:
    w, d = pair(400, 2)
    for bits in (2, 3, 4, 8):
        q = linear(w, d, bits=bits)
        n = 2 ** (bits - 1) - 1
        k = q / q.abs().max() * n
        # the outermost level may be unused: then the grid is coarser, and still a grid
        assert q.unique().numel() <= 2 * n + 1
        if bits < 8:
            torch.testing.assert_close(k, k.round())
    for bits in (2, 3, 4):
        q = logarithmic(w, d, bits=bits)
        size = q[q != 0].abs()
        k = torch.log2(size / size.max())
        torch.testing.assert_close(k, k.round())
        assert q.unique().numel() <= 2**bits - 1
    assert not torch.signbit(linear(w, d, bits=3)[linear(w, d, bits=3) == 0]).any()
    assert not torch.signbit(logarithmic(w, d, bits=3)[logarithmic(w, d, bits=3) == 0]).any()


def test_two_scales_by_alternation() -> None:
    w, d = pair(60, 3)
    q = linear(w, d, bits=2, scales=2)
    assert q.unique().numel() == 3
    assert objective(w, d, q) <= objective(w, d, linear(w, d, bits=2)) + 1e-9
    assert ((q == 0) | (q.sign() == w.sign())).all()


# with 8 bits the alternation only finds a near optimum among many
@pytest.mark.parametrize("name", [name for name in PROJECTIONS if name != "laq-8"])
def test_curvature_decides(name: str) -> None:
    """Weights that matter are met better than the same weights without importance."""
    rule = PROJECTIONS[name]
    w = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = torch.ones_like(w)
    d[:20] = 1e4
    important, even = rule(w, d), rule(w, torch.ones_like(w))
    assert objective(w, d, important) <= objective(w, d, even)
    assert rule(torch.zeros(3), torch.ones(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, d: binary(w, d[:2]), "d has shape"),
        (lambda w, d: binary(w / 0, d), "the weight holds NaN"),
        (lambda w, d: binary(w, d * float("nan")), "d holds NaN"),
        (lambda w, d: binary(w, d * 0), "d must be positive"),
        (lambda w, d: ternary(w, d, scales=3), "scales=3"),
        (lambda w, d: linear(w, d, bits=1), "bits=1"),
        (lambda w, d: linear(w, d, bits=3, scales=0), "scales=0"),
        (lambda w, d: linear(w, d, bits=3, scale="theirs"), "scale='theirs'"),
        (lambda w, d: linear(w, d, bits=3, iterations=-1), "iterations=-1"),
        (lambda w, d: logarithmic(w, d, bits=6), "bits=6"),
    ],
)
def test_projections_refuse(call, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(torch.ones(4), torch.ones(4))


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
}


@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_reads_the_optimizers_second_moment_after_the_step(optim) -> None:
    model = net()
    optimizer = optim(model.parameters())
    LossAware("lab", beta=None, clip=None).attach(model, optimizer)
    latent = names.parameters(model)["2.weight"]
    torch.testing.assert_close(model[2].weight.detach().abs().unique()[0], latent.abs().mean())
    for i in range(3):
        step(model, optimizer, i)
        state = optimizer.state[latent]
        v = state["exp_avg_sq"] if "exp_avg_sq" in state else state["square_avg"]
        want = binary(latent.detach(), v.sqrt() + 1e-8)
        assert torch.equal(model[2].weight.detach(), want)
        assert torch.equal(optimizers.second_moment(optimizer, latent), v)


def test_own_average_with_sgd_equals_rmsprops() -> None:
    """beta = RMSprop's alpha, the same gradients: the same v, hence the same weights."""

    def run(optimizer_of, beta):
        model = net()
        optimizer = optimizer_of(model.parameters())
        method = LossAware("laq-3", beta=beta, clip=1.0).attach(model, optimizer)
        for i in range(4):
            step(model, optimizer, i)
        return model, method

    def rmsprop(p):
        return torch.optim.RMSprop(p, 0.01, alpha=0.9)

    (a, _), (b, method) = run(rmsprop, None), run(rmsprop, 0.9)
    torch.testing.assert_close(a[2].weight, b[2].weight)
    assert set(method.state_dict()["moments"]) == {"2.weight"}
    model, _ = run(lambda p: torch.optim.SGD(p, 0.1), 0.9)
    assert model[2].weight.unique().numel() <= 7


@pytest.mark.parametrize(
    "optim", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adamax], ids=lambda o: o.__name__
)
def test_an_optimizer_without_second_moment_is_refused(optim) -> None:
    model = net()
    with pytest.raises(ArgumentError, match=f"{optim.__name__} keeps none; .* give beta="):
        LossAware("lab", beta=None, clip=None).attach(model, optim(model.parameters(), 0.1))
    with pytest.raises(ArgumentError, match="attach\\(model, optimizer\\)"):
        LossAware("lab", beta=None, clip=None).attach(model)
    assert isinstance(model[2].weight, nn.Parameter)
    LossAware("lab", beta=0.9, clip=None).attach(model, optim(model.parameters(), 0.1))


def test_a_state_without_squares_is_named() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], 0.1, momentum=0.9)
    p.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(ArgumentError, match="keeps no exp_avg_sq and no square_avg"):
        optimizers.second_moment(optimizer, p)


@pytest.mark.parametrize("where", ["moment", "gradient"])
def test_nan_is_refused_with_nothing_changed(where: str) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    method = LossAware("lat", beta=None, clip=None).attach(model, optimizer)
    step(model, optimizer)
    latent = names.parameters(model)["2.weight"]
    F.cross_entropy(model(torch.randn(4, 12)), torch.arange(4)).backward()
    if where == "moment":
        optimizer.state[latent]["exp_avg_sq"][0, 0] = float("nan")
    else:
        assert latent.grad is not None
        latent.grad[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=rf"{where} of 2\.weight holds NaN"):
        optimizer.step()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    method.finish()
    assert torch.equal(model[2].weight.detach(), before["2.parametrizations.weight.0.value"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": "lax"}, "'lax' is not one of lab"),
        ({"beta": 1.0}, r"beta=1\.0"),
        ({"clip": -1.0}, r"clip=-1\.0"),
    ],
)
def test_arguments_are_checked(options, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        LossAware(**{"projection": "lab", "beta": None, "clip": None, **options})


def test_an_own_projection_must_fit() -> None:
    with pytest.raises(ArgumentError, match=r"is torch\.float32 of shape"):
        LossAware(lambda w, d: w[:1], beta=0.9, clip=None).attach(net())


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("lab", 1),
        ("lat", 1.6),
        ("lat2", 1.6),
        ("laq-3", 3),
        ("laq-4", 4),
        ("laq-8", 8),
        ("laq-3, logarithmic", 3),
    ],
)
def test_packs_to_its_true_size(name: str, bits: float, tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(300, 200, bias=False)
    LossAware(name, beta=0.9, clip=None, ends=True).attach(model).finish()
    pack(model, tmp_path / "n.gsm")
    with Archive(tmp_path / "n.gsm") as archive:
        (row,) = archive.rows()
    assert row["bytes"] <= bits * 60_000 / 8 + 64


def test_the_own_average_of_squares_by_hand() -> None:
    seen: list[Tensor] = []

    def rule(weight: Tensor, d: Tensor) -> Tensor:
        seen.append(d.clone())
        return weight.sign()

    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    LossAware(rule, beta=0.75, clip=None, ends=True).attach(model, optimizer)
    latent = model.parametrizations.weight.original0  # type: ignore[union-attr,index]
    for value in (2.0, 4.0):
        latent.grad = torch.full_like(latent, value)
        optimizer.step()
    # v = .25 * 4 = 1, then .75 * 1 + .25 * 16 = 4.75
    ratio = (seen[-1] / seen[-2]).square()
    assert torch.allclose(ratio, torch.full_like(ratio, 4.75), rtol=1e-3)


def test_bits_at_their_edges_and_what_the_names_mean() -> None:
    w, d = pair(64, 0)
    for bits in (1, 9):
        with pytest.raises(ArgumentError, match=f"bits={bits} is outside 2 to 8"):
            linear(w, d, bits=bits)
    assert len(linear(w, d, bits=8).unique()) > 32
    assert torch.equal(PROJECTIONS["lat"](w, d), ternary(w, d, scales=1))
    assert torch.equal(PROJECTIONS["lat2"](w, d), ternary(w, d, scales=2))
    assert len(PROJECTIONS["lat"](w, d).abs().unique()) == 2
    assert len(PROJECTIONS["lat2"](w, d).abs().unique()) == 3
    for name, rule, options in (
        ("lat, approximate", linear, {"bits": 2}),
        ("lat2, approximate", linear, {"bits": 2, "scales": 2}),
        ("laq-4", linear, {"bits": 4}),
        ("laq-3, logarithmic", logarithmic, {"bits": 3}),
        ("laq-4, logarithmic", logarithmic, {"bits": 4}),
    ):
        assert torch.equal(PROJECTIONS[name](w, d), rule(w, d, **options))


def test_levels_by_hand() -> None:
    # Mean 23 / 16: at 3 bits the outermost level begins at .75 * 3 of it, 3.234375.
    w, d = torch.tensor([8.0, *[1.0] * 15]), torch.ones(16)
    start = {"bits": 3, "iterations": 0}
    assert linear(w, d, **start).tolist() == [3.234375, *[3.234375 / 3] * 15]
    assert logarithmic(w, d, **start).tolist() == [3.234375, *[3.234375 / 4] * 15]
    # It begins at .984375, and the codes 1, .5, -.25 and 0 make it 1.
    w, d = torch.tensor([1.0, 0.5, -0.25, 0.0]), torch.ones(4)
    assert torch.equal(logarithmic(w, d, bits=3), w)


def test_the_authors_scale_by_hand() -> None:
    # A step of 1, codes 3, 1, -2: sum b w = 14 over sum b^2 = 14, or over 3 sum |b| = 18.
    w, d = torch.tensor([3.0, 1.0, -2.0]), torch.ones(3)
    assert torch.equal(linear(w, d, bits=3), w)
    found = linear(w, d, bits=3, iterations=1, scale="authors")
    assert found.tolist() == pytest.approx([21 / 9, 7 / 9, -21 / 9])


@pytest.mark.parametrize("beta", [None, 0.9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_have_a_curvature_too(dtype: torch.dtype, beta: float | None) -> None:
    # 1e-8 is 0 in float16, and so are squares of small gradients
    model = nn.Sequential(nn.Linear(2, 3, bias=False)).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, eps=1e-3)
    method = LossAware("laq-3", beta=beta, clip=None, ends=True).attach(model, optimizer)
    latent = next(iter(method._held.values())).parameter
    g = torch.tensor([[1e-4, 1e-1]] * 3)
    latent.grad = g.to(dtype)
    optimizer.step()
    moment = 0.1 * g.to(dtype).float().square()
    if beta is None:  # the optimizer's own is of the weight's dtype
        moment = optimizer.state[latent]["exp_avg_sq"].float()
    wanted = linear(latent.detach(), moment.sqrt() + 1e-8, bits=3)
    method.finish()
    assert torch.equal(model[0].weight, wanted)
    assert model[0].weight.dtype == dtype
