"""Ternary gradients in DistributedDataParallel, in ten lines.

torchrun --nproc-per-node 2 examples/exchange_ddp.py
"""

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gossamer.datasets import batches, load
from gossamer.distribute import GradientExchange, TernGrad
from gossamer.nets import build

dist.init_process_group("gloo")
digits = load("digits")
rank, size = dist.get_rank(), dist.get_world_size()
net = build("lenet-300-100", classes=10, in_shape=digits.in_shape, seed=0)
ddp = DistributedDataParallel(net)
state = GradientExchange(net, TernGrad())
ddp.register_comm_hook(state, state.hook)  # the one line more

optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
share = digits.train.take(slice(rank, None, size))
for epoch in range(5):
    for x, y in batches(share, 32, generator=torch.Generator().manual_seed(epoch)):
        optimizer.zero_grad()
        cross_entropy(ddp(x), y).backward()
        optimizer.step()
if rank == 0:
    right = net(digits.test.inputs).argmax(1) == digits.test.targets
    print(f"accuracy {right.float().mean():.4f} after {state.step} steps of ternary gradients")
state.close()
dist.destroy_process_group()
