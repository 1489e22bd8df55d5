"""Lowered convolutions compute what the masked ones do."""

import itertools

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.errors import ArgumentError
from gossamer.pack import pack_bytes
from gossamer.structure import shrink
from gossamer.structure.lowered import LoweredConv2d

SETTINGS = list(itertools.product((1, 2), (0, 1, (2, 1)), (1, 2), ((3, 3), (1, 5)), (True, False)))


@pytest.mark.parametrize(("stride", "padding", "dilation", "kernel", "bias"), SETTINGS)
@torch.no_grad()
def test_rows_and_columns_that_are_zero_are_left_out(
    stride: int, padding: int, dilation: int, kernel: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, kernel, stride, padding, dilation, bias=bias).double()
    conv.weight[torch.rand(5) < 0.4] = 0
    conv.weight[:, torch.rand(conv.weight.shape[1:]) < 0.5] = 0
    small = LoweredConv2d(conv)
    assert small.weight.numel() < conv.weight.numel()
    x = torch.randn(2, 3, 11, 13, dtype=torch.float64)
    torch.testing.assert_close(small(x), conv(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(small(x[0]), conv(x[0]), rtol=0, atol=1e-12)


def test_other_convolutions_are_refused() -> None:
    with pytest.raises(ArgumentError, match="groups=2"):
        LoweredConv2d(nn.Conv2d(2, 2, 3, groups=2))
    with pytest.raises(ArgumentError, match="columns must ascend, below 18"):
        LoweredConv2d(nn.Conv2d(2, 2, 3), columns=torch.tensor([18]))


@torch.no_grad()
def test_shrink_lowers_where_columns_are_dead() -> None:
    torch.manual_seed(0)

    def net() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)).eval()

    model, x = net(), torch.randn(2, 1, 9, 9)
    model[0].weight[2] = 0
    model[0].bias[2] = 0
    model[2].weight[:, :, 0] = 0  # the upper row of every kernel
    model[2].weight[:, 3, 1, 1] = 0
    result = shrink(model, x, lowered=True)
    small = result.model[2]
    assert isinstance(small, LoweredConv2d)
    assert small.weight.shape == (4, 5 * 6 - 1)
    assert type(result.model[0]) is nn.Conv2d
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-5)
    again = gossamer.load(pack_bytes(result.model, metadata=result.metadata()), net())
    assert torch.equal(again(x), result.model(x))


def test_gradients_are_those_of_the_kept_weights() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3)
    with torch.no_grad():
        conv.weight[:, 0] = 0
    small, x = LoweredConv2d(conv), torch.randn(2, 2, 6, 6)
    conv(x).square().sum().backward()
    small(x).square().sum().backward()
    torch.testing.assert_close(small.weight.grad, conv.weight.grad.flatten(1)[:, 9:])
