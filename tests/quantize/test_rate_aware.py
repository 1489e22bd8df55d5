import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer import datasets, nets
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.quantize.rate_aware import RateAware, snap
from gossamer.training import TrainConfig, evaluate, train


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def steps(model: nn.Module, method_steps: int, optimizer: torch.optim.Optimizer) -> None:
    g = torch.Generator().manual_seed(1)
    for _ in range(method_steps):
        x, y = torch.randn(16, 8, generator=g), torch.randint(0, 3, (16,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_snap_hand_computed_with_a_straight_through_gradient() -> None:
    w = torch.tensor([0.0, 0.24, 0.29, -0.31, 0.79, -1.0], requires_grad=True)
    out = snap(w, 0.5, dead_zone=0.1)  # cells begin at .6, 1.6, 2.6 steps: .3, .8
    assert out.tolist() == [0.0, 0.0, 0.0, -0.5, 0.5, -1.0]
    (out * torch.arange(6.0)).sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [0, 1, 2, 3, 4, 5]


def test_forward_uses_exact_grid_values_and_finish_leaves_them_plain() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    method = RateAware.relative(model, step=0.3, lam=1e-5).attach(model, optimizer)
    steps(model, 20, optimizer)
    seen = model[0].weight.detach().clone()
    method.finish()
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(model[0].weight, seen)
    step = torch.tensor(method.steps["0.weight"])
    levels = (seen / step).round()
    assert torch.equal(seen, levels * step)
    assert len(levels.unique()) > 3


def test_the_gradient_gets_the_slope_of_the_code_lengths() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.1, 1.0, -1.0, 2.0]])
    method = RateAware({"0.weight": 1.0}, lam=0.5, dead_zone=0.0).attach(model)
    counts = torch.zeros(256, dtype=torch.float64)
    counts[:3] = torch.tensor([1.0, 2.0, 1.0])
    bits = -torch.log2((counts + 0.5) / (4 + 128))
    bits[1:] += 1
    one = float((bits[1] - bits[0]).clamp(0, 8))
    two = float((bits[2] - bits[1]).clamp(0, 8))
    model(torch.zeros(1, 4)).sum().backward()
    method.before_step()
    grad = model[0].parametrizations.weight.original.grad
    expected = torch.tensor([[one, one, -one, two]]) * 0.5
    torch.testing.assert_close(grad, expected)


def test_masked_weights_stay_zero() -> None:
    model = net()
    mask = torch.rand(16, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    optimizer = torch.optim.Adam(model.parameters(), 0.01, weight_decay=0.01)
    method = RateAware({"0.weight": 0.05}, lam=0.0, masks=Masks({"0.weight": mask}))
    method.attach(model, optimizer)
    steps(model, 30, optimizer)
    method.finish()
    assert (model[0].weight[~mask] == 0).all()
    assert (model[0].weight[mask] != 0).any()


def test_state_restores_to_the_same_bits() -> None:
    def begin() -> tuple[nn.Module, RateAware, torch.optim.Optimizer]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        method = RateAware.relative(model, step=0.3, lam=1e-3, ramp=40, every=7)
        return model, method.attach(model, optimizer), optimizer

    whole, _, optimizer = begin()
    steps(whole, 10, optimizer)
    first, method, optimizer = begin()
    steps(first, 10, optimizer)
    saved = copy.deepcopy((first.state_dict(), method.state_dict(), optimizer.state_dict()))
    second, again, resumed = begin()
    second.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    steps(first, 25, optimizer)
    steps(second, 25, resumed)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = RateAware({"0.weight": 0.2}, lam=1e-4).attach(model, optimizer)
    optimizer.zero_grad()
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    method.finish()
    assert model[0].weight is model[2].weight
    assert torch.equal(model[0].weight, snap(model[0].weight, 0.2, 0.1))


def test_training_trades_bits_for_little_accuracy() -> None:
    data = datasets.load("digits")
    model = nets.build("mlp", seed=0)
    train(model, data, TrainConfig(15, lr=0.05, schedule="cosine"))
    before = evaluate(model, data.validation).accuracy
    method = RateAware.relative(model, step=0.3, lam=5e-5, ramp=50)
    sizes: list[float] = []

    twin = copy.deepcopy(model)
    first = RateAware.relative(twin, step=0.3, lam=0.0).attach(twin)
    sizes.append(first.bits())
    history = train(model, data, TrainConfig(15, lr=0.02, schedule="cosine"), methods=[method])
    sizes.append(method.bits())
    method.finish()
    assert history.epochs
    assert sizes[1] < 0.8 * sizes[0]
    assert evaluate(model, data.validation).accuracy > before - 0.03


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"steps": {}}, "steps is empty"),
        ({"steps": {"0.weight": 0.0}}, "must be positive"),
        ({"steps": {"0.weight": 1.0}, "lam": -1.0}, "lam=-1.0"),
        ({"steps": {"0.weight": 1.0}, "dead_zone": 0.5}, r"outside \[0, 0.5\)"),
        ({"steps": {"0.weight": 1.0}, "ramp": -1}, "ramp=-1"),
    ],
)
def test_bad_settings_are_named(arguments: dict, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        RateAware(**{"lam": 0.1, **arguments})


def test_attach_refuses_and_changes_nothing() -> None:
    model = net()
    with pytest.raises(ArgumentError, match=r"'9\.weight' is no parameter"):
        RateAware({"9.weight": 1.0}, lam=0.1).attach(model)
    method = RateAware({"0.weight": 1.0}, lam=0.1).attach(model)
    with pytest.raises(ArgumentError, match="parametrized already"):
        RateAware({"0.weight": 1.0}, lam=0.1).attach(model)
    method.finish()
    lstm = nn.LSTM(3, 4)
    with pytest.raises(ArgumentError, match="belongs to LSTM"):
        RateAware({"weight_ih_l0": 0.1}, lam=0.1).attach(lstm)
    flat: Tensor = torch.zeros(2, 2)
    empty = nn.Linear(2, 2)
    empty.weight.data = flat
    with pytest.raises(ArgumentError, match="no spread"):
        RateAware.relative(empty, step=0.5, lam=0.1)


def test_no_negative_zeros_reach_the_file() -> None:
    weight = torch.tensor([-0.3, 0.3, -0.0, -2.0])
    assert torch.signbit(snap(weight, 1.0)).tolist() == [False, False, False, True]
    model = nn.Linear(8, 8)
    method = RateAware.relative(model, step=2.0, lam=0.0).attach(
        model, torch.optim.SGD(model.parameters(), 0.1)
    )
    method.finish()
    zeros = model.weight.detach()[model.weight == 0]
    assert len(zeros)
    assert not torch.signbit(zeros).any()
