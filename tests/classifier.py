"""A small classifier, its data and one step of training: what tests of quantizers share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)
    )


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(32, 12, generator=g), torch.randint(4, (32,), generator=g)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    """The loss before it."""
    x, y = batch(seed)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()
