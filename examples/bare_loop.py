"""The methods in anybody's training loop: no trainer, no recipe.

Prune a network by magnitude, retrain it with the removed weights held at zero, share what is left
among 31 values a layer, train those, and pack the file.
"""

import sys

import torch
from own_model import data, model
from torch import nn
from torch.nn import functional as F

import gossamer
from gossamer.core.names import weights
from gossamer.pack import pack


def loop(
    net: nn.Module, optimizer: torch.optim.Optimizer, split: gossamer.Split, epochs: int
) -> None:
    """Any loop that calls optimizer.step(): the methods hook that."""
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(split)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(split.inputs[batch]), split.targets[batch]).backward()
            optimizer.step()


net, digits = model(), data()
before = gossamer.evaluate(net, digits.test).accuracy

masks = gossamer.keep_top({name: w.abs() for name, w in weights(net).items()}, 0.25, scope="global")
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
pruned = gossamer.Masked(masks).attach(net, optimizer)
loop(net, optimizer, digits.train, epochs=6)
pruned.finish()

optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
shared = gossamer.SharedWeights(gossamer.share_model(net, bits=5)).attach(net, optimizer)
loop(net, optimizer, digits.train, epochs=2)
shared.finish()

with pack(net, sys.argv[1] if len(sys.argv) > 1 else "bare-loop.gsm") as archive:
    print(f"{archive.dense_bytes:,} -> {archive.file_bytes:,} bytes")
after = gossamer.evaluate(net, digits.test).accuracy
print(f"accuracy {before:.4f} -> {after:.4f}, density {masks.density:.2f}")
