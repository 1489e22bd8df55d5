"""What every method must do. A new method joins with one row of METHODS."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.layer_groups import layer_groups
from gossamer.core.method import Masked, Method, Snapshot
from gossamer.core.quantizer import Trajectory
from gossamer.prune import Supermask, prune
from gossamer.prune.dynamic import FAMILY, DynamicSparse
from gossamer.quantize import (
    LSQ,
    TTQ,
    FixedWeights,
    LossAware,
    Projected,
    RateAware,
    SetPoint,
    SharedWeights,
    loss_aware,
    projected,
    share_model,
)
from gossamer.structure import GroupLasso, group_lasso

METHODS: dict[str, Callable[[nn.Module], Method]] = {
    "masked": lambda model: Masked(prune(model, 0.3)),
    "masked, dense gradients": lambda model: Masked(
        prune(model, 0.3), mask_gradients=False, mask_buffers=False
    ),
    "held": lambda model: Masked(
        prune(model, 0.3), values={n: w.detach().clone() for n, w in names.weights(model).items()}
    ),
    "snapshot": lambda model: Snapshot(3),
    "trajectory": lambda model: Trajectory([], every=2),
    "shared": lambda model: SharedWeights(share_model(model, bits=3)),
    "shared grid": lambda model: SharedWeights(
        share_model(model, bits=3, init="uniform"), grid=True
    ),
    **{
        f"group lasso, {form}": lambda model, form=form: GroupLasso(
            layer_groups(model, "depth"), 0.01, form=form, sized=form == "smooth"
        )
        for form in group_lasso.FORMS
    },
    "rate aware": lambda model: RateAware.relative(model, step=0.3, lam=1e-4),
    "rate aware, to a size": lambda model: RateAware.relative(
        model, step=0.3, lam=1e-4, control=SetPoint(40, lambda: 60, steps=20)
    ),
    **{
        name: lambda model, rule=rule: DynamicSparse(
            rule, 0.5, steps=20, every=3, generator=torch.Generator().manual_seed(0)
        )
        for name, rule in FAMILY.items()
    },
    "supermask": lambda model: Supermask(generator=torch.Generator().manual_seed(3), rescale=False),
    "supermask, rescaled": lambda model: Supermask(
        generator=torch.Generator().manual_seed(3), rescale=True
    ),
    "ttq": lambda model: TTQ(threshold=0.05, start="ones", weight_decay=0.0, every=3, ends=True),
    "ttq, fixed density": lambda model: TTQ(
        density=0.6, start="fit", weight_decay=None, every=3, ends=True
    ),
    "ttq, slow scales": lambda model: TTQ(
        threshold=0.05, start="fit", weight_decay=0.0, lr_factor=0.01, every=3, ends=True
    ),
    "fixed point": lambda model: FixedWeights(4, every=None),
    "fixed point, lengths anew": lambda model: FixedWeights(3, every=2),
    "lsq": lambda model: LSQ(bits=3, weight_decay=0.0, ends=True),
    **{
        name: lambda model, name=name: Projected(
            name,
            clip=1.0 if name.startswith("binaryconnect") else None,
            generator=torch.Generator().manual_seed(3) if "stochastic" in name else None,
            ends=True,
        )
        for name in projected.PROJECTIONS
        if name not in ("dorefa-3", "dorefa-5", "dorefa-6", "dorefa-7")  # as 2, 4 and 8
    },
    **{
        name: lambda model, rule=rule: LossAware(rule, beta=0.9, clip=None, ends=True)
        for name, rule in loss_aware.PROJECTIONS.items()
    },
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda m: torch.optim.Adam(m.parameters(), 1e-2, weight_decay=1e-3),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())
every_optimizer = pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(8, 1, 4, 4, generator=g), torch.randint(0, 3, (8,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


Make = Callable[[nn.Module], Method]
Optim = Callable[[nn.Module], torch.optim.Optimizer]


@every_method
@every_optimizer
def test_works_in_a_bare_loop_and_leaves_plain_tensors(make: Make, optim: Optim) -> None:
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = optim(model)
    method = make(model).attach(model, optimizer)
    loop(model, optimizer, 10)
    x = torch.randn(2, 1, 4, 4)
    seen = model(x)
    method.finish()
    assert torch.equal(model(x), seen)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(type(m).__module__.startswith("torch.nn.modules") for m in model)
    assert all(type(p) is nn.Parameter and p.is_leaf for p in after.values())
    assert any(not torch.equal(after[n], before[n]) for n in before)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in after.values()}


@every_method
def test_attaching_twice_is_refused(make: Make) -> None:
    model = net()
    method = make(model).attach(model)
    with pytest.raises(ArgumentError, match="attached already"):
        method.attach(model)


@every_method
@every_optimizer
def test_resume_gives_the_same_bits(make: Make, optim: Optim) -> None:
    def begin() -> tuple[nn.Module, Method, torch.optim.Optimizer]:
        model = net()
        optimizer = optim(model)
        return model, make(model).attach(model, optimizer), optimizer

    model, method, optimizer = begin()
    loop(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), method.state_dict()))
    loop(model, optimizer, 5, seed=2)
    again, resumed, other = begin()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    loop(again, other, 5, seed=2)
    method.finish()
    resumed.finish()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


ORDERS = ["amd", "adm", "dam", "mad", "mda", "dma"]  # attach, model and optimizer, method


@every_method
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_attaching_and_loading_gives_the_same_bits(make: Make, order: str) -> None:
    optim = OPTIMIZERS["adam"]
    model = net()
    optimizer = optim(model)
    method = make(model).attach(model, optimizer)
    loop(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), method.state_dict()))
    loop(model, optimizer, 5, seed=2)
    method.finish()
    again = net()
    other = optim(again)
    resumed = make(again)
    in_place = list(saved[0]) == list(again.state_dict())
    for step in order:
        if step == "a":
            resumed.attach(again, other)
        elif step == "d":
            resumed.load_state_dict(saved[2])
        elif in_place or order.index("a") < order.index("m"):
            again.load_state_dict(saved[0])
            other.load_state_dict(saved[1])
        else:  # the weights are computed from other parameters: torch says so
            with pytest.raises(RuntimeError, match="parametrizations"):
                again.load_state_dict(saved[0])
            return
    start = names.weights(again) if in_place else {}
    assert all(torch.equal(p, saved[0][name]) for name, p in start.items())
    loop(again, other, 5, seed=2)
    resumed.finish()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@every_method
def test_the_state_of_other_settings_is_refused(make: Make) -> None:
    model = net()
    method = make(model).attach(model)
    state = copy.deepcopy(method.state_dict())
    other = make(net())
    settings = other.settings()
    name = next(iter(settings))
    state["settings"] = {**settings, name: "of another"}
    with pytest.raises(ArgumentError, match=f"with {name}='of another', this one has {name}="):
        other.load_state_dict(state)
    del state["settings"]  # of an older version
    other.load_state_dict(state)


@every_method
def test_a_copy_has_the_same_settings(make: Make) -> None:
    method = make(net())
    assert copy.copy(method).settings() == method.settings()
    assert copy.deepcopy(method).settings() == method.settings() != {}


def test_a_setting_that_one_side_lacks_differs_even_if_it_is_none() -> None:
    state = Snapshot(3).state_dict()
    state["settings"]["later"] = None
    with pytest.raises(ArgumentError, match="with later=None"):
        Snapshot(3).load_state_dict(state)


def test_a_ternary_of_another_threshold_is_another_method() -> None:
    def ternary(threshold: float) -> Method:
        return TTQ(threshold=threshold, start="fit", weight_decay=None, every=3, ends=True)

    state = ternary(0.05).attach(net()).state_dict()
    ternary(0.05).load_state_dict(state)
    with pytest.raises(ArgumentError, match=r"threshold=0\.05, this one has threshold=0\.1"):
        ternary(0.1).load_state_dict(state)


def test_settings_tell_what_was_asked_for() -> None:
    def sparse(density: float, rule: str = "rigl") -> Method:
        generator = torch.Generator().manual_seed(0)
        return DynamicSparse(FAMILY[rule], density, steps=9, every=3, generator=generator)

    assert sparse(0.5).settings() == sparse(0.5).settings()
    assert sparse(0.5).settings() != sparse(0.05).settings()
    assert sparse(0.5).settings() != sparse(0.5, "set").settings()
    assert sparse(0.5).settings()["density"] == 0.5
    with pytest.raises(ArgumentError, match=r"density=0\.5, this one has density=0\.05"):
        sparse(0.05).load_state_dict(sparse(0.5).state_dict())


@every_method
def test_state_is_what_weights_only_loads(make: Make, tmp_path: object) -> None:
    model = net()
    method = make(model).attach(model)
    path = f"{tmp_path}/state.pt"
    torch.save({"model": model.state_dict(), "method": method.state_dict()}, path)
    found = torch.load(path, weights_only=True)
    assert set(found["method"]) == set(method.state_dict())


@every_method
def test_a_deep_copy_computes_the_same(make: Make) -> None:
    model = net()
    make(model).attach(model)
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("name", ["masked", "masked, dense gradients"])
@every_optimizer
def test_masked_weights_are_exactly_zero_after_many_steps(name: str, optim: Optim) -> None:
    model = net()
    optimizer = optim(model)
    method = METHODS[name](model)
    assert isinstance(method, Masked)
    method.attach(model, optimizer)
    loop(model, optimizer, 100)
    for weight, mask in method.masks.items():
        assert (names.parameters(model)[weight][~mask] == 0).all()
        assert (names.parameters(model)[weight][mask] != 0).any()
    if name == "masked":
        for weight, mask in method.masks.items():
            for value in optimizer.state[names.parameters(model)[weight]].values():
                if value.shape == mask.shape:
                    assert (value[~mask] == 0).all()
