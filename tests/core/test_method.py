import copy

import pytest
import torch
from torch import nn

from gossamer.core.errors import ArgumentError
from gossamer.core.hooks import OptimizerWarning
from gossamer.core.masks import Masks
from gossamer.core.method import Masked, Method


class Counting(Method):
    """Records when its hooks run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def _setup(self) -> None:
        if not list(self.model.parameters()):
            raise ArgumentError("nothing to do")

    def before_step(self) -> None:
        self.calls.append("before")

    def after_step(self) -> None:
        self.calls.append("after")


def layer() -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Linear(2, 2, bias=False)
    return net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.ones(1, 2)).square().sum().backward()
    optimizer.step()


def test_hooks_run_around_each_step_until_detached() -> None:
    net, optimizer = layer()
    method = Counting().attach(net, optimizer)
    step(net, optimizer)
    step(net, optimizer)
    assert method.calls == ["before", "after"] * 2
    method.detach()
    step(net, optimizer)
    assert len(method.calls) == 4
    method.attach(net, optimizer)
    step(net, optimizer)
    assert method.calls[4:] == ["before", "after"]


def test_a_refused_attach_leaves_no_hook_and_can_be_repeated() -> None:
    net, optimizer = layer()
    method = Counting()
    with pytest.raises(ArgumentError, match="nothing to do"):
        method.attach(nn.Identity(), optimizer)
    step(net, optimizer)
    assert method.calls == []
    method.attach(net, optimizer)
    step(net, optimizer)
    assert method.calls == ["before", "after"]


def test_masks_are_checked_before_any_weight_is_touched() -> None:
    net, optimizer = layer()
    before = net.weight.detach().clone()
    masks = Masks({"weight": torch.zeros(2, 2).bool(), "bias": torch.zeros(2).bool()})
    with pytest.raises(ArgumentError, match="'bias' has no parameter"):
        Masked(masks).attach(net, optimizer)
    assert torch.equal(net.weight, before)


KEEP = torch.tensor([[True, False], [False, True]])


def test_masked_trains_like_the_free_network_where_rows_do_not_meet() -> None:
    net, optimizer = layer()
    Masked(Masks({"weight": KEEP})).attach(net, optimizer)
    free, other = layer()
    with torch.no_grad():
        free.weight.masked_fill_(~KEEP, 0)
    step(net, optimizer)
    step(free, other)
    # one step from the same weights: the kept ones move alike, the removed ones not at all
    assert torch.equal(net.weight[KEEP], free.weight[KEEP])
    assert (net.weight[~KEEP] == 0).all()
    assert (free.weight[~KEEP] != 0).all()


@pytest.mark.parametrize("gradients", [True, False])
def test_gradients_stay_dense_when_asked(gradients: bool) -> None:
    net, optimizer = layer()
    Masked(Masks({"weight": KEEP}), mask_gradients=gradients).attach(net, optimizer)
    step(net, optimizer)
    assert net.weight.grad is not None
    assert bool((net.weight.grad[~KEEP] == 0).all()) is gradients
    assert (net.weight[~KEEP] == 0).all()


def test_a_weight_that_left_the_mask_by_hand_is_zeroed_at_the_next_step() -> None:
    net, optimizer = layer()
    Masked(Masks({"weight": KEEP})).attach(net, optimizer)
    with torch.no_grad():
        net.weight.fill_(float("nan"))
        net.weight[KEEP] = 1.0
    optimizer.step()
    assert (net.weight[~KEEP] == 0).all()
    assert torch.isfinite(net.weight).all()


def test_loaded_masks_apply_at_once_when_attached_and_later_when_not() -> None:
    state = Masked(Masks({"weight": KEEP})).state_dict()
    net, optimizer = layer()
    method = Masked(Masks({"weight": torch.ones(2, 2).bool()})).attach(net, optimizer)
    method.load_state_dict(state)
    assert (net.weight[~KEEP] == 0).all()
    assert torch.equal(method.masks["weight"], KEEP)
    other, _ = layer()
    waiting = Masked(Masks())
    waiting.load_state_dict(state)
    waiting.attach(other)
    assert torch.equal(other.weight, net.weight)


def test_a_deep_copy_is_plain_and_free() -> None:
    net, optimizer = layer()
    Masked(Masks({"weight": KEEP})).attach(net, optimizer)
    twin = copy.deepcopy(net)
    step(twin, torch.optim.SGD(twin.parameters(), 0.1))
    assert (twin.weight[~KEEP] != 0).all()
    assert (net.weight[~KEEP] == 0).all()


def test_finish_leaves_the_zeros_and_no_hook() -> None:
    net, optimizer = layer()
    Masked(Masks({"weight": KEEP})).attach(net, optimizer).finish()
    assert (net.weight[~KEEP] == 0).all()
    with pytest.warns(OptimizerWarning, match="after Masked.finish"):
        step(net, optimizer)
    assert (net.weight[~KEEP] != 0).all()
