"""Ternary gradients in Accelerate: one line after ``prepare``.

torchrun --nproc-per-node 2 examples/exchange_accelerate.py
"""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from gossamer.datasets import load
from gossamer.distribute import GradientExchange, TernGrad, exchange_hook
from gossamer.nets import build

accelerator = Accelerator(cpu=True)
digits = load("digits")
net = build("lenet-300-100", classes=10, in_shape=digits.in_shape, seed=0)
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
data = TensorDataset(digits.train.inputs, digits.train.targets)
model, optimizer, loader = accelerator.prepare(
    net, optimizer, DataLoader(data, batch_size=32, shuffle=True)
)
state = GradientExchange(net, TernGrad())
model.register_comm_hook(state, exchange_hook)  # the one line more

for _ in range(5):
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()
right = net(digits.test.inputs).argmax(1) == digits.test.targets
accelerator.print(
    f"accuracy {right.float().mean():.4f} after {state.step} steps of ternary gradients"
)
state.close()
accelerator.end_training()
