"""Plans on arrays that are written anew between calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.core.errors import ArgumentError
from gossamer.runtime.plan.plan import Plan


class Two(nn.Module):
    """A flat view of its input, a sum, and an input as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, x: Tensor, more: Tensor) -> dict[str, Tensor]:
        return {"y": torch.relu(self.layer(x.flatten(1))) + more, "more": more * 1}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Two().eval()


@pytest.fixture
def plan(net: nn.Module) -> Plan:
    return gossamer.compile(net, (torch.zeros(2, 3, 4), torch.zeros(2, 5)), engine="numpy")


def test_inputs_are_read_where_they_lie(net: nn.Module, plan: Plan) -> None:
    x, more = torch.zeros(2, 3, 4), torch.zeros(2, 5)
    call = plan.bind(x, more)
    for seed in (1, 2):
        torch.manual_seed(seed)
        x.normal_()
        more.normal_()
        with torch.no_grad():
            wanted = net(x, more)
        found = call()
        assert set(found) == {"y", "more"}
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value)
    again = plan.bind(x, more)  # in memory of its own
    kept = call()["y"].clone()
    x.zero_()
    again()
    assert torch.equal(kept, call()["y"]) is False
    assert torch.equal(again()["y"], call()["y"])


def test_arrays_that_lie_elsewhere_are_copied(net: nn.Module, plan: Plan) -> None:
    room = np.zeros(200, np.float32)
    x = room[1:49:2].reshape(2, 3, 4)  # a view with steps
    odd = room[101:111].reshape(2, 5)  # not at a multiple of 64 bytes, or by chance
    call = plan.bind(x, odd)
    room[:] = np.random.default_rng(0).standard_normal(200)
    with torch.no_grad():
        wanted = net(torch.from_numpy(x.copy()), torch.from_numpy(odd.copy()))
    found = call()
    assert isinstance(found["y"], np.ndarray)
    np.testing.assert_allclose(found["y"], wanted["y"].numpy(), atol=1e-6)


def test_what_is_not_finite_passes_as_in_torch(net: nn.Module, plan: Plan) -> None:
    x, more = torch.zeros(2, 3, 4), torch.zeros(2, 5)
    call = plan.bind(x, more)
    x[1, 0, 0], more[0, 2] = torch.nan, torch.inf
    with torch.no_grad():
        wanted = net(x, more)
    torch.testing.assert_close(call()["y"], wanted["y"], equal_nan=True)


def test_what_cannot_be_bound(plan: Plan) -> None:
    with pytest.raises(ArgumentError, match="empty batch cannot be bound"):
        plan.bind(torch.zeros(0, 3, 4), torch.zeros(0, 5))
    with pytest.raises(ArgumentError, match=r"is \(2, 3, 5\)"):
        plan.bind(torch.zeros(2, 3, 5), torch.zeros(2, 5))
    with pytest.raises(ArgumentError, match="on meta cannot be bound"):
        plan.bind(torch.zeros(2, 3, 4, device="meta"), torch.zeros(2, 5))


def test_an_integer_plan_says_what_it_refuses() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    x = torch.randn(3, 4, 4, 4)
    plan = gossamer.compile(net, x[:1], engine="own", precision="int8", calibration=[x])
    call = plan.bind(x)
    assert torch.equal(call(), plan(x))
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(ArgumentError, match="NaN or infinite"):
        call()


def test_in_other_engines() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).eval()
    x = torch.randn(2, 4)
    for engine in ("onnxruntime", "torch"):
        plan = gossamer.compile(net, x, engine=engine)
        call = plan.bind(x)
        x.normal_()
        torch.testing.assert_close(call(), net(x).detach())
