import pytest
import torch
from torch import nn

from gossamer.core.errors import ArgumentError
from gossamer.structure.absorb import absorb_batchnorm


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


def _pair() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    for i in (0, 2):
        net[i].running_mean.normal_()
        net[i].running_var.uniform_(0.2, 4)
        nn.init.normal_(net[i].weight)
    return net.eval()


@pytest.mark.parametrize("what", ["weight", "running_mean"])
def test_layers_that_share_a_tensor_are_refused_and_stay(what: str) -> None:
    net = _pair()
    setattr(net[2], what, getattr(net[0], what))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(ArgumentError, match=rf"0\.{what} is shared with 2"):
        absorb_batchnorm(net)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_one_layer_in_two_places_is_absorbed_once() -> None:
    net = _pair()
    net[2] = net[0]
    x = torch.randn(5, 3)
    before = net(x)
    assert absorb_batchnorm(net, x) == ["0"]
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def test_a_network_that_reads_the_statistics_elsewhere_is_put_back() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = _pair()[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(x) + self.bn.running_mean

    net = Reader().eval()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(ArgumentError, match="the network with absorbed batch-norm differs"):
        absorb_batchnorm(net, torch.ones(2, 3))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
