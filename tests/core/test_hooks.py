"""Optimizers that methods did not expect: a second one, a scaler's, a wrapped one."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from gossamer.core import hooks
from gossamer.core.errors import ArgumentError
from gossamer.core.hooks import OptimizerWarning
from gossamer.core.masks import Masks
from gossamer.core.method import Masked, Method
from gossamer.prune.dynamic import FAMILY, DynamicSparse
from gossamer.prune.supermask import Supermask
from gossamer.quantize import share_model
from gossamer.quantize.fixed_training import FixedWeights
from gossamer.quantize.loss_aware import LossAware
from gossamer.quantize.lsq import LSQ
from gossamer.quantize.projected import Projected
from gossamer.quantize.rate_aware import RateAware
from gossamer.quantize.shared import SharedWeights
from gossamer.quantize.ttq import TTQ

Make = Callable[[nn.Module], Method]
MAKE: dict[str, Make] = {
    "masked": lambda m: Masked(Masks({"0.weight": torch.eye(6, 4).bool()})),
    "rate aware": lambda m: RateAware(
        {"0.weight": 0.1}, lam=0.01, masks=Masks({"0.weight": torch.eye(6, 4).bool()})
    ),
    "shared": lambda m: SharedWeights(share_model(m, bits=2, init="uniform")),
    "supermask": lambda m: Supermask(generator=torch.Generator().manual_seed(3), rescale=False),
    "ttq": lambda m: TTQ(threshold=0.05, start="fit", weight_decay=None, every=3, ends=True),
    "lsq": lambda m: LSQ(bits=3, weight_decay=None, ends=True),
    "projected": lambda m: Projected("twn", clip=0.5, ends=True),
    "fixed point": lambda m: FixedWeights(4, every=2),
    "loss aware": lambda m: LossAware("lab", beta=0.9, clip=None, ends=True),
    **{
        name: lambda m, rule=rule: DynamicSparse(
            rule, 0.5, steps=12, every=3, generator=torch.Generator().manual_seed(0)
        )
        for name, rule in FAMILY.items()
    },
}
every_method = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def back(model: nn.Module, optimizer: torch.optim.Optimizer, i: int = 0) -> torch.Tensor:
    optimizer.zero_grad()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(i))
    loss: torch.Tensor = model(x).square().mean()
    return loss


def step(model: nn.Module, optimizer: torch.optim.Optimizer, i: int = 0) -> None:
    back(model, optimizer, i).backward()
    optimizer.step()


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), 0.1, **{"momentum": 0.9, **options})


def test_a_second_optimizer_revives_nothing_and_its_buffers_are_held_too() -> None:
    model = net()
    first, second = sgd(model), torch.optim.Adam(model.parameters(), 0.1)
    method = Masked(Masks({"0.weight": torch.eye(6, 4).bool()})).attach(model, first)
    away = ~torch.eye(6, 4).bool()
    for i in range(4):
        step(model, first if i % 2 else second, i)
        assert not model[0].weight[away].any()
    assert not second.state[model[0].weight]["exp_avg"][away].any()
    assert model[0].weight[~away].all()
    method.finish()
    with pytest.warns(OptimizerWarning, match=r"Masked.finish\(\) has moved 20 weights"):
        step(model, second)
    step(model, second)  # once


@pytest.mark.parametrize("rule", FAMILY.values(), ids=FAMILY.keys())
def test_dynamic_masks_hold_against_a_second_optimizer_whose_steps_do_not_count(
    rule: Any,
) -> None:
    model = net()
    first, second = sgd(model), sgd(model)
    method = DynamicSparse(
        rule, 0.3, steps=12, every=2, generator=torch.Generator().manual_seed(0)
    ).attach(model, first)
    for i in range(6):
        step(model, second if i % 3 else first, i)
        for name, mask in method.masks.items():
            assert not model.get_parameter(name)[~mask].any()
    assert method.step == 2


@every_method
def test_a_step_of_another_optimizer_leaves_what_the_methods_own_would(make: Make) -> None:
    model = net()
    method = make(model)
    method.attach(model, sgd(model))
    other = sgd(model)  # made afterwards: it holds what the method has put there
    for i in range(3):
        step(model, other, i)
    before = model[0].weight.detach().clone()
    if hasattr(method, "refresh"):
        method.refresh()
    assert torch.equal(model[0].weight.detach(), before)
    x = torch.ones(1, 4)
    out = model(x).detach()
    method.finish()
    torch.testing.assert_close(model(x).detach(), out)


@pytest.mark.parametrize("name", ["ttq", "lsq", "projected", "shared", "supermask", "fixed point"])
def test_an_optimizer_that_trains_replaced_weights_is_warned_of_once(name: str) -> None:
    model = net()
    first, second = sgd(model), sgd(model)
    MAKE[name](model).attach(model, first)
    with pytest.warns(OptimizerWarning, match="make the optimizer after .* is attached"):
        step(model, second)
    step(model, second)


@pytest.mark.parametrize("make", [MAKE[n] for n in MAKE if n != "sparse-momentum"])
def test_without_an_optimizer_the_hooks_called_by_hand_do_what_an_attached_one_does(
    make: Make,
) -> None:
    left = []
    for by_hand in (False, True):
        model = net()
        method, attached = make(model), sgd(model)
        method.attach(model, None if by_hand else attached)
        optimizer = sgd(model) if by_hand else attached
        for i in range(7):
            back(model, optimizer, i).backward()
            if by_hand:
                method.before_step()
            optimizer.step()
            if by_hand:
                method.after_step()
        method.finish()
        left.append({name: p.detach() for name, p in model.named_parameters()})
    for name, value in left[0].items():
        torch.testing.assert_close(left[1][name], value, msg=name)


def test_without_an_optimizer_any_step_is_seen() -> None:
    model = net()
    first, second = sgd(model), sgd(model)
    method = Masked(Masks({"0.weight": torch.eye(6, 4).bool()})).attach(model)
    for optimizer in (first, second):
        step(model, optimizer)
        assert not model[0].weight[~torch.eye(6, 4).bool()].any()
    method.finish()
    with pytest.warns(OptimizerWarning, match="has moved 20 weights"):
        step(model, first)
    model = net()
    made_before = sgd(model)
    quantizer = LSQ(bits=3, weight_decay=None, ends=True).attach(model)
    with pytest.warns(OptimizerWarning, match="SGD, which LSQ was not attached to"):
        step(model, made_before)
    quantizer.finish()


def test_optimizers_over_other_parameters_are_left_alone() -> None:
    model = net()
    method = Masked(Masks({"0.weight": torch.eye(6, 4).bool()})).attach(model, sgd(model))
    with torch.no_grad():
        model[0].weight.fill_(1)  # by hand: held at the next step that moves it
    other = torch.optim.SGD(model[2].parameters(), 0.1)
    step(model, other)
    assert model[0].weight.all()
    method.detach()


def hooked() -> int:
    return len(torch_optimizer._global_optimizer_post_hooks)


def swept() -> int:
    """Hooks that are alive: those of other tests' methods are gone by the next attach."""
    gc.collect()
    model = net()
    Masked(Masks({"0.weight": torch.eye(6, 4).bool()})).attach(model, sgd(model)).detach()
    return hooked()


@every_method
def test_no_global_hook_stays(make: Make) -> None:
    before = swept()
    model = net()
    optimizer = sgd(model)
    method = make(model).attach(model, optimizer)
    assert hooked() == before + 1
    method.detach()
    assert hooked() == before
    method.attach(model, optimizer)
    copy.deepcopy(method).detach()  # a copy is attached to nothing
    assert hooked() == before + 1
    method.finish()
    assert hooked() == before
    other = make(net()).attach(net())  # without an optimizer: it sees those of others
    assert hooked() == before + 1
    other.detach()
    assert hooked() == before


def test_a_method_that_nobody_holds_takes_its_hook_along() -> None:
    before = swept()
    model = net()
    method: Any = Masked(Masks({"0.weight": torch.eye(6, 4).bool()})).attach(model, sgd(model))
    assert hooked() == before + 1
    del method
    model = net()
    gc.collect()  # not at once: torch may be going through its hooks
    optimizer = sgd(model)
    method = Masked(Masks({"0.weight": torch.eye(6, 4).bool()})).attach(model, optimizer)
    assert hooked() == before + 1
    method.detach()
    assert hooked() == before


def test_methods_may_die_while_hooks_run() -> None:
    made: list[Any] = []

    def hook(*_: Any) -> None:
        made.clear()
        gc.collect()

    model = net()
    optimizer = sgd(model)
    for _ in range(3):
        other = net()
        made.append(Masked(Masks({"0.weight": torch.eye(6, 4).bool()})).attach(other, sgd(other)))
        del other
    optimizer.register_step_post_hook(hook)
    method = held(model, optimizer)
    step(model, optimizer)
    assert not model[0].weight[~torch.eye(6, 4).bool()].any()
    method.finish()
    optimizer.register_step_post_hook(hook)
    with pytest.warns(OptimizerWarning):
        step(model, optimizer)


def held(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> Masked:
    method = Masked(Masks({"0.weight": torch.eye(6, 4).bool()})).attach(model, optimizer)
    step(model, optimizer)
    return method


def test_what_goes_on_well_after_finish_is_not_warned_of() -> None:
    model = net()
    held(model, sgd(model)).finish()
    step(model, sgd(model))  # a new optimizer: on purpose
    model = net()
    optimizer = sgd(model)
    held(model, optimizer).finish()
    again = held(model, optimizer)  # held again
    again.detach()
    step(model, optimizer)  # let go
    model = net()
    optimizer = sgd(model)
    held(model, optimizer).finish()
    with torch.no_grad():
        model[0].weight.add_(1)  # other weights loaded: nothing to move away
    step(model, optimizer)
    model = net()
    optimizer = sgd(model, momentum=0)
    held(model, optimizer).finish()
    model[0].weight.requires_grad_(False)  # frozen: the step moves nothing
    step(model, optimizer)


@pytest.mark.parametrize("name", ["rate aware", "supermask", "rigl"])
def test_others_that_leave_zeros_warn_too(name: str) -> None:
    model = net()
    optimizer = sgd(model)
    method = MAKE[name](model).attach(model, optimizer)
    step(model, optimizer)
    method.finish()
    with pytest.warns(OptimizerWarning, match=rf"{type(method).__name__}.finish\(\) has moved"):
        step(model, optimizer)


class Counting(Method):
    """Keeps the gradient that ``before_step`` sees; counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.seen: list[float] = []

    def _setup(self) -> None: ...

    def before_step(self) -> None:
        self.calls.append("before")
        self.seen.append(float(self.model[0].weight.grad[0, 0]))  # type: ignore[index]

    def after_step(self) -> None:
        self.calls.append("after")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_steps_that_a_scaler_skips_do_not_count_and_gradients_are_unscaled(
    kind: Any, fused: bool
) -> None:
    plain, model = net(), net()
    optimizer = kind(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    one, two = Counting().attach(model, optimizer), Counting().attach(model, optimizer)
    other = kind(plain.parameters(), 0.1, fused=fused)
    seen = []
    for i in range(6):
        loss = back(model, optimizer, i)
        if i in (0, 3):
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        if i in (0, 3):
            assert torch.equal(model[0].weight, before)
            continue
        back(plain, other, i).backward()
        seen.append(float(plain[0].weight.grad[0, 0]))  # type: ignore[index]
        other.step()
        assert torch.equal(model[0].weight, plain[0].weight)
    assert one.calls == ["before", "after"] * 4
    assert one.seen == seen == two.seen


@every_method
def test_a_fused_optimizer_under_a_scaler_trains_the_same_as_without(make: Make) -> None:
    nets = []
    for scaled in (False, True):
        model = net()
        method = make(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
        method.attach(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for i in range(7):
            for bad in (True, False) if scaled and i % 2 else (False,):
                loss = back(model, optimizer, i)
                scaler.scale(loss * float("inf") if bad else loss).backward()
                scaler.step(optimizer)
                scaler.update()
        nets.append((model, method))
    (a, first), (b, second) = nets
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name
    assert first.state_dict().get("step") == second.state_dict().get("step")


class Wrapper:
    """As wrappers of other libraries are: it passes things on, and has no hooks."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.optimizer.step()


class Subclass(torch.optim.Optimizer):
    """A wrapper that calls itself an optimizer and was never initialised as one."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "plain": Wrapper,
    "subclass": Subclass,
    "nested": lambda o: Wrapper(Subclass(o)),
}


@every_method
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_wrapped_optimizer_is_as_good_as_its_own(make: Make, wrap: Callable[[Any], Any]) -> None:
    nets = []
    for outer in (wrap, lambda o: o):
        model = net()
        method = make(model)
        inner = sgd(model)
        wrapped = outer(inner)
        method.attach(model, wrapped)
        assert method.optimizer is inner
        for i in range(4):
            step(model, wrapped, i)
        nets.append(model)
        method.finish()
    assert torch.equal(nets[0][0].weight, nets[1][0].weight)


def test_a_wrapper_with_a_step_of_its_own_is_hooked_itself() -> None:
    class Twice(torch.optim.SGD):
        """An initialised optimizer: its own step is the one that counts."""

        optimizer: Any = None

    model = net()
    made = Twice(model.parameters(), 0.1)
    made.optimizer = sgd(model)
    assert hooks.unwrap(made) is made


@pytest.mark.parametrize("wrong", [[], "adam", Wrapper(None), Wrapper(3), torch.nn.Linear(1, 1)])
def test_what_is_no_optimizer_is_refused_by_name(wrong: Any) -> None:
    model = net()
    before = model[0].weight.detach().clone()
    with pytest.raises(ArgumentError, match=r"optimizer is .*neither a torch.optim.Optimizer"):
        Masked(Masks({"0.weight": torch.eye(6, 4).bool()})).attach(model, wrong)
    assert torch.equal(model[0].weight, before)


def test_a_wrapper_around_itself_is_refused() -> None:
    wrong = Wrapper(None)
    wrong.optimizer = wrong
    with pytest.raises(ArgumentError, match="nor a wrapper"):
        hooks.unwrap(wrong)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closures_gradients_are_there_before_the_step(by_name: bool) -> None:
    class Seen(Method):
        def __init__(self) -> None:
            super().__init__()
            self.order: list[Any] = []

        def _setup(self) -> None:
            pass

        def before_step(self) -> None:
            self.order.append(("before", float(self.model[0].weight.grad.sum())))  # type: ignore

        def after_step(self) -> None:
            self.order.append("after")

    model = net()
    optimizer = sgd(model)
    seen, later = Seen().attach(model, optimizer), Seen().attach(model, optimizer)
    later.order = seen.order
    expected: list[Any] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        expected.extend(2 * [("before", float(model[0].weight.grad.sum()))])  # type: ignore
        return loss

    for _ in range(2):
        loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert loss > 0
        expected += ["after", "after"]
    assert seen.order == expected
    before = model[0].weight.detach().clone()  # type: ignore
    torch.optim.LBFGS(model.parameters(), max_iter=2).step(closure)  # another one: as before
    assert not torch.equal(model[0].weight, before)  # type: ignore
