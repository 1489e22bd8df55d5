"""A network as a run takes it: unwrapped, with plain weights, of the same function."""

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune

import gossamer
from gossamer.core.errors import ArgumentError
from gossamer.core.plain import copied, plain, unwrapped


def two(first: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(first(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 3)).eval()


def older(make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def made(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return make(layer)

    return made


DERIVED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "older weight norm": older(utils.weight_norm),
    "older spectral norm": older(utils.spectral_norm),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "pruned twice": lambda layer: prune.random_unstructured(
        prune.l1_unstructured(layer, "weight", 0.3), "weight", 0.3
    ),
}


@pytest.mark.parametrize("make", DERIVED.values(), ids=DERIVED)
def test_derived_weights_become_plain_ones_of_the_same_function(
    make: Callable[[nn.Module], nn.Module],
) -> None:
    net, x = two(make), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    before, names = net(x), list(net.state_dict())
    made, told = plain(copied(net))
    assert torch.equal(made(x), before)
    assert sorted(made.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert len(told) == 1
    assert "0: weight is taken as it is" in told[0]
    assert type(made[0]) is nn.Linear
    other = copy.deepcopy(made)  # no hook is left that saving or loading would fall over
    other.load_state_dict(made.state_dict())
    assert torch.equal(net(x), before)  # the user's own is what it was
    assert list(net.state_dict()) == names


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
def test_wrappers_are_taken_off_and_said() -> None:
    inner = two(lambda layer: layer)
    made, told = plain(nn.DataParallel(inner))
    assert made is inner
    assert told == ["DataParallel is left out: the network inside it is compressed"]
    part = nn.Sequential(torch.compile(nn.Linear(3, 3)), nn.ReLU())
    made, told = plain(part)
    assert list(made.state_dict()) == ["0.weight", "0.bias"]
    assert told == ["0 is unwrapped (OptimizedModule)"]
    made, told = plain(torch.compile(inner))
    assert made is inner
    assert len(told) == 1
    # a submodule that is really called "module" is no wrapper
    own = nn.ModuleDict({"module": nn.Linear(2, 2)})
    assert list(plain(own)[0].state_dict()) == ["module.weight", "module.bias"]


def test_a_network_of_a_process_group_is_unwrapped_before_it_is_copied(tmp_path: Path) -> None:
    inner = two(lambda layer: layer)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(inner)
        assert unwrapped(wrapped)[0] is inner
        digits = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        wrapped = nn.parallel.DistributedDataParallel(digits)
        stages = [{"prune": {"density": 0.5}}, {"evaluate": {"latency": False}}]
        result = gossamer.compress(
            wrapped,
            "digits",
            recipe={"name": "t", "max_drop": 1, "stages": stages},
            out=tmp_path / "r",
        )
    finally:
        distributed.destroy_process_group()
    assert list(result.model.state_dict()) == ["1.weight", "1.bias"]
    assert result.run["notes"][0].startswith("DistributedDataParallel is left out")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_by_name() -> None:
    net = two(lambda layer: layer)
    with pytest.raises(ArgumentError, match=r"TorchScript.*nn\.Module that it was made from"):
        plain(torch.jit.trace(net, torch.zeros(1, 6)))
    with pytest.raises(ArgumentError, match="0 is TorchScript"):
        plain(nn.Sequential(torch.jit.trace(net, torch.zeros(1, 6))))


def test_what_cannot_be_copied_is_refused_with_the_reason() -> None:
    class Locked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.lock = threading.Lock()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    with pytest.raises(ArgumentError, match=r"Locked cannot be copied \(TypeError: .*lock"):
        copied(Locked())


def test_a_lightning_module_without_a_forward_is_a_wrapper() -> None:
    base = type("LightningModule", (nn.Module,), {"__module__": "lightning.pytorch.core.module"})

    class Task(base):  # type: ignore[misc, valid-type]
        def __init__(self, *networks: nn.Module) -> None:
            super().__init__()
            self.networks, self.loss = nn.ModuleList(networks), nn.CrossEntropyLoss()

    inner = two(lambda layer: layer)
    task = Task(inner)
    task.networks = inner
    found, told = unwrapped(task)
    assert found is inner
    assert told == ["Task is left out: the network inside it is compressed"]
    task.second = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="Task is a LightningModule without a forward"):
        unwrapped(task)

    class Own(Task):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.networks(x)

    whole = Own(inner)
    whole.networks = inner
    assert unwrapped(whole) == (whole, [])


def test_parts_keep_the_mode_that_they_are_in() -> None:
    net = two(parametrizations.weight_norm).train()
    net[1].eval()
    net[2].eval()
    made, _ = plain(copied(net))
    assert [m.training for m in made] == [True, False, False]
