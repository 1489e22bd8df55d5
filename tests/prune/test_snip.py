import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import EmptyLayerWarning
from gossamer.datasets import Dataset, Split
from gossamer.experiments import Context
from gossamer.experiments.snip import snip as snip_experiments
from gossamer.experiments.sparse_momentum import specialization as specialization_experiment
from gossamer.prune import snip


class Recurrent(nn.Module):
    """An embedding, an LSTM and a linear layer; (N, T) tokens to (N, T, 7) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.rnn = nn.LSTM(5, 6, num_layers=2, dropout=0.5, batch_first=True)
        self.out = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(self.embedding(x))[0])


class Attending(nn.Module):
    """Self-attention over 3 positions of 4 features, pooled to 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x)[0].mean(1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


Case = tuple[nn.Module, list[tuple[Tensor, Tensor]]]


def case(name: str, sizes: tuple[int, ...] = (6,)) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = {
            "linear": lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
            "convolution": convolutional,
            "lstm": Recurrent,
            "attention": Attending,
        }[name]()
        shape = {"linear": (5,), "convolution": (1, 4, 4), "attention": (3, 4)}.get(name)
        if shape is None:
            batches = [(torch.randint(7, (n, 4)), torch.randint(7, (n, 4))) for n in sizes]
        else:
            batches = [(torch.randn(n, *shape), torch.randint(3, (n,))) for n in sizes]
    return model, batches


CASES = ["linear", "convolution", "lstm", "attention"]
every_case = pytest.mark.parametrize("name", CASES)


def through_a_mask(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """|dL/dc| of a mask c = 1 on each weight, divided by the sum: equations 4 and 5 as written."""
    model = copy.deepcopy(model).eval()
    weights = {n: w.detach() for n, w in names.weights(model).items()}
    c = {n: torch.ones_like(w, requires_grad=True) for n, w in weights.items()}
    outputs = functional_call(model, {n: c[n] * w for n, w in weights.items()}, (inputs,))
    loss = F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    found = torch.autograd.grad(loss, list(c.values()))
    whole = torch.stack([g.abs().sum() for g in found]).sum()
    return {n: g.abs() / whole for n, g in zip(c, found, strict=True)}


@every_case
def test_equals_autograd_through_a_mask_and_sums_to_one(name: str) -> None:
    model, batches = case(name)
    found = snip.scores(model, batches)
    expected = through_a_mask(model, *batches[0])
    assert list(found) == list(expected) == list(names.weights(model))
    largest = max(float(s.max()) for s in expected.values())
    for n, s in found.items():
        torch.testing.assert_close(s, expected[n], rtol=0, atol=1e-6 * largest)
    assert sum(float(s.double().sum()) for s in found.values()) == pytest.approx(1, abs=1e-6)


def test_by_hand() -> None:
    # y = w2 * w1 * x, L = y: dL/dw1 = w2 x, dL/dw2 = w1 x, so both scores are |w1 w2 x|;
    # the third weight reads an input of 0
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-2.0, 5.0]]))
        model[1].weight.fill_(3.0)
    batch = [(torch.tensor([[0.5, 0.0]]), torch.zeros(1))]
    found = snip.scores(model, batch, loss=lambda y, _: y.mean(), normalize=False)
    assert found["0.weight"].tolist() == [[3.0, 0.0]]
    assert found["1.weight"].tolist() == [[3.0]]
    found = snip.scores(model, batch, loss=lambda y, _: y.mean())
    assert found["0.weight"].tolist() == [[0.5, 0.0]]
    masks = snip.prune(model, batch, 1 / 3, floor=0, exclude="1", loss=lambda y, _: y.mean())
    assert masks["0.weight"].tolist() == [[True, False]]


@every_case
def test_several_batches_count_as_one(name: str) -> None:
    model, batches = case(name, (5, 2, 1))
    joined = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    one, several = snip.scores(model, joined), snip.scores(model, iter(batches))
    for n, s in one.items():
        torch.testing.assert_close(several[n], s, rtol=1e-4, atol=1e-7)


class Counting(nn.Module):
    """Counts its calls in a buffer, replaces another one and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.full((1,), math.nan))
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = x.detach().mean().view(1)
        return self.fc(x * torch.rand_like(x))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["convolution", "lstm", "counting"])
def test_the_model_ends_as_it_was(name: str, fails: bool) -> None:
    model, batches = (Counting(), case("linear")[1]) if name == "counting" else case(name)
    model.train()
    next(iter(model.children())).eval()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    objects = [id(t) for t in (*model.parameters(), *model.buffers())]
    random = torch.get_rng_state()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if fails:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    if fails:
        with pytest.raises(KeyboardInterrupt):
            snip.scores(model, batches, loss=loss)
    else:
        snip.scores(model, batches, loss=loss)
    for n, v in model.state_dict().items():
        torch.testing.assert_close(v, before[n], rtol=0, atol=0, equal_nan=True)
    assert modes == [m.training for m in model.modules()]
    assert objects == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in model.parameters() if p is not first)


def test_batches_count_by_the_targets_that_count() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(12, 4).double(), torch.randint(3, (12,))
    y[:7] = -100
    weights = names.weights(net)
    slopes = torch.autograd.grad(F.cross_entropy(net(x), y), list(weights.values()))
    wanted = {n: (w * s).abs() for (n, w), s in zip(weights.items(), slopes, strict=True)}
    # the first batch has no target that counts, the second one, the third four
    parts = [(x[a:b], y[a:b]) for a, b in ((0, 6), (6, 8), (8, 12))]
    found = snip.scores(net, parts, normalize=False)
    for name, score in found.items():
        torch.testing.assert_close(score, wanted[name].detach())
    with pytest.raises(ArgumentError, match="no target in it counts"):
        snip.scores(net, parts[:1])


def test_inputs_may_be_named() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    plain = snip.scores(net, [(x, y)])["0.weight"]
    assert torch.equal(snip.scores(net, [({"input": x}, y)])["0.weight"], plain)


def test_works_under_no_grad_and_in_half_precision() -> None:
    model, batches = case("linear")
    expected = snip.scores(model, batches)
    with torch.no_grad():
        found = snip.scores(model, batches)
    assert all(torch.equal(s, expected[n]) for n, s in found.items())
    # |w * g| near 1e-9 is zero in float16
    half = copy.deepcopy(model).half()
    small = snip.scores(
        half,
        [(batches[0][0].half(), batches[0][1])],
        loss=lambda y, t: F.cross_entropy(y.float(), t) * 1e-5,
        normalize=False,
    )
    assert all(s.dtype == torch.float32 for s in small.values())
    assert 0 < float(small["2.weight"].max()) < 1e-5
    double = snip.scores(copy.deepcopy(model).double(), [(batches[0][0].double(), batches[0][1])])
    assert all(s.dtype == torch.float64 for s in double.values())


def test_biases_stay_out_unless_named() -> None:
    model, batches = case("linear")
    assert list(snip.scores(model, batches)) == ["0.weight", "2.weight"]
    named = snip.scores(model, batches, include="*")
    assert list(named) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(snip.scores(model, batches, exclude="2")) == ["0.weight"]
    masks = snip.prune(model, batches, 0.5, include="*")
    assert masks.kept == round(0.5 * sum(p.numel() for p in model.parameters()))


@settings(deadline=None, max_examples=40)
@given(density=st.floats(0.02, 1.0), name=st.sampled_from(CASES), floor=st.integers(0, 2))
def test_the_count_is_exact_and_no_layer_falls_below_the_floor(
    density: float, name: str, floor: int
) -> None:
    model, batches = case(name)
    sizes = {n: w.numel() for n, w in names.weights(model).items()}
    budget = int(density * sum(sizes.values()) + 0.5)
    if budget < floor * len(sizes):
        with pytest.raises(ArgumentError, match=f"density={density} keeps {budget}"):
            snip.prune(model, batches, density, floor=floor)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmptyLayerWarning)
        masks = snip.prune(model, batches, density, floor=floor)
    assert masks.kept == budget
    assert min(int(m.sum()) for m in masks.values()) >= floor


def test_collapse_is_warned_of_and_the_floor_prevents_it() -> None:
    model, batches = case("linear")
    with torch.no_grad():
        model[2].weight.mul_(1e-9)  # the second layer's scores vanish
        model[0].weight.mul_(1e6)
    batches = [(batches[0][0] * 1e-6, batches[0][1])]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs * 1e9, targets)

    scores = snip.scores(model, batches, loss=loss)
    weak = min(scores, key=lambda n: float(scores[n].max()))
    total = sum(s.numel() for s in scores.values())
    # as many as the rest has above this layer's best
    above = sum(int((s > scores[weak].max()).sum()) for s in scores.values())
    with pytest.warns(EmptyLayerWarning, match=f"'{weak}' keeps none"):
        masks = snip.prune(model, batches, above / total, floor=0, loss=loss)
    assert masks.kept == above
    masks = snip.prune(model, batches, above / total, loss=loss)
    assert masks.kept == above
    assert int(masks[weak].sum()) == 1


def test_bad_input_is_named_and_nothing_changes() -> None:
    model, batches = case("linear")
    x, y = batches[0]
    before = copy.deepcopy(model.state_dict())

    def refused(match: str, model: nn.Module = model, given: object = batches, **how: object):
        with pytest.raises(ArgumentError, match=match):
            snip.scores(model, given, **how)  # type: ignore[arg-type]

    refused("batches is empty", given=[])
    refused(r"batches\[0\] is no pair .* \[\(inputs, targets\)\]", given=(x, y))
    refused(r"batches\[0\] is no pair", given=[(x, y, y)])
    refused(r"batches\[1\] is empty", given=[(x, y), (x[:0], y[:0])])
    refused(r"loss of batches\[0\] is nan", given=[(x * math.nan, y)])
    refused(r"loss of batches\[0\] is inf", loss=lambda o, t: o.sum() * math.inf)
    refused(r"shape \(6,\)", loss=lambda o, t: F.cross_entropy(o, t, reduction="none"))
    refused("requires_grad=False", loss=lambda o, t: F.cross_entropy(o, t).detach())
    # the loss is 0, its derivative 1 / 0
    refused("'0.weight' is not finite", loss=lambda o, t: (o - o.detach()).abs().sum().sqrt())
    refused("every score is 0", loss=lambda o, t: o.sum() * 0)
    refused("'2.weight' does not reach the loss", model=Unused())
    refused("no weight to score", model=nn.Sequential(nn.Flatten()))
    refused("matches nothing", include="conv1")
    for density in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ArgumentError, match=r"outside \(0, 1\]"):
            snip.prune(model, batches, density)
    with pytest.raises(ArgumentError, match="floor=-1"):
        snip.prune(model, batches, 0.5, floor=-1)
    with pytest.raises(ArgumentError, match="keeps 2 of 32 weights, floor=2 needs 4 in 2 layers"):
        snip.prune(model, batches, 0.05, floor=2)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model[0].weight.requires_grad_(False)
    refused("0.weight have requires_grad=False")


class Unused(nn.Sequential):
    """Its last layer is there and not used."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


def stripes() -> Dataset:
    """Ten classes of 28 x 28 images, each with two bright rows of its own, well inside."""
    g = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        targets = torch.arange(n) % 10
        images = torch.randn(n, 1, 28, 28, generator=g) * 0.1 - 0.4
        for k in range(10):
            images[targets == k, :, 4 + 2 * k : 6 + 2 * k, 6:22] += 2.0
        return Split(images, targets)

    return Dataset("stripes", split(300), split(50), split(50), 10)


@pytest.fixture
def striped(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (snip_experiments, specialization_experiment):
        monkeypatch.setattr(module, "mnist", lambda quick: stripes())


@pytest.mark.usefixtures("striped")
def test_the_lenet_experiment_on_striped_images(tmp_path: Path) -> None:
    raw = snip_experiments.lenet_300_100(Context(tmp_path, (0,), quick=True))
    assert isinstance(raw, dict)
    claims = snip_experiments._judge_300(raw)
    assert {claim.id for claim in claims} == {"snip.1", "snip.2", "snip.4"}
    assert [claim.what for claim in claims if not claim.holds and claim.id != "snip.2"] == []
    assert raw["picture"][0]["likest_digit"] == list(range(10))
    assert [run["kept"] for run in raw["runs"]] == [13310, 5324, 266200]
    assert all(run["best_error"] <= run["error"] for run in raw["runs"])
    assert set(raw["error"]) == {"0.05", "0.02", "1"}
    json.dumps(raw)
    wrong = [{"density": 0.5, "weights": 9, "kept": 5, "nonzero": n} for n in (5, 4)]
    assert snip_experiments._inexact(wrong) == 1


@pytest.mark.usefixtures("striped")
def test_the_specialization_experiment_on_striped_images(tmp_path: Path) -> None:
    said: list[str] = []
    raw = specialization_experiment.sparse_specialization(
        Context(tmp_path, (0,), quick=True, say=said.append)
    )
    assert isinstance(raw, dict)
    layers = ["conv1", "conv2", "ip1", "all"]
    assert list(raw["difference_of_means"]) == layers
    rows = [raw["runs"][0]["comparison"][layer] for layer in layers]
    assert all(row[k] is not None for row in rows for k in ("difference", "ks", "higher"))
    sparse = raw["speeds"][0]["sparse"]["rows"]
    for row in sparse:
        assert 0 < row["channel_ms"] <= row["dense_ms"]
        assert 0 < row["ideal_ms"] <= row["dense_ms"]
    assert [row["layer"] for row in sparse] == ["conv1", "conv2", "ip1", "ip2"]
    total = sum(row["weight_density"] * n for row, n in zip(sparse, SIZES, strict=True))
    # a weight regrown in a unit that is dead stays 0
    assert 0.98 * 0.05 * sum(SIZES) < total <= 0.05 * sum(SIZES) + 1
    assert (tmp_path / "specialization.svg").stat().st_size > 1000
    json.dumps(raw)


SIZES = (500, 25_000, 400_000, 5_000)
