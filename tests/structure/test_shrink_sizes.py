"""A smaller network gives the same outputs for inputs of other sizes than the example's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ArgumentError
from gossamer.structure import shrink
from gossamer.structure.surgery.compare import Sameness


def _zero(layer: nn.Module, bias: float) -> None:
    with torch.no_grad():
        layer.get_parameter("weight").zero_()
        layer.get_parameter("bias").fill_(bias)


class FeedForward(nn.Module):
    """A dead feed-forward branch beside its shortcut: (N, T, 6) -> (N, T, 2)."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.i, self.a, self.b, self.o = (nn.Linear(*s) for s in ((6, 8), (8, 9), (9, 8), (8, 2)))
        _zero(self.b, bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.i(x)
        out: Tensor = self.o(y + self.b(F.gelu(self.a(y))))
        return out


class Block(nn.Module):
    """A dead branch of convolutions beside a shortcut."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.i, self.c, self.s = nn.Conv2d(3, 8, 3, padding=1), branch, shortcut
        self.o = nn.Conv2d(8, 2, 1)
        convs = [m for m in branch.modules() if isinstance(m, nn.Conv2d)]
        _zero(convs[-1], 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.i(x))
        out: Tensor = self.o(self.c(y) + self.s(y))
        return out


@pytest.mark.parametrize("bias", [0.0, 0.5])
@pytest.mark.parametrize("length", [4, 8])
def test_a_dead_feed_forward_branch_goes_at_every_length(bias: float, length: int) -> None:
    # a constant of zeros was taken for one a position: other lengths failed, or were broadcast
    torch.manual_seed(0)
    net = FeedForward(bias).eval()
    small = shrink(net, torch.randn(2, length, 6)).model
    assert sum(p.numel() for p in small.parameters()) == 74
    for other in (1, 3, 7):
        x = torch.randn(3, other, 6)
        assert small(x).shape == net(x).shape
        torch.testing.assert_close(small(x), net(x))


BLOCKS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], bool]] = {
    # rounded up, as the constant's length is
    "strided": (
        lambda: (nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1, stride=2)), True
    ),
    # rounded down
    "windows": (lambda: (nn.Conv2d(8, 8, 2, stride=2), nn.AvgPool2d(2)), False),
    "cropped": (lambda: (nn.Conv2d(8, 8, 3), nn.ZeroPad2d(-1)), False),
    # the pool behind the convolution has no parameters and stays
    "pooled": (
        lambda: (
            nn.Sequential(nn.Conv2d(8, 8, 1), nn.MaxPool2d(3, 2, 1)), nn.MaxPool2d(3, 2, 1)
        ),
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [5, 12])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_dead_branch_collapses_where_every_size_stays_right(name: str, size: int) -> None:
    torch.manual_seed(0)
    make, collapses = BLOCKS[name]
    net = Block(*make()).eval()
    x = torch.randn(2, 3, size, size)
    if not collapses:
        with pytest.raises(ArgumentError, match="none can be taken out"):
            shrink(net, x)
        return
    small = shrink(net, x).model
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    for other in (6, 7, 9, 16):
        x = torch.randn(2, 3, other, other)
        torch.testing.assert_close(small(x), net(x))


class Windowed(nn.Module):
    """Keeps two numbers of one size: of its units, and of the positions that it looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.units = 8
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, : self.most]
        out: Tensor = self.b(F.relu(self.a(x)).reshape(x.shape[0], -1, self.units))
        return out


@pytest.mark.parametrize("length", [4, 12])
def test_a_number_of_something_else_stays(length: int) -> None:
    # both were set: the smaller network left out the last positions of longer inputs
    torch.manual_seed(0)
    net = Windowed().eval()
    with torch.no_grad():
        net.a.weight[:2] = 0
        net.a.bias[:2] = 0
    small = shrink(net, torch.randn(2, length, 6)).model
    assert (small.units, small.most) == (6, 8)
    x = torch.randn(2, 10, 6)
    torch.testing.assert_close(small(x), net(x))


def test_sizes_are_those_that_the_network_takes() -> None:
    sequences = Sameness(FeedForward(0.0).eval(), torch.zeros(3, 4, 6))
    assert [tuple(x.shape) for x, _ in sequences.sized] == [
        (2, 5, 6), (2, 8, 6), (2, 11, 6), (4, 4, 6),
    ]  # fmt: skip
    flat = Sameness(nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), torch.zeros(2, 2, 4))
    assert [tuple(x.shape) for x, _ in flat.sized] == [(3, 2, 4)]


class Growing(nn.Module):
    """Keeps a table that longer inputs make longer, as caches of positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 4
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.longest:
            self.longest = x.shape[1]
            self.table = torch.arange(float(self.longest))
        out: Tensor = self.b(F.relu(self.a(x)) + self.table[: x.shape[1], None])
        return out


def test_other_sizes_leave_both_networks_as_they_are() -> None:
    torch.manual_seed(0)
    net = Growing().eval()
    with torch.no_grad():
        net.a.weight[:2] = 0
        net.a.bias[:2] = 0
        net.b.weight[:, :2] = 0
    small = shrink(net, torch.randn(2, 3, 6)).model
    assert small.a.out_features == 6
    for one in (net, small):
        assert (one.longest, len(one.table)) == (4, 4)
    x = torch.randn(2, 9, 6)
    torch.testing.assert_close(small(x), net(x))
