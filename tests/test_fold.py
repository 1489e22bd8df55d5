import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from gossamer import nets
from gossamer.deploy import fold_batchnorm
from gossamer.errors import ArgumentError


def settle(net: nn.Module, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean = torch.randn(m.num_features, generator=g)
            m.running_var = torch.rand(m.num_features, generator=g) + 0.2
            if m.affine:
                m.weight.data = torch.randn(m.num_features, generator=g)
                m.bias.data = torch.randn(m.num_features, generator=g)
    return net


def test_folding_by_hand():
    net = settle(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)))
    with torch.no_grad():
        for tensor, value in (
            (net[0].weight, 3.0), (net[0].bias, 1.0), (net[1].weight, 2.0), (net[1].bias, 5.0),
            (net[1].running_mean, 4.0), (net[1].running_var, 0.25 - 1e-5),
        ):  # fmt: skip
            tensor.fill_(value)
    folded = fold_batchnorm(net)
    # s = 2 / 0.5 = 4: weight 12, bias 4 (1 - 4) + 5
    assert (folded.get_submodule("0").weight.item(), folded.get_submodule("0").bias.item()) == (
        pytest.approx(12.0),
        pytest.approx(-7.0),
    )


@pytest.mark.parametrize("name", ["resnet-8", "wrn-10-1", "vgg-11"])
def test_folding_keeps_the_function_and_the_model(name):
    net = settle(nets.build(name, seed=0)).train()
    before = copy.deepcopy(net.state_dict())
    folded = fold_batchnorm(net)
    assert net.training
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not folded.training
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = net.eval()(x)
    torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-3)


def test_grouped_shared_and_read_twice():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
            self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)

        def forward(self, x):
            y = self.conv(x)
            return self.second(self.conv(self.first(y) + y))

    net = settle(Net())
    folded = fold_batchnorm(net)
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(folded(x), net.eval()(x), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_folded_is_named():
    with pytest.raises(ArgumentError, match=r"1 \(BatchNorm2d\) keeps no running"):
        fold_batchnorm(
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False))
        )
    with pytest.raises(ArgumentError, match=r"1 \(BatchNorm1d\) follows no"):
        fold_batchnorm(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2)))
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    net[1].running_var[0] = -1
    with pytest.raises(ArgumentError, match="running_var is negative"):
        fold_batchnorm(net)
    net[1].running_var[0] = float("nan")
    with pytest.raises(ArgumentError, match="running_var holds 1"):
        fold_batchnorm(net)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    parametrize.register_parametrization(net[0], "weight", nn.Identity())
    with pytest.raises(ArgumentError, match="finish"):
        fold_batchnorm(net)

    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ArgumentError, match="cannot be traced"):
        fold_batchnorm(nn.Sequential(Branch()))
