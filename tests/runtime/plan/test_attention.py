"""Attention in plans: torch's answers, masks of every kind, files of whole transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from gossamer import nets
from gossamer.core.errors import ArgumentError
from gossamer.runtime.plan.door import compile_network


class Attending(nn.Module):
    """Causal, with a mask of floats, one of truths, another scale, and across to other steps."""

    def __init__(self) -> None:
        super().__init__()
        self.made = nn.Linear(8, 24)
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("shift", torch.randn(2, 5, 5, generator=draw))
        truths = torch.rand(5, 5, generator=draw) < 0.5
        self.register_buffer("truths", truths | torch.eye(5, dtype=torch.bool))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        parts = self.made(x).unflatten(-1, (2, 12)).transpose(1, 2)
        q, k, v = parts.split([4, 4, 4], -1)
        (more,) = parts.chunk(1, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True) + more[..., :4]
        y = F.scaled_dot_product_attention(y, k, v, attn_mask=self.shift)
        y = F.scaled_dot_product_attention(y, k, v, attn_mask=self.truths, scale=0.3)
        wide = other.unsqueeze(1)
        y = F.scaled_dot_product_attention(y, wide, wide)
        return y + torch.arange(1, 6, dtype=torch.float32).unsqueeze(1)


def test_masks_are_torch_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Attending().eval()
    x, other = torch.randn(2, 5, 8), torch.randn(2, 7, 4)
    made = compile_network(net, (x, other), engine="numpy")
    assert not made.graph.islands
    read = gossamer.runtime.load(made.save(tmp_path / "net.plan"))
    for count in (1, 2, 3):
        given = torch.randn(count, 5, 8), torch.randn(count, 7, 4)
        with torch.no_grad():
            wanted = net(*given).numpy()
        for plan in (made, read):
            got = plan(*(t.numpy() for t in given))
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["numpy", "own"])
def test_rows_that_see_nothing_are_zeros(engine: str, tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(5, 5).index_fill(0, torch.tensor([2]), -torch.inf)
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    torch.manual_seed(0)
    least = torch.finfo(torch.float32).min  # a number, of which torch takes the mean of all
    mask = torch.randn(3, 5, 5)
    mask[0, 1], mask[1, 2, 1:], mask[2, 0], mask[2, 3, 3] = -torch.inf, -torch.inf, least, least
    x = torch.randn(3, 5, 8)
    plan = compile_network(Masked(), (x, mask), engine=engine, rounds=1)
    read = gossamer.runtime.load(plan.save(tmp_path / "net.plan"))
    wanted = Masked()(x, mask)
    assert not wanted[0, 1].any()
    for one in (plan, read):
        torch.testing.assert_close(one(x, mask), wanted, rtol=1e-4, atol=1e-5)
    plan = compile_network(Fixed(), x, engine=engine, rounds=1)
    torch.testing.assert_close(plan(x), Fixed()(x), rtol=1e-4, atol=1e-5)


def test_a_transformer_needs_no_torch(tmp_path: Path) -> None:
    net = nets.build("gpt", classes=31, width=16, layers=1, heads=2, context=12, seed=0).eval()
    with torch.no_grad():  # by the sparse kernels too, on three dimensions
        net.block[0].expand.weight.mul_(torch.rand(64, 16) < 0.3)
    tokens = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    made = compile_network(net, tokens, engine="plan", rounds=1)
    (row,) = (r for r in made.facts.rows if r["layer"] == "block.0.expand")
    assert {"sparse", "sparse-rows"} <= set(row["ms"]) or "not built" in str(row["refused"])
    read = gossamer.runtime.load(made.save(tmp_path / "net.plan"))
    for count in (1, 3):
        tokens = torch.randint(31, (count, 9), generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            wanted = net(tokens).numpy()
        np.testing.assert_allclose(read(tokens.numpy()), wanted, rtol=1e-4, atol=1e-5)


def test_a_network_that_gives_a_constant_runs_in_torch() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, torch.arange(3)

    made = compile_network(Both(), torch.ones(2, 3), rounds=1)
    assert "the network gives a constant" in made.explain()
    assert torch.equal(made(torch.ones(2, 3))[1], torch.arange(3))
    with pytest.raises(ArgumentError, match="gives a constant"):
        compile_network(Both(), torch.ones(2, 3), engine="numpy")
