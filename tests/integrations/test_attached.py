"""Methods' state in the optimizer's: what every trainer saves and loads."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.core.method import Masked, Snapshot
from gossamer.integrations.attached import KEY, Attached
from gossamer.prune.dynamic import DynamicSparse
from gossamer.quantize import TTQ
from integration_methods import METHODS, same


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))


def begin(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, Attached]:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=1e-3)
    return model, optimizer, Attached(METHODS[kind](model), model, optimizer)


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(8, 6, generator=g), torch.randint(0, 3, (8,), generator=g)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("device_moves", [False, True])
def test_the_optimizers_state_brings_the_methods(kind: str, device_moves: bool) -> None:
    model, optimizer, attached = begin(kind)
    if device_moves:  # Accelerate gives an optimizer its own state, moved, before the first step
        optimizer.load_state_dict(optimizer.state_dict())
    loop(model, optimizer, 5, 1)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    loop(model, optimizer, 6, 2)
    attached.finish()

    again, other, resumed = begin(kind)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    resumed.check_resumed(5)
    assert resumed.steps == 5
    loop(again, other, 6, 2)
    resumed.finish()
    assert same(model, again)
    assert KEY not in optimizer.state_dict()
    a, b = optimizer.state_dict(), other.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for i, state in a["state"].items():
        assert all(torch.equal(v, b["state"][i][k]) for k, v in state.items())


def test_an_optimizers_own_state_does_not_touch_a_loaded_model() -> None:
    model, optimizer, attached = begin("rigl")
    full = net()
    model.load_state_dict(full.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does
    assert same(model, full)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(model, full)
    state = copy.deepcopy(optimizer.state_dict())
    loop(model, optimizer, 7, 1)
    masks = state[KEY]["methods"][0]["state"]["masks"]
    now = attached.methods[0]
    assert isinstance(now, DynamicSparse)
    assert any(not torch.equal(now.masks[name], mask) for name, mask in masks.items())
    optimizer.load_state_dict(state)  # of another time
    assert all(torch.equal(now.masks[name], mask) for name, mask in masks.items())


def test_a_state_without_the_methods_is_refused() -> None:
    _, optimizer, attached = begin("masks")
    plain = torch.optim.Adam(net().parameters()).state_dict()
    with pytest.raises(ArgumentError, match=r"holds none of methods.*go on without Masked"):
        optimizer.load_state_dict(plain)
    with pytest.raises(ArgumentError, match=r"state is of Masked, attached are DynamicSparse"):
        begin("rigl")[1].load_state_dict(optimizer.state_dict())
    with pytest.raises(ArgumentError, match="step 5, but its checkpoint held no state"):
        attached.check_resumed(5)


def test_weights_that_were_not_restored_are_seen() -> None:
    model, optimizer, _ = begin("masks")
    loop(model, optimizer, 3, 1)
    again, other, resumed = begin("masks")
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ArgumentError, match="does not have the weights"):
        resumed.check_resumed(3)
    again.load_state_dict(model.state_dict())
    resumed.check_resumed(3)


def test_a_scheduler_that_does_not_know_a_group_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    method = TTQ(density=0.5, start="fit", weight_decay=0.1, every=3, ends=True)
    with pytest.raises(ArgumentError, match="before the scheduler is made"):
        Attached([method], model, optimizer)


def test_what_cannot_be_attached_leaves_the_rest_as_it_was() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = Snapshot(3)
    wrong = Masked(Masks({"none": torch.ones(2, 2, dtype=torch.bool)}))
    with pytest.raises(ArgumentError, match="none"):
        Attached([first, wrong], model, optimizer)
    first.attach(model, optimizer)  # it is free again
    nothing: list[Any] = []
    with pytest.raises(ArgumentError, match="at least one"):
        Attached(nothing, model, optimizer)


def test_two_adapters_on_one_optimizer_are_refused() -> None:
    model, optimizer, attached = begin("masks")
    with pytest.raises(ArgumentError, match="methods of another adapter"):
        Attached([Snapshot(3)], model, optimizer)
    attached.finish()
    Attached([Snapshot(3)], model, optimizer)
