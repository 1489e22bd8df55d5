"""What the optimizers keep, read the same way whatever they are."""

import torch
from torch import nn

from gossamer.core.optimizers import momentum


def test_momentum_of_halves_is_a_number_where_nothing_has_moved() -> None:
    # eps is 0 in float16, and a weight without a gradient was 0 / 0
    p = nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.Adam([p], lr=0.1, eps=1e-3)
    p.grad = torch.tensor([0.0, 0.5], dtype=torch.float16)
    optimizer.step()
    found = momentum(optimizer, p)
    mean, square = (optimizer.state[p][k].float() for k in ("exp_avg", "exp_avg_sq"))
    assert found[0] == 0
    assert torch.equal(found, mean / (square.sqrt() + 1e-8))


def test_momentum_of_singles_is_theirs() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([p], lr=0.1)
    p.grad = torch.tensor([0.25, -0.5])
    optimizer.step()
    state = optimizer.state[p]
    wanted = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
    assert torch.equal(momentum(optimizer, p), wanted)
