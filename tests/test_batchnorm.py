import pytest
import torch
from torch import nn

from gossamer.errors import ArgumentError
from gossamer.quantize.batchnorm import absorb_batchnorm


def trained() -> nn.Sequential:
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    for m in net:
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean = torch.randn(8, generator=g)
            m.running_var = torch.rand(8, generator=g) + 0.1
            m.weight.data = torch.randn(8, generator=g)
            m.bias.data = torch.randn(8, generator=g)
    return net.eval()


def test_absorbing_keeps_the_function_and_leaves_constant_statistics() -> None:
    net = trained()
    x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    before = net(x)
    assert absorb_batchnorm(net) == ["1", "3"]
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)
    for i in (1, 3):
        assert (net[i].running_mean == 0).all()
        assert len(net[i].running_var.unique()) == 1


def test_hand_computed_case() -> None:
    bn = nn.BatchNorm1d(1, eps=0.0).eval()
    bn.running_mean[:] = 3.0
    bn.running_var[:] = 4.0
    bn.weight.data[:] = 10.0
    bn.bias.data[:] = 1.0
    absorb_batchnorm(bn)
    assert bn.weight.item() == 5.0  # 10 / sqrt(4)
    assert bn.bias.item() == -14.0  # 1 - 3 * 5


def test_bad_statistics_change_nothing() -> None:
    net = trained()
    net[3].running_var[2] = float("nan")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ArgumentError, match=r"3\.running_var holds 1 values"):
        absorb_batchnorm(net)
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k]) or k == "3.running_var"


def test_layers_without_statistics_are_left_alone() -> None:
    net = nn.Sequential(
        nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2, affine=False)
    )
    assert absorb_batchnorm(net) == []
