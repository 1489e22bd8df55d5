import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from classifier import batch, net, step
from gossamer import nets
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.method import Method
from gossamer.datasets import Dataset, Split
from gossamer.pack import Archive, load_into, pack
from gossamer.quantize.ttq import TTQ, SparsityWarning, codes, ternary
from gossamer.training import Progress, TrainConfig, train


def method(**options: object) -> TTQ:
    settled = {"threshold": 0.05, "start": "ones", "weight_decay": None, "every": 1, **options}
    return TTQ(**settled)  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=30),
    st.floats(0.01, 5),
    st.floats(0.01, 5),
    st.floats(0, 0.9),
)
def test_gradients_are_the_papers(w: list[float], wp: float, wn: float, t: float) -> None:
    latent = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    scales = torch.tensor([wp, wn], dtype=torch.float64, requires_grad=True)
    c = codes(latent, threshold=t, density=None)
    out = ternary(latent, scales, c)
    g = torch.linspace(-1, 2, len(w), dtype=torch.float64)
    out.backward(g)
    delta = t * max(abs(x) for x in w)
    positive, negative, value, slope = 0.0, 0.0, [], []
    for x, gi in zip(w, g.tolist(), strict=True):
        if x > delta:
            positive, value, slope = positive + gi, [*value, wp], [*slope, wp * gi]
        elif x < -delta:
            negative, value, slope = negative - gi, [*value, -wn], [*slope, wn * gi]
        else:
            value, slope = [*value, 0.0], [*slope, gi]
    assert latent.grad is not None
    assert scales.grad is not None
    assert out.tolist() == value
    assert latent.grad.tolist() == pytest.approx(slope, abs=1e-12)
    assert scales.grad.tolist() == pytest.approx([positive, negative], abs=1e-12)


def test_scale_gradients_agree_with_finite_differences_through_a_network() -> None:
    model = net().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ttq = method().attach(model, optimizer)
    x, y = batch()
    scales = names.parameters(model)["2.weight.scales"]
    F.cross_entropy(model(x.double()), y).backward()
    assert scales.grad is not None
    for i in range(2):
        losses = []
        for shift in (1e-6, -1e-6):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                names.parameters(moved)["2.weight.scales"][i] += shift
            losses.append(F.cross_entropy(moved(x.double()), y).item())
        assert float(scales.grad[i]) == pytest.approx((losses[0] - losses[1]) / 2e-6, abs=1e-7)
    assert ttq.scales() == {"2.weight": (1.0, 1.0)}


def test_fixed_density_counts_exactly() -> None:
    w = torch.tensor([0.3, -0.3, 0.3, 0.3, -0.1])
    assert codes(w, threshold=None, density=0.6).tolist() == [1, -1, 1, 0, 0]


def test_trains_the_scales_positive_and_logged() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 5.0, momentum=0.9, weight_decay=0.1)
    ttq = method(every=2).attach(model, optimizer)
    for i in range(20):
        step(model, optimizer, i)
        assert all(min(pair) > 0 for pair in ttq.scales().values())
    assert [row["step"] for row in ttq.trajectory] == list(range(0, 21, 2))
    assert ttq.trajectory[0]["positive"]["2.weight"] == 1.0
    assert ttq.trajectory[-1]["positive"]["2.weight"] == pytest.approx(ttq.scales()["2.weight"][0])
    assert ttq.trajectory[-1]["density"] == pytest.approx(ttq.densities())
    q = ttq.quantized()["2.weight"]
    wp, wn = ttq.scales()["2.weight"]
    assert q.codebook.tolist() == pytest.approx([0, -wn, wp])
    assert list(ttq.quantized()) == ["2.weight"]


def test_weight_decay_of_the_scales_is_an_argument() -> None:
    def after(decay: float | None) -> float:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
        ttq = method(weight_decay=decay).attach(model, optimizer)
        assert len(optimizer.param_groups) == (1 if decay in (None, 0.5) else 2)
        assert all(g["lr"] == 0.1 for g in optimizer.param_groups)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        found = ttq.scales()["2.weight"][0]
        ttq.finish()
        assert len(optimizer.param_groups) == 1
        return found

    assert after(None) == after(0.5) == pytest.approx(0.95)
    assert after(0.0) == 1.0


def test_the_scales_have_a_learning_rate_of_their_own() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.param_groups[0]["initial_lr"] = 0.2  # of a schedule under way
    ttq = method(lr_factor=0.01).attach(model, optimizer)
    first, apart = optimizer.param_groups
    assert (first["lr"], first["initial_lr"]) == (0.1, 0.2)
    assert (apart["lr"], apart["initial_lr"]) == pytest.approx((0.001, 0.002))
    assert apart["params"] == [names.parameters(model)["2.weight.scales"]]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert ttq.scales()["2.weight"] == pytest.approx((0.999, 0.999))
    ttq.finish()
    assert len(optimizer.param_groups) == 1


class Stopped(Exception):
    pass


def test_a_schedule_and_a_resume_keep_the_factor(tmp_path) -> None:
    x, y = torch.randn(64, 12, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4
    split = Split(x, y)
    data = Dataset("points", split, split, split, 4)
    config = TrainConfig(4, batch_size=16, lr=0.1, schedule="cosine")

    class Rates(Method):
        """The two groups' rates before each step."""

        def _setup(self) -> None:
            self.seen: list[tuple[float, float]] = []

        def before_step(self) -> None:
            assert self.optimizer is not None
            first, apart = (g["lr"] for g in self.optimizer.param_groups)
            self.seen.append((first, apart))

    def go(name: str, stop: int | None) -> tuple[TTQ, Rates]:
        def tell(progress: Progress) -> None:
            if stop is not None and progress.step >= stop:
                raise Stopped

        model, ttq, rates = net(), method(lr_factor=0.03), Rates()
        path = tmp_path / name
        train(model, data, config, methods=[ttq, rates], checkpoint=path,
              checkpoint_every=0.0, progress=tell)  # fmt: skip
        return ttq, rates

    whole, rates = go("whole", None)
    assert len(rates.seen) == 16
    assert all(apart == pytest.approx(0.03 * lr) for lr, apart in rates.seen)
    assert rates.seen[8][0] == pytest.approx(0.05)
    with pytest.raises(Stopped):
        go("other", 8)
    again, rest = go("other", None)
    assert 0 < len(rest.seen) < 16
    assert rest.seen == rates.seen[-len(rest.seen) :]
    assert again.scales() == whole.scales()


def test_a_new_optimizer_takes_the_scales_and_their_decay() -> None:
    model = net()
    ttq = method(weight_decay=0.0).attach(model, torch.optim.SGD(model.parameters(), 0.1))
    ttq.detach()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
    ttq.attach(model, optimizer)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len(set(held))
    (apart,) = optimizer.param_groups[1]["params"]
    assert apart is names.parameters(model)["2.weight.scales"]
    assert len(ttq.trajectory) == 1


def test_starts_where_it_is_told() -> None:
    model = net()
    w = model[2].weight.detach().clone()
    ttq = method(start="fit", threshold=0.5).attach(model)
    delta = 0.5 * w.abs().max()
    wp, wn = ttq.scales()["2.weight"]
    assert wp == pytest.approx(float(w[w > delta].mean()))
    assert wn == pytest.approx(-float(w[w < -delta].mean()))
    alone = nn.Linear(2, 2)
    with torch.no_grad():
        alone.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    one = method(start="fit", ends=True).attach(alone)
    assert one.scales()["weight"] == (2.5, 2.5)  # no negative weight: what the others stand for


def test_first_and_last_layer_stay_float_unless_named() -> None:
    def attached(**options: object) -> list[str]:
        model = net()
        return list(method(**options).attach(model).quantized())

    assert attached() == ["2.weight"]
    assert attached(ends=True) == ["0.weight", "2.weight", "4.weight"]
    assert attached(include=["0", "4"]) == ["0.weight", "4.weight"]
    assert attached(ends=True, exclude="0") == ["2.weight", "4.weight"]


def test_an_outlier_is_warned_of_with_the_sparsity() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = 100.0
    with pytest.warns(SparsityWarning, match=r"2\.weight: .* 100, is an outlier: .* 99\.8 % zeros"):
        method().attach(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, r"threshold=1\.0 is outside"),
        ({"threshold": None}, "give one of the two"),
        ({"density": 0.5}, "give one of the two"),
        ({"threshold": None, "density": 0.0}, r"density=0\.0 is outside"),
        ({"threshold": None, "density": 1.5}, r"density=1\.5 is outside"),
        ({"start": "zero"}, "start='zero' is not one of"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0"),
        ({"every": 0}, "every=0"),
        ({"lr_factor": 0.0}, r"lr_factor=0\.0"),
    ],
)
def test_arguments_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        method(**options)


def test_arguments_at_their_edges() -> None:
    assert method(threshold=None, density=1.0).density == 1.0
    assert method(threshold=None, density=0.5).density == 0.5
    assert method(threshold=0.0).threshold == 0.0
    assert method(weight_decay=0.0).weight_decay == 0.0
    with pytest.raises(ArgumentError, match="weight_decay=inf"):
        method(weight_decay=float("inf"))


def zeroed(model: nn.Sequential) -> None:
    nn.init.zeros_(model[2].weight)


def spoiled(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[2].weight[3, 3] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (zeroed, {}, "2.weight is all zeros"),
        (spoiled, {}, "2.weight holds NaN"),
        (lambda m: None, {"include": "conv*"}, "matches nothing"),
        (lambda m: None, {"exclude": "2"}, "no weight is left"),
    ],
)
def test_bad_models_are_refused_and_left(spoil, options, message) -> None:
    model = net()
    spoil(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=message):
        method(**options).attach(model, optimizer)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(
        torch.equal(
            after[n],
            v,
        )
        or v.isnan().any()
        for n, v in before.items()
    )
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ArgumentError, match="holds none of the weights"):
        method().attach(net(), optimizer)


def test_tied_and_recurrent_weights() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.LSTM(6, 5)})
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ttq = method(ends=True).attach(model, optimizer)
    x = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0))

    def out() -> Tensor:
        result: Tensor = model["c"](model["b"](model["a"](x)))[0]
        return result

    optimizer.zero_grad()
    out().square().sum().backward()
    optimizer.step()
    seen = out()
    assert model["a"].weight.unique().numel() == 3
    ttq.finish()
    assert torch.equal(out(), seen)
    assert model["a"].weight is model["b"].weight
    assert all(w.unique().numel() == 3 for w in names.weights(model).values())


def test_packs_to_its_true_size_and_computes_the_same(tmp_path) -> None:
    model = nets.build("lenet-300-100", seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    ttq = method(include=["ip1", "ip2"]).attach(model, optimizer)
    x = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(model(x), torch.arange(4)).backward()
    optimizer.step()
    seen = model(x)
    ttq.finish()
    pack(model, tmp_path / "n.gsm")
    with Archive(tmp_path / "n.gsm") as archive:
        rows = {row["name"]: row for row in archive.rows()}
    for name in ("ip1.weight", "ip2.weight"):
        size = names.parameters(model)[name].numel()
        assert 8 * rows[name]["bytes"] <= 1.6 * size + 8 * 64
    other = nets.build("lenet-300-100", seed=1)
    load_into(tmp_path / "n.gsm", other)
    assert torch.equal(other(x), seen)
