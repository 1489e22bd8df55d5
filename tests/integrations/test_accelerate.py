"""Every method in a loop with Accelerate, and a resume to the same bits."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gossamer.core.errors import ArgumentError
from gossamer.integrations.accelerate import attach
from gossamer.integrations.attached import Attached
from integration_methods import FAMILIES, METHODS, same

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's


def begin(kind: str, prepared: bool) -> tuple:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    accelerator = accelerate.Accelerator(cpu=True)
    if prepared:
        model, optimizer = accelerator.prepare(net, optimizer)
        attached = attach(accelerator, METHODS[kind](net), model, optimizer)
    else:
        attached = attach(accelerator, METHODS[kind](net), net, optimizer)
        model, optimizer = accelerator.prepare(net, optimizer)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 4))
    return accelerator, net, model, optimizer, scheduler, attached


def loop(run: tuple, begin: int, end: int) -> None:
    accelerator, _, model, optimizer, scheduler, _ = run
    for step in range(begin, end):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 6, generator=g), torch.randint(0, 3, (8,), generator=g)
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("kind", "prepared"), [*((k, False) for k in METHODS), *((k, True) for k in FAMILIES)]
)
def test_a_resumed_run_is_the_unbroken_one(kind: str, prepared: bool, tmp_path: Path) -> None:
    whole = begin(kind, prepared)
    loop(whole, 0, 5)
    whole[0].save_state(str(tmp_path / "state"))
    loop(whole, 5, 12)
    whole[-1].finish()
    again = begin(kind, prepared)
    again[0].load_state(str(tmp_path / "state"))
    again[-1].check_resumed(5)
    loop(again, 5, 12)
    again[-1].finish()
    assert isinstance(again[-1], Attached)
    assert same(whole[1], again[1])


def test_parametrizing_a_wrapped_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Wrapped)
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    with pytest.raises(ArgumentError, match=r"LSQ puts parameters.*before accelerator\.prepare"):
        attach(accelerator, METHODS["lsq"](net), Wrapped(net), optimizer)
