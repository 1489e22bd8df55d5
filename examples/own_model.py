"""A model of one's own, compressed unchanged: grouped convolution, residual add, tied weights.

Run it::

    python examples/own_model.py

or from the command line, where the functions below are named by file::

    gossamer compress --model examples/own_model.py:model --dataset examples/own_model.py:data \
        --recipe deep-compression --out runs/own
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer


class Net(nn.Module):
    """Nothing in it knows of the library."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(16)
        self.squeeze = nn.Linear(16 * 16, 64)
        self.mix = nn.Linear(64, 64)
        self.again = nn.Linear(64, 64)
        self.again.weight = self.mix.weight  # tied: stored once, compressed once
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.norm(self.grouped(x)))
        x = F.relu(self.squeeze(F.max_pool2d(x, 2).flatten(1)))
        x = x + F.relu(self.mix(x))
        x = x + F.relu(self.again(x))
        return self.head(x)


def data() -> gossamer.Dataset:
    """Three splits: train, validation for the choices, test for the two figures reported."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, validation, test = (
        gossamer.Split(images[part], labels[part]) for part in order.split([1200, 197, 400])
    )
    return gossamer.Dataset("my digits", train, validation, test, classes=10)


def model() -> nn.Module:
    """The model, trained by any loop; here a bare one."""
    torch.manual_seed(0)
    net, split = Net(), data().train
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    for _ in range(8):
        for batch in torch.randperm(len(split)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(split.inputs[batch]), split.targets[batch]).backward()
            optimizer.step()
    return net


if __name__ == "__main__":
    out = sys.argv[1] if len(sys.argv) > 1 else "runs/own-model"
    result = gossamer.compress(model(), data(), recipe="deep-compression", out=out)
    print(f"{result.dense_bytes:,} -> {result.bytes:,} bytes, {result.ratio:.1f}x smaller")
    print(f"accuracy {result.accuracy_before:.4f} -> {result.accuracy_after:.4f}")
    print(f"report   {result.report}")
