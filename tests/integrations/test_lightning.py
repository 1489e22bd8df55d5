"""Every method in Lightning's Trainer, and a resume to the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from gossamer.core.errors import ArgumentError
from gossamer.core.method import Method
from integration_methods import FAMILIES, METHODS, same

lightning = pytest.importorskip("lightning")
from gossamer.integrations.lightning import MethodCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Stop(lightning.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError("stopped")


def run(folder: Path, callback: MethodCallback, module: Any, *, stop: int = 0) -> Any:
    torch.manual_seed(1)
    g = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(32, 6, generator=g), torch.randint(0, 3, (32,), generator=g))
    saves = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_last=True, every_n_epochs=1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[callback, saves, *([Stop(stop)] if stop else [])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    loader = DataLoader(data, batch_size=8, shuffle=True)
    trainer.fit(module, loader, ckpt_path=str(last) if last.exists() else None)
    return module


def fitted(folder: Path, kind: str, *, stop: int = 0) -> Any:
    module = Module()
    return run(folder, MethodCallback(METHODS[kind](module)), module, stop=stop)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_resumed_run_is_the_unbroken_one(kind: str, tmp_path: Path) -> None:
    whole = fitted(tmp_path / "a", kind)
    with pytest.raises(KeyError, match="stopped"):
        fitted(tmp_path / "b", kind, stop=6)
    again = fitted(tmp_path / "b", kind)
    assert same(whole, again)
    assert list(again.state_dict()) == list(Module().state_dict())  # plain tensors


def test_gradients_are_there_when_the_method_reads_them(tmp_path: Path) -> None:
    # Lightning runs backward inside optimizer.step
    class Seen(Method):
        def __init__(self) -> None:
            super().__init__()
            self.norms: list[tuple[float, float]] = []

        def _setup(self) -> None:
            pass

        def before_step(self) -> None:
            grad = self.model.net[0].weight.grad
            self.norms.append((float(self.model.drawn), float(grad.norm())))

    class Noted(Module):
        drawn = 0.0

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.drawn = float(self.net[0].weight.grad.norm())

    seen = Seen()
    run(tmp_path, MethodCallback([seen]), Noted())
    assert len(seen.norms) == 12
    assert all(noted == norm > 0 for noted, norm in seen.norms)


def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    module = Module()
    with pytest.raises(KeyError):
        run(tmp_path, MethodCallback(METHODS["masks"](module)), module, stop=6)
    path = tmp_path / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    for state in saved["optimizer_states"]:
        del state["gossamer"]
    torch.save(saved, path)
    module = Module()
    with pytest.raises(ArgumentError, match="holds none of methods"):
        run(tmp_path, MethodCallback(METHODS["masks"](module)), module)


def test_a_part_of_the_module_and_a_scheduler(tmp_path: Path) -> None:
    class Scheduled(Module):
        callback: MethodCallback

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            self.callback.attach(self, optimizer)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def begin() -> Any:
        module = Scheduled()
        methods = METHODS["ttq, a group of its own"](module.net)
        module.callback = MethodCallback(methods, model=module.net)
        return module

    module = begin()
    whole = run(tmp_path / "a", module.callback, module)
    module = begin()
    with pytest.raises(KeyError):
        run(tmp_path / "b", module.callback, module, stop=6)
    module = begin()
    assert same(whole, run(tmp_path / "b", module.callback, module))

    class Late(Scheduled):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    late = Late()
    callback = MethodCallback(METHODS["ttq, a group of its own"](late))
    with pytest.raises(ArgumentError, match="before the scheduler is made"):
        run(tmp_path / "c", callback, late)
