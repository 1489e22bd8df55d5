"""How much of a layer's error reaches the outputs."""

import math

import pytest
import torch
from torch import nn

from gossamer.training.reach import _even, _noise, reach

X = [torch.randn(12, 6, generator=torch.Generator().manual_seed(0))]


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Scaled(nn.Module):
    """Two layers side by side, of which one counts a hundredth."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loud(x) + 0.1 * self.quiet(x)


def test_what_counts_a_hundredth_reaches_by_that() -> None:
    torch.manual_seed(0)
    net = Scaled()
    with torch.no_grad():
        net.quiet.weight.copy_(net.loud.weight)
    before = {n: p.clone() for n, p in net.named_parameters()}
    found = reach(net, X, ["loud.weight", "quiet.weight"], generator=drawn())
    assert found["loud.weight"] / found["quiet.weight"] == pytest.approx(100, rel=0.2)
    assert found["loud.weight"] * found["quiet.weight"] == pytest.approx(1)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    again = reach(net, X, ["loud.weight", "quiet.weight"], generator=drawn())
    assert again == found


def test_a_state_that_is_kept_counts_its_steps() -> None:
    torch.manual_seed(0)
    net = nn.RNN(6, 6, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        net.weight_hh_l0.copy_(torch.eye(6))
        net.weight_ih_l0.abs_()
    x = [torch.rand(4, 20, 6, generator=drawn(1))]
    found = reach(net, x, ["weight_ih_l0", "weight_hh_l0"], generator=drawn())
    assert found["weight_hh_l0"] > found["weight_ih_l0"]


def test_what_is_not_used_counts_as_one() -> None:
    net = Scaled()
    net.unused = nn.Linear(3, 3)
    found = reach(net, X, ["loud.weight", "unused.weight"], generator=drawn())
    assert found == {"loud.weight": pytest.approx(1), "unused.weight": 1.0}


def test_a_table_is_measured_where_it_is_looked_up() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    found = reach(net, [torch.arange(8).reshape(2, 4)], ["0.weight", "1.weight"], generator=drawn())
    assert all(f > 0 for f in found.values())


def test_a_half_type_is_moved_by_what_it_holds() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 50).bfloat16()
    moved = _noise(weight, drawn())
    assert torch.equal((weight.float() + moved).bfloat16().float(), weight.float() + moved)
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.01, rel=0.3)


def test_what_bursts_counts_most_and_what_fades_least() -> None:
    sizes = dict.fromkeys("abcd", 1)
    found = _even({"a": 1.0, "b": math.inf, "c": 0.0, "d": None}, sizes)
    assert found == {"a": 1.0, "b": pytest.approx(1e4), "c": pytest.approx(1e-4), "d": 1.0}
