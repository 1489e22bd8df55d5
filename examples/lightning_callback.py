"""Trained ternary weights in Lightning: the digits, two bits a weight.

Killed at any moment, the same command goes on from the last epoch, to the same bits::

    python examples/lightning_callback.py runs/lightning --stop-after-step 100
    python examples/lightning_callback.py runs/lightning
"""

import argparse
import os
import signal
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from gossamer import TTQ, evaluate
from gossamer.datasets import load
from gossamer.integrations.lightning import MethodCallback
from gossamer.pack import pack


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 96),
            nn.ReLU(),
            nn.Linear(96, 96),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(96, 10),
        )

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        return cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Kill(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


parser = argparse.ArgumentParser()
parser.add_argument("out", nargs="?", default="runs/lightning-callback", type=Path)
parser.add_argument("--stop-after-step", type=int)
options = parser.parse_args()

lightning.seed_everything(0, verbose=False)
digits = load("digits")
model = Classifier()
ternary = TTQ(density=0.5, start="fit", weight_decay=0.0, every=20, ends=True)
callbacks = [
    MethodCallback([ternary]),
    ModelCheckpoint(options.out, save_last=True, every_n_epochs=1),
]
if options.stop_after_step:
    callbacks.append(Kill(options.stop_after_step))
trainer = lightning.Trainer(
    accelerator="cpu",
    max_epochs=6,
    callbacks=callbacks,
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
data = TensorDataset(digits.train.inputs, digits.train.targets)
last = options.out / "last.ckpt"
trainer.fit(
    model,
    DataLoader(data, batch_size=32, shuffle=True),
    ckpt_path=str(last) if last.exists() else None,
)

with pack(model.net, options.out / "model.gsm") as archive:
    accuracy = evaluate(model.net, digits.test).accuracy
    print(f"accuracy {accuracy:.4f}, {archive.dense_bytes:,} -> {archive.file_bytes:,} bytes")
