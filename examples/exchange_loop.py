"""Gradients of four bits in a loop of one's own: no DDP, one call before the optimizer's step.

torchrun --nproc-per-node 2 examples/exchange_loop.py
"""

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from gossamer.datasets import batches, load
from gossamer.distribute import Distributed, SQm, exchange
from gossamer.nets import build

dist.init_process_group("gloo")
group = Distributed(timeout=60)
digits = load("digits")
net = build("lenet-300-100", classes=10, in_shape=digits.in_shape, seed=0)  # alike on all ranks
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
share = digits.train.take(slice(group.rank, None, group.size))
step = 0
for epoch in range(5):
    for x, y in batches(share, 32, generator=torch.Generator().manual_seed(epoch)):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        exchange(net, SQm(4), group, step=step)
        optimizer.step()
        step += 1
if group.rank == 0:
    right = net(digits.test.inputs).argmax(1) == digits.test.targets
    print(f"accuracy {right.float().mean():.4f} after {step} steps of 4-bit gradients")
dist.destroy_process_group()
