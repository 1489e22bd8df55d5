"""The price of a bit that ends at a size, and the border that zero's cell is cut to."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer.core.errors import ArgumentError
from gossamer.quantize.rate_aware import RateAware
from gossamer.quantize.set_point import SetPoint

STEPS = 240


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 3))


def begun(most: int) -> tuple[nn.Module, torch.optim.Optimizer, RateAware, SetPoint]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    control = SetPoint(most, lambda: 20 + int(method.bits() / 8), steps=STEPS)
    method = RateAware.relative(model, step=0.4, lam=1e-4, control=control)
    method.attach(model, optimizer)
    return model, optimizer, method, control


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for i in range(first, last):
        g = torch.Generator().manual_seed(i)
        x = torch.randn(32, 16, generator=g)
        y = (x[:, :4].sum(1) > 0).long() + (x[:, 4] > 1).long()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("most", [60, 90, 130, 180])
def test_the_file_ends_just_below_its_target_whatever_that_is(most: int) -> None:
    model, optimizer, method, control = begun(most)
    steps(model, optimizer, 0, STEPS)
    trained = control.measured()
    if most > 60:  # a fifth of what the codes took
        assert 0.85 * most <= trained <= 1.1 * most
    size = control.fit(method)
    assert size == control.measured()
    assert 0.97 * most <= size <= most
    method.finish()
    # what was measured is what is left: values on the grid, and the cut's zeros
    left = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()])
    assert int(torch.count_nonzero(left)) < left.numel() / 2


def test_a_state_loaded_in_the_middle_gives_the_unbroken_runs_bits() -> None:
    model, optimizer, method, _ = begun(90)
    steps(model, optimizer, 0, STEPS // 2)
    kept: dict[str, Any] = copy.deepcopy({
        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "method": method.state_dict(),
    })  # fmt: skip
    steps(model, optimizer, STEPS // 2, STEPS)
    again, optimizer2, method2, _ = begun(90)
    again.load_state_dict(kept["model"])
    optimizer2.load_state_dict(kept["optimizer"])
    method2.load_state_dict(kept["method"])
    steps(again, optimizer2, STEPS // 2, STEPS)
    assert method2.lam == method.lam
    assert method2.border == method.border
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_cut_takes_what_lies_below_the_border_and_leaves_the_rest() -> None:
    model = nn.Sequential(nn.Linear(5, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.7, -1.2, 1.4, 2.2, 0.2]])
    method = RateAware({"0.weight": 1.0}, lam=0.0, dead_zone=0.1).attach(model)
    assert model[0].weight.tolist() == [[1, -1, 1, 2, 0]]
    method.cut(1.3)
    assert model[0].weight.tolist() == [[0, 0, 1, 2, 0]]
    assert method.bits(0.0) > method.bits()
    method.cut(0.0)
    assert model[0].weight.tolist() == [[1, -1, 1, 2, 0]]
    method.cut(2.0)
    method.finish()
    assert model[0].weight.tolist() == [[0, 0, 0, 2, 0]]


def test_the_last_cut_takes_as_few_codes_as_the_size_asks_for() -> None:
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.7, 0.9, 1.1, 1.3, 1.5, 2.0, 3.0, 4.0]])
    method = RateAware({"0.weight": 1.0}, lam=0.0, dead_zone=0.1).attach(model)

    def nonzero() -> int:
        return int(torch.count_nonzero(model[0].weight))

    def fit(most: int) -> int:
        return SetPoint(most, nonzero, steps=1).fit(method)

    assert fit(8) == 8
    assert method.border == 0
    assert fit(5) == 5
    assert 1.1 < method.border <= 1.3
    assert fit(1) == 1
    assert model[0].weight.tolist() == [[0, 0, 0, 0, 0, 0, 0, 4]]


def test_what_makes_no_sense_is_refused() -> None:
    method = RateAware({"0.weight": 1.0}, lam=0.0)
    with pytest.raises(ArgumentError, match="most=0"):
        SetPoint(0, lambda: 1, steps=10)
    with pytest.raises(ArgumentError, match="ramp=5"):
        RateAware({"0.weight": 1.0}, lam=0.0, ramp=5, control=SetPoint(9, lambda: 1, steps=10))
    with pytest.raises(ArgumentError, match="border=-1"):
        method.cut(-1.0)
    with pytest.raises(ArgumentError, match="border=nan"):
        method.cut(float("nan"))
