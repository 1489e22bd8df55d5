"""Which batch-norm stands behind which layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.structure import norms_behind


class Twice(nn.Module):
    """One layer that is called twice, one whose output two norms take, one beside a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.shared, self.apart = (nn.Conv2d(2, 2, 1) for _ in range(3))
        self.a, self.b, self.c, self.d = (nn.BatchNorm2d(2) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.twice(self.twice(x)))
        x = self.shared(x)
        x = self.b(x) + self.c(x)
        return self.d(torch.relu(self.apart(x)))


class Written(nn.Module):
    """Outputs that are written to before a norm takes them, and a norm that serves two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.sum, self.act, self.one, self.two = (nn.Conv2d(2, 2, 1) for _ in range(4))
        self.a, self.b, self.c = (nn.BatchNorm2d(2) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.sum(x)
        y += x
        y = self.b(self.relu(self.act(self.a(y))))
        return self.c(self.two(self.c(self.one(y))))


def test_the_norms_of_a_residual_network() -> None:
    net = nets.build("resnet-20", seed=0, in_shape=(1, 8, 8))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    net.train()
    found = norms_behind(net, torch.randn(2, 1, 8, 8))
    assert found["layer1.0.conv2.weight"] == "layer1.0.bn2"
    assert found["conv1.weight"] == "bn1"
    assert "linear.weight" not in found
    assert len(found) == sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert net.training
    assert not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_what_is_not_clear_has_none() -> None:
    assert norms_behind(Twice(), torch.randn(2, 2, 3, 3)) == {}
    assert norms_behind(Written(), torch.randn(2, 2, 3, 3)) == {}
