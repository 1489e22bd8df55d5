"""Quantized activations: levels, estimators, the step size, and replacement in a model."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.quantize import (
    LSQ,
    QuantizedReLU,
    normalize_,
    quantize_activations_,
    quantized_relu,
)
from gossamer.quantize.activations import ESTIMATORS
from gossamer.quantize.levels import FORMS, best_step, half_normal_step, squared_error

SETTINGS = {"estimator": "clipped", "form": "ceil"}
every_kind = pytest.mark.parametrize(
    ("estimator", "form"), list(itertools.product(ESTIMATORS, FORMS))
)


def level(x: float, bits: int, alpha: float, form: str) -> int:
    """k by the definition: an interval at a time."""
    if form == "ceil":
        return next((k for k in range(2**bits - 1) if x <= k * alpha), 2**bits - 1)
    return min(range(2**bits), key=lambda k: abs(x - k * alpha))


@pytest.mark.parametrize("form", FORMS)
@given(
    st.lists(st.floats(-3, 40), min_size=1, max_size=30),
    st.integers(2, 8),
    st.floats(0.05, 2.0),
)
@settings(max_examples=30, deadline=None)
def test_levels_by_definition(form: str, values: list[float], bits: int, alpha: float) -> None:
    step = torch.tensor(alpha, dtype=torch.float64)
    x = torch.tensor(values, dtype=torch.float64)
    y = quantized_relu(x, bits, step, estimator="relu", form=form)
    for one, got in zip(values, y.tolist(), strict=True):
        place = one / alpha - (0 if form == "ceil" else 0.5)
        if abs(place - round(place)) > 1e-9:  # away from a tie
            assert got == level(one, bits, alpha, form) * alpha


@every_kind
@pytest.mark.parametrize("bits", range(2, 9))
def test_outputs_are_levels_to_the_bit(estimator: str, form: str, bits: int) -> None:
    x = 3 * torch.randn(500, generator=torch.Generator().manual_seed(bits))
    module = QuantizedReLU(bits, 0.17, estimator=estimator, form=form)
    y = module(x)
    assert torch.equal(y, torch.arange(2**bits)[module.codes(x).long()] * module.alpha)
    assert set(module.codes(x).tolist()) <= set(range(2**bits))
    assert (y[x <= 0] == 0).all()


@every_kind
def test_derivatives_are_the_named_ones(estimator: str, form: str) -> None:
    x = torch.tensor([-2.0, -0.0, 0.3, 1.0, 1.49, 1.5, 8.0], requires_grad=True)
    y = quantized_relu(x, 2, 0.5, estimator=estimator, form=form)
    weight = torch.arange(1.0, 8.0)
    (grad,) = torch.autograd.grad((y * weight).sum(), x)
    derivative = {
        "identity": torch.ones(7),
        "relu": torch.tensor([0.0, 0, 1, 1, 1, 1, 1]),
        "clipped": torch.tensor([0.0, 0, 1, 1, 1, 0, 0]),
    }[estimator]
    assert torch.equal(grad, weight * derivative)


@every_kind
def test_derivative_of_a_learned_step(estimator: str, form: str) -> None:
    alpha = torch.tensor(0.5, requires_grad=True)
    x = torch.tensor([-1.0, 0.7, 9.0])
    y = quantized_relu(x, 2, alpha, estimator=estimator, form=form)
    y.sum().backward()
    k = 2 if form == "ceil" else 1
    assert float(alpha.grad) == pytest.approx(k - 0.7 / 0.5 + 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    x = torch.tensor([-1.0, 0.3, 0.8], dtype=dtype, requires_grad=True)
    y = QuantizedReLU(2, 0.5, **SETTINGS)(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert y.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("bits", "form", "published"),
    [(2, "ceil", 0.49), (4, "ceil", 0.17), (2, "round", 0.65), (4, "round", 0.195)],
)
def test_half_normal_steps_are_the_published_ones(bits: int, form: str, published: float) -> None:
    assert half_normal_step(bits, form=form) == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [2, 3, 6])
def test_best_step_is_the_minimum_of_the_squared_error(form: str, bits: int) -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(bits))
    found = best_step(x, bits, form=form)
    least = squared_error(x, bits, found, form=form)
    assert all(
        squared_error(x, bits, float(alpha), form=form) >= least * (1 - 1e-3)
        for alpha in torch.linspace(0.005, 4, 400)
    )
    assert found == pytest.approx(half_normal_step(bits, form=form), rel=0.15)
    assert best_step(7 * x, bits, form=form) == pytest.approx(7 * found, rel=1e-3)


def test_best_step_of_values_on_a_grid() -> None:
    x = 0.3 * torch.arange(-3, 4).float()
    assert best_step(x, 2, form="round") == pytest.approx(0.3, rel=1e-3)
    assert squared_error(x, 2, 0.3, form="round") == pytest.approx(0, abs=1e-12)


class Functional(nn.Module):
    """ReLUs of every kind, and a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x), inplace=True)
        y = (torch.relu(self.body(x)) + x).relu()
        return self.head(F.relu6(y).flatten(1))


def modular() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU6(),
            nn.Linear(8, 3),
        )  # fmt: skip


def data(count: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(8, 1, 4, 4, generator=g) for _ in range(count)]


def test_modules_are_replaced_in_place() -> None:
    model = modular().eval()
    assert quantize_activations_(model, 2, **SETTINGS) is model
    assert isinstance(model[1], QuantizedReLU)
    assert isinstance(model[4], QuantizedReLU)
    assert not model[1].training
    assert float(model[1].alpha) == pytest.approx(half_normal_step(2, form="ceil"))
    x = data(1)[0]
    hidden = model[3](model[2](model[1](model[0](x))))
    by_hand = quantized_relu(hidden, 2, model[4].alpha, **SETTINGS)
    assert torch.equal(model(x), model[5](by_hand))


def test_state_deepcopy_and_training_survive() -> None:
    model = quantize_activations_(modular(), 2, alpha=0.3, learned=True, **SETTINGS)
    assert {"1.alpha", "4.alpha"} <= {n for n, _ in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for x in data(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(8) % 3).backward()
        optimizer.step()
    assert model[1].alpha.item() != pytest.approx(0.3, abs=1e-6)
    assert "learned alpha=0." in repr(model[1])
    x = data(1)[0]
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    again = quantize_activations_(modular(), 2, alpha=1.0, learned=True, **SETTINGS)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("adam", [False, True])
def test_learned_alphas_beside_quantized_weights_resume_to_the_same_bits(
    estimator: str, adam: bool, tmp_path
) -> None:
    def begin() -> tuple[nn.Module, LSQ, torch.optim.Optimizer]:
        model = quantize_activations_(
            modular(), 2, alpha=0.3, learned=True, estimator=estimator, form="ceil"
        )
        made = torch.optim.Adam if adam else torch.optim.SGD
        optimizer = made(model.parameters(), 0.02, weight_decay=1e-3)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert id(model[1].alpha) in held
        return model, LSQ(bits=3, weight_decay=0.0, ends=True).attach(model, optimizer), optimizer

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: list[Tensor]) -> None:
        for x in inputs:
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.arange(8) % 3).backward()
            optimizer.step()

    model, method, optimizer = begin()
    loop(model, optimizer, data(3))
    torch.save([model.state_dict(), optimizer.state_dict(), method.state_dict()], tmp_path / "s")
    copied = copy.deepcopy(model)
    x = data(1)[0]
    assert torch.equal(copied(x), model(x))
    loop(model, optimizer, data(6)[3:])
    assert not torch.equal(copied[1].alpha, model[1].alpha)
    again, resumed, other = begin()
    saved = torch.load(tmp_path / "s", weights_only=True)
    for what, state in zip((again, other, resumed), saved, strict=True):
        what.load_state_dict(state)
    loop(again, other, data(6)[3:])
    method.finish()
    resumed.finish()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(p.is_leaf for p in model.parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_calls_are_captured_and_the_model_stays() -> None:
    model = Functional()
    before = copy.deepcopy(model)
    made = quantize_activations_(model, 8, alpha=0.004, **SETTINGS)
    assert made is not model
    found = [n for n, m in made.named_modules() if isinstance(m, QuantizedReLU)]
    assert len(found) == 5
    assert not any(isinstance(m, QuantizedReLU) for m in model.modules())
    assert made.conv.weight is model.conv.weight
    assert {n for n, _ in made.named_parameters()} == {n for n, _ in model.named_parameters()}
    x = data(1)[0]
    assert torch.equal(model.eval()(x), before.eval()(x))
    plain = quantize_activations_(Functional(), 2, alpha=1.0, **SETTINGS)
    assert torch.equal(copy.deepcopy(plain)(x), plain(x))


def test_fine_levels_compute_nearly_the_same() -> None:
    model = Functional().eval()
    x = data(1)[0]
    wanted = model(x)
    made = quantize_activations_(
        model, 8, estimator="clipped", form="round", calibration=[(x, None)]
    )
    assert torch.allclose(made.eval()(x), wanted, atol=0.03)
    assert not torch.equal(made(x), wanted)


def test_calibration_finds_each_layers_step_and_restores_modes() -> None:
    model = Functional().train()
    model.body[1].eval()
    batches = data()
    statistics = model.body[1].running_mean.clone()
    made = quantize_activations_(model, 3, calibration=batches, include=["relu"], **SETTINGS)
    seen = torch.cat([model.conv(x) for x in batches])
    assert float(made.relu.alpha) == pytest.approx(best_step(seen, 3, form="ceil"), rel=0.05)
    assert model.training
    assert not model.body[1].training
    assert torch.equal(model.body[1].running_mean, statistics)
    assert isinstance(made.get_submodule("body.2"), nn.ReLU)


def test_selection_by_pattern() -> None:
    model = quantize_activations_(modular(), 4, exclude="re:4", **SETTINGS)
    assert isinstance(model[1], QuantizedReLU)
    assert isinstance(model[4], nn.ReLU6)


def test_a_shared_relu_is_replaced_everywhere() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu)
    quantize_activations_(model, 2, **SETTINGS)
    assert model[1] is model[3]
    assert isinstance(model[1], QuantizedReLU)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x) if x.sum() > 0 else x


class Clobbering(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        return F.relu(y, inplace=True) + y


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(x), 0.5, self.training)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def recurrent() -> nn.Module:
    return nn.ModuleDict({"rnn": nn.RNN(3, 3, nonlinearity="relu"), "act": nn.ReLU()})


REFUSED = {
    "bits": (modular, {"bits": 1}, "bits=1"),
    "many bits": (modular, {"bits": 9}, "bits=9"),
    "alpha": (modular, {"alpha": 0.0}, r"alpha=0\.0"),
    "NaN": (modular, {"alpha": float("nan")}, "alpha=nan"),
    "estimator": (modular, {"estimator": "tanh"}, "'tanh' is not one of identity"),
    "form": (modular, {"form": "floor"}, "'floor' is not one of ceil"),
    "both": (modular, {"alpha": 1.0, "calibration": []}, "one of the two"),
    "pattern": (modular, {"include": "conv*"}, "matches nothing"),
    "branching": (Branching, {}, "Branching cannot be captured"),
    "in place": (Clobbering, {}, "'relu' is a ReLU in place on 'mul'"),
    "dropout": (Dropping, {}, "'dropout' .dropout. would keep the present mode"),
    "hidden": (recurrent, {"functional": False}, "'rnn' .RNN. computes a ReLU inside"),
    "nothing": (lambda: nn.Linear(2, 2), {}, "no ReLU"),
    "unreached": (Unused, {"calibration": [torch.ones(2)]}, "second are not reached"),
    "dead": (Unused, {"calibration": [-torch.ones(2)], "include": "first"}, "'first': values"),
    "infinite": (
        Unused,
        {"calibration": [torch.tensor([float("inf")])], "include": "first"},
        "NaN or infinite",
    ),
}


@pytest.mark.parametrize(("make", "options", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_anything_is_changed(make, options, match) -> None:
    model = make()
    before = [(n, type(m), m.training) for n, m in model.named_modules()]
    with pytest.raises(ArgumentError, match=match):
        quantize_activations_(model, **{"bits": 2, **SETTINGS, **options})
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_captured_can_have_its_modules_replaced() -> None:
    model = quantize_activations_(Branching(), 2, functional=False, alpha=0.5, **SETTINGS)
    assert model(torch.tensor([0.4, 2.0])).tolist() == [0.5, 1.5]
    made = quantize_activations_(recurrent(), 2, functional=False, exclude="rnn", **SETTINGS)
    assert isinstance(made["act"], QuantizedReLU)


def test_normalize_puts_batch_norm_before_each_relu() -> None:
    model = modular()
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert normalize_(model, torch.zeros(2, 1, 4, 4)) is model
    assert [type(m) for m in model[1]] == [nn.BatchNorm2d, nn.ReLU]
    assert [type(m) for m in model[4]] == [nn.BatchNorm1d, nn.ReLU6]
    assert model[1][0].num_features == 4
    assert not model[1][0].affine
    assert int(model[1][0].num_batches_tracked) == 0
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    assert all(torch.equal(after[n], p) for n, p in before.items())
    quantize_activations_(model, 2, **SETTINGS)
    assert [type(m) for m in model[1]] == [nn.BatchNorm2d, QuantizedReLU]
    seen = []
    model[1][1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(data(1)[0])
    assert seen[0].mean((0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=1e-5)
    relu = nn.ReLU()
    with pytest.raises(ArgumentError, match="at 2 places"):
        normalize_(nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu), torch.ones(2, 4))
    with pytest.raises(ArgumentError, match=r"shape \(2,\)"):
        normalize_(nn.Sequential(nn.ReLU()), torch.ones(2))
