"""Pruned, on a grid and under a price for every bit, in a loop with Accelerate.

Killed at any moment, the same command goes on from the last epoch, to the same bits::

    python examples/accelerate_loop.py runs/accelerate --stop-after-step 100
    python examples/accelerate_loop.py runs/accelerate

On several workers: ``accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py``.
"""

import argparse
import os
import shutil
import signal
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from gossamer import Masked, evaluate
from gossamer.core.names import weights
from gossamer.datasets import load
from gossamer.integrations.accelerate import attach
from gossamer.nets import build
from gossamer.pack import pack
from gossamer.prune import prune
from gossamer.quantize import RateAware

EPOCHS = 6

parser = argparse.ArgumentParser()
parser.add_argument("out", nargs="?", default="runs/accelerate-loop", type=Path)
parser.add_argument("--stop-after-step", type=int)
options = parser.parse_args()

set_seed(0)
accelerator = Accelerator(
    cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
)
digits = load("digits")
net = build("lenet-300-100", classes=10, in_shape=digits.in_shape, seed=0)
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
masks = prune(net, 0.2)
methods = attach(
    accelerator,
    [Masked(masks), RateAware.relative(net, step=0.5, lam=2e-6, ramp=100, masks=masks)],
    net,
    optimizer,
)
loader = DataLoader(
    TensorDataset(digits.train.inputs, digits.train.targets), batch_size=32, shuffle=True
)
model, optimizer, loader = accelerator.prepare(net, optimizer, loader)


def save(epoch: int) -> None:
    """A folder gets its name when it is whole, from one of the processes."""
    new = options.out / "new"
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        new.rename(options.out / f"epoch-{epoch}")


done = {int(p.name[6:]): p for p in options.out.glob("epoch-*")}
begin = max(done, default=0)
if done:
    accelerator.load_state(str(done[begin]))
step = begin * len(loader)
for epoch in range(begin, EPOCHS):
    loader.set_epoch(epoch)
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()
        step += 1
        if step == options.stop_after_step:
            os.kill(os.getpid(), signal.SIGKILL)
    save(epoch + 1)
methods.finish()

if accelerator.is_main_process:
    density = sum(int(w.count_nonzero()) for w in weights(net).values()) / sum(
        w.numel() for w in weights(net).values()
    )
    with pack(net, options.out / "model.gsm") as archive:
        accuracy = evaluate(net, digits.test).accuracy
        print(
            f"accuracy {accuracy:.4f} at density {density:.2f}, "
            f"{archive.dense_bytes:,} -> {archive.file_bytes:,} bytes"
        )
