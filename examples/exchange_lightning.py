"""Ternary gradients in Lightning: its DDP strategy takes the hook and its state.

python examples/exchange_lightning.py
"""

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from gossamer.datasets import load
from gossamer.distribute import GradientExchange, TernGrad, exchange_hook
from gossamer.nets import build


class Classifier(lightning.LightningModule):
    def __init__(self, in_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net = build("lenet-300-100", classes=10, in_shape=in_shape, seed=0)
        self.exchange = GradientExchange(self, TernGrad())

    def on_train_start(self) -> None:
        self.trainer.strategy.model.register_comm_hook(self.exchange, exchange_hook)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        return cross_entropy(self.net(x), y)

    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


if __name__ == "__main__":
    digits = load("digits")
    model = Classifier(digits.in_shape)
    trainer = lightning.Trainer(
        strategy="ddp",
        accelerator="cpu",
        devices=2,
        max_epochs=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train, test = (
        DataLoader(TensorDataset(s.inputs, s.targets), batch_size=32, shuffle=s is digits.train)
        for s in (digits.train, digits.test)
    )
    trainer.fit(model, train)
    trainer.test(model, test, verbose=False)
    if trainer.is_global_zero:
        accuracy = float(trainer.callback_metrics["accuracy"])
        print(f"accuracy {accuracy:.4f} after {model.exchange.step} steps of ternary gradients")
