"""What the training loop costs over a bare hand-written one: LeNet-300-100, batch 60, one thread.

    python benchmarks/training.py [--rounds 7] [--epochs 1] [--optimizer adam]

The two run in turn on the same tensors, in a fresh order each round; printed are the medians, the
ratio of the medians, and the ratios' spread over the rounds. The bare loop trains and nothing else;
train() also evaluates 5,000 validation images, keeps its rows and checks the loss.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from gossamer import datasets, nets
from gossamer.training import TrainConfig, train


def bare(model, split, config):
    """The loop anyone would write first."""
    if config.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    inputs, targets = split.inputs, split.targets
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(config.epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for part in order.split(config.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[part]), targets[part]).backward()
            optimizer.step()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--optimizer", default="adam", choices=["adam", "sgd"])
    parser.add_argument("--net", default="lenet-300-100")
    parser.add_argument("--subset", type=int, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = datasets.load("mnist", subset=options.subset)
    config = TrainConfig(
        epochs=options.epochs, batch_size=60, lr=1.2e-3, optimizer=options.optimizer
    )

    def ours():
        train(nets.build(options.net, seed=0), data, config)

    def saving():
        with tempfile.TemporaryDirectory() as folder:
            train(
                nets.build(options.net, seed=0),
                data,
                config,
                checkpoint=Path(folder) / "c.pt",
                metrics=Path(folder) / "m.jsonl",
                progress=lambda _: None,
            )

    runs = {
        "bare loop": lambda: bare(nets.build(options.net, seed=0), data.train, config),
        "train()": ours,
        "train(), checkpoint, metrics, progress": saving,
    }
    seconds = {name: [] for name in runs}
    for i in range(options.rounds + 1):
        for name in random.sample(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    base = seconds["bare loop"]
    for name, taken in seconds.items():
        ratios = sorted(a / b for a, b in zip(taken, base, strict=True))
        print(
            f"{name:40} {statistics.median(taken):7.3f} s   "
            f"{statistics.median(taken) / statistics.median(base):5.2f}x "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
