"""Sums over a weight's inputs, in the network as it is and as it was."""

import copy

import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.training.moments import moments


def test_they_are_sums_over_both_networks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight.mul_(0.5)
    batches = [torch.randn(5, 4), torch.randn(3, 4), torch.randn(6, 4)]
    found = moments(changed, model, batches, "2.weight", [1, 1, 1], held=1)
    x = [torch.relu(model[0](b)).detach().double() for b in batches]
    y = [torch.relu(changed[0](b)).detach().double() for b in batches]
    (part,) = found.parts(2)
    assert part.rows == slice(0, 2)
    near = {"rtol": 1e-5, "atol": 1e-6}
    before, now = torch.cat(x[:2]), torch.cat(y[:2])
    torch.testing.assert_close(part.hessian, now.T @ now, **near)
    torch.testing.assert_close(part.cross, before.T @ now, **near)
    assert part.means.count == 8
    torch.testing.assert_close(part.means.before, before.sum(0), **near)
    torch.testing.assert_close(part.means.now, now.sum(0), **near)
    assert part.held is not None
    torch.testing.assert_close(part.held.now, y[2].sum(0), **near)
    assert part.held.count == 6
    assert found.paired


def test_what_cannot_be_summed_is_refused() -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(ArgumentError, match="NaN or infinity"):
        moments(model, model, [torch.full((1, 4), float("nan"))], "weight", [1])
    with pytest.raises(ArgumentError, match="no batch reaches"):
        moments(model, model, [], "weight", [])
    with pytest.raises(ArgumentError, match="no batch reaches"):
        moments(model, model, [torch.ones(1, 4)], "weight", [0])


def test_groups_of_a_convolution_are_parts() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(4, 6, 1, groups=2), torch.randn(3, 4, 5, 5)
    found = moments(model, model, [x], "weight", [1]).parts(6)
    assert [p.rows for p in found] == [slice(0, 3), slice(3, 6)]
    for part, mine in zip(found, x.chunk(2, 1), strict=True):
        flat = mine.movedim(1, 3).reshape(-1, 2).double()
        torch.testing.assert_close(part.hessian, flat.T @ flat, rtol=1e-5, atol=1e-4)


def test_query_and_key_have_parts_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2, batch_first=True, bias=False)
    query, key, one = torch.randn(3, 2, 4), torch.randn(3, 5, 4), torch.randn(3, 2, 4)
    batches = [(query, key, key), (one, one, one)]  # crossed, then of itself
    found = moments(model, model, batches, "in_proj_weight", [2, 1]).parts(12)
    assert [p.rows for p in found] == [slice(0, 4), slice(4, 12)]
    for part, given in zip(found, ([query, one], [key, one]), strict=True):
        flat = torch.cat([g.reshape(-1, 4) for g in given]).double()
        torch.testing.assert_close(part.hessian, flat.T @ flat, rtol=1e-5, atol=1e-5)


def test_inputs_that_a_network_overwrites_are_those_of_the_product() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.a(x)
            x.add_(100.0)
            return self.a(y)

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(4, 3)
    found = moments(model, model, [x], "a.weight", [2]).parts(3)[0]
    flat = torch.cat([x, model.a(x).detach()]).double()
    torch.testing.assert_close(found.cross, flat.T @ flat, rtol=1e-5, atol=1e-5)


def test_routes_that_change_count_as_they_are_now() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.a = nn.Linear(3, 1, bias=False), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x[self.gate(x)[:, 0] > 0])

    torch.manual_seed(0)
    model = Routed()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.gate.weight.copy_(torch.tensor([[1.0, 1.0, 1.0]]))
    x = torch.randn(9, 3)
    found = moments(other, model, [x], "a.weight", [1])
    assert not found.paired
    (part,) = found.parts(2)
    assert torch.equal(part.cross, part.hessian)


def test_a_table_counts_its_rows_and_a_tied_one_is_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) @ self.table.weight.T

    torch.manual_seed(0)
    model = Tied()
    ids = torch.tensor([[0, 2, 2]])
    found = moments(model, model, [ids], "table.weight", [2])
    assert found.counts is not None
    assert found.counts.tolist() == [1, 0, 2, 0]
    flat = model.table(ids).detach().reshape(-1, 3).double()
    torch.testing.assert_close(found.parts(4)[0].hessian, flat.T @ flat, rtol=1e-5, atol=1e-6)
    assert not found.mixed


def test_a_weight_that_a_pass_uses_again_is_taken_with_the_inputs_that_it_has_now() -> None:
    torch.manual_seed(0)
    original = nn.RNN(3, 4, batch_first=True)
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.weight_ih_l0 *= 1.5
    x = torch.randn(2, 5, 3)
    (part,) = moments(model, original, [x], "weight_hh_l0", [5]).parts(4)
    assert torch.equal(part.cross, part.hessian)
    twice = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    moved = copy.deepcopy(twice)
    with torch.no_grad():
        moved[0].weight *= 1.5
    (part,) = moments(moved, twice, [x[0]], "1.weight", [1]).parts(3)
    assert not torch.allclose(part.cross, part.hessian)


@pytest.mark.parametrize("kernel", [(3, 1), (3, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_of_a_wide_convolution_are_those_of_the_whole(
    kernel: tuple[int, int], stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, kernel, stride, 1), nn.ReLU(), nn.Conv2d(6, 5, kernel))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight.mul_(0.5)
    batches = [torch.randn(3, 4, 9, 9), torch.randn(2, 4, 9, 9)]
    (whole,) = moments(changed, model, batches, "2.weight", [1, 1]).parts(5)
    monkeypatch.setattr("gossamer.training.moments.WIDE", 8)
    found = moments(changed, model, batches, "2.weight", [1, 1]).parts(5)
    assert len(found) > 1
    for part in found:
        c = part.columns
        assert c.stop - c.start <= 8
        torch.testing.assert_close(part.hessian, whole.hessian[c, c], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part.cross, whole.cross[c, c], rtol=1e-5, atol=1e-5)
