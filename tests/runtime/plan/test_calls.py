"""What a plan keeps of its example is checked at every call, or refused when it is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from gossamer.core.errors import ArgumentError
from gossamer.runtime.plan.plan import Plan


class Net(nn.Module):
    """A linear layer inside whatever function is asked for."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.layer, *args, **kwargs)


def plan_of(function: Callable[..., Any], example: Any, engine: Any = "numpy") -> tuple[Net, Plan]:
    net = Net(function).eval()
    return net, gossamer.compile(net, example, engine=engine, rounds=1)


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def test_what_is_no_tensor_must_be_the_example_s() -> None:
    _, plan = plan_of(lambda layer, x, scale=1.0: layer(x) * scale, (X, 2.0))
    assert torch.equal(plan(X, 2.0), plan(X))
    for other in (3.0, True, None, X):
        with pytest.raises(ArgumentError, match=r"the plan is for 2\.0, its example's"):
            plan(X, other)
        with pytest.raises(ArgumentError, match=r"the plan is for 2\.0, its example's"):
            plan.bind(X, other)
    _, named = plan_of(lambda layer, x, turn=True: layer(x if turn else -x), {"x": X, "turn": True})
    assert torch.equal(named(x=X), named(turn=True, x=X))
    with pytest.raises(ArgumentError, match=r"\['turn'\] is False; the plan is for True"):
        named(x=X, turn=False)


def test_a_mapping_is_read_by_its_keys() -> None:
    net, plan = plan_of(lambda layer, d: layer(d["a"]) - 2 * layer(d["b"]), ({"a": X, "b": -X},))
    turned = {"b": X, "a": X + 1}
    with torch.no_grad():
        torch.testing.assert_close(plan(turned), net(turned))
    for other in ({"a": X, "c": X}, {"a": X}, {"a": X, "b": X, "c": X}):
        with pytest.raises(ArgumentError, match=r"has the keys .* the plan takes \['a', 'b'\]"):
            plan(other)
    for args, match in (((X,), "a tensor"), ((turned, X), "2 inputs where"), ((), "0 inputs")):
        with pytest.raises(ArgumentError, match=match):
            plan(*args)
    _, numbers = plan_of(lambda layer, x: {0: layer(x), "1": x * 2}, X)
    assert list(numbers(X)) == [0, "1"]


def test_what_changes_and_is_no_tensor_is_refused() -> None:
    with pytest.raises(ArgumentError, match="gives 3, which is no tensor and changes"):
        plan_of(lambda layer, x: (layer(x), x.shape[0]), X[:3])
    with pytest.raises(ArgumentError, match=r"gives -?\d.*which is no tensor and changes"):
        plan_of(lambda layer, x: {"y": layer(x), "mean": float(x[0].mean())}, X, engine="torch")
    _, plan = plan_of(lambda layer, x: (layer(x), x.shape[1]), X)
    assert plan(X[:1])[1] == 4


@pytest.mark.parametrize("branch", [lambda n: n > 4, lambda n: n == 8, lambda n: n % 5 == 0])
def test_a_branch_on_the_size_of_a_batch_fixes_it(branch: Callable[[int], bool]) -> None:
    net, plan = plan_of(lambda layer, x: -layer(x) if branch(x.shape[0]) else layer(x), X)
    with torch.no_grad():
        torch.testing.assert_close(plan(X), net(X))
    with pytest.raises(ArgumentError, match="its shapes are the example's"):
        plan(torch.zeros(8, 4))


def test_a_batch_of_one_is_compared_too() -> None:
    with pytest.raises(ArgumentError, match="something else than torch on a batch of 1"):
        plan_of(lambda layer, x: -layer(x) if x.shape[0] == 1 else layer(x), X)

    def some(layer: nn.Module, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise ValueError("no batch of one")
        return layer(x)

    assert plan_of(some, X)[1].graph.free


def test_tensors_that_numpy_has_no_like_of() -> None:
    _, plan = plan_of(lambda layer, x: layer(x), X)
    for x in (X.bfloat16(), X.to_sparse()):
        for call in (plan, plan.bind):
            with pytest.raises(ArgumentError, match="that numpy cannot read"):
                call(x)
    with pytest.raises(ArgumentError, match="resolve_neg"):
        plan.bind(torch._neg_view(X))


def test_whole_numbers() -> None:
    """Clamped and squared; joined with floats, whatever bits the example's have."""
    table = torch.randn(10, 4)
    net, plan = plan_of(lambda layer, i: (F.embedding(i.clamp(0, 9), table), i**2), X.long())
    at = torch.tensor([[-5, 3], [12, 9]])
    with torch.no_grad():
        wanted = net(torch.stack([at, at + 1], 1).flatten(1))
    for found, one in zip(plan(torch.stack([at, at + 1], 1).flatten(1)), wanted, strict=True):
        assert torch.equal(found, one)

    def joined(layer: nn.Module, x: Tensor, i: Tensor) -> Tensor:
        return layer(torch.cat([torch.empty(0), x, i], 1))

    zeros = torch.zeros(3, 2, dtype=torch.int32)
    for engine in ("numpy", "own"):
        net, plan = plan_of(joined, (X[:, :2], zeros), engine)
        with torch.no_grad():
            torch.testing.assert_close(plan(X[:, :2], zeros + 7), net(X[:, :2], zeros + 7))


@pytest.mark.parametrize("engine", ["numpy", "own"])
def test_infinity_passes_an_end(engine: str) -> None:
    def ends(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return x.clamp(min=-0.5), x.clamp(max=0.5), (100 * x).exp().clamp(min=1e-6), F.silu(x)

    net, plan = plan_of(ends, X, engine)
    for x in (X, torch.tensor([[torch.nan, torch.inf, -torch.inf, 2.0]])):
        for found, wanted in zip(plan(x), net(x), strict=True):
            torch.testing.assert_close(found, wanted, equal_nan=True)


def test_what_torch_runs_reads_constants() -> None:
    """Those that were computed while the network was lowered."""
    net, plan = plan_of(lambda layer, x: layer(x.cumsum(1) * (torch.arange(4.0) + 1)), X)
    with torch.no_grad():
        torch.testing.assert_close(plan(X), net(X))
    for engine in ("plan", "own"):  # nothing but torch's
        _, plan = plan_of(lambda layer, x: x.cumsum(1), X, engine)
        assert np.array_equal(plan(X.numpy()), X.cumsum(1).numpy())


def test_a_constant_of_more_dimensions_is_no_bias() -> None:
    more = torch.linspace(-1, 1, 4).reshape(1, 1, 4)
    net, plan = plan_of(lambda layer, x: torch.relu(layer(x) + more), X)
    with torch.no_grad():
        torch.testing.assert_close(plan(X), net(X))
    (layer,) = (n for n in plan.graph.nodes if n.op == "linear")
    assert plan.graph.values[layer.name].shape == (-1, 4)


class Scaled(nn.Module):
    """An input that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, other: bool) -> Tensor:
        return self.layer(x) if other is None else self.layer(x) * 1


def test_a_file_s_plans_are_of_the_example_s_values(tmp_path: Path) -> None:
    """Two that give the same on their examples are two."""
    net, file = Scaled(), tmp_path / "model.gsm"
    gossamer.pack.pack(net, file).close()
    for other in (True, False):
        plan = gossamer.compile(file, (X, other), model=Scaled(), engine="numpy")
        with torch.no_grad():
            torch.testing.assert_close(plan(X, other), net(X, other))
    assert len(list(tmp_path.glob("*.plan"))) == 2


def test_the_floor_of_eight_bits_is_asked_for() -> None:
    net = nn.Sequential(nn.Linear(4, 4)).eval()
    given = {"engine": "numpy", "precision": "int8", "calibration": [X]}
    with pytest.raises(ArgumentError, match=r"the floor is a cosine of 1\.0"):
        gossamer.compile(net, X, floor=1.0, **given)
    assert gossamer.compile(net, X, floor=0.5, **given).facts.precision == "int8"
