import math

import pytest
import torch
from torch import nn

from gossamer.core.errors import ArgumentError
from gossamer.structure import factorize, svd_size, sweep


def layer(outputs: int = 6, inputs: int = 9, bias: bool = True) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=bias)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.weight.copy_(torch.randn(outputs, inputs, generator=g))
    return made


def test_the_published_ratio():
    size = svd_size(25088, 4096, 500)
    assert (size.before, size.after) == (102_760_448, 14_592_000)
    assert round(size.ratio, 2) == 7.04


@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_is_the_layer_and_less_loses_what_the_sweep_says(bias):
    made = layer(bias=bias)
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    pair = factorize(made, 6)
    torch.testing.assert_close(pair(x), made(x), rtol=1e-5, atol=1e-5)
    for size in sweep(made, range(1, 7)):
        pair = factorize(made, size.rank)
        assert sum(p.numel() for n, p in pair.named_parameters() if "weight" in n) == size.after
        left = (made.weight - pair[1].weight @ pair[0].weight).detach()
        expected = float(left.square().sum() / made.weight.detach().square().sum())
        assert size.error == pytest.approx(expected, abs=1e-6)
        # both sides carry the same energy
        norms = [float(p.weight.detach().norm()) for p in pair]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_rank_one_by_hand():
    made = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    pair = factorize(made, 1)
    expected = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    torch.testing.assert_close(pair[1].weight @ pair[0].weight, expected)
    assert sweep(made, [1])[0].error == pytest.approx(9 / 25)


def test_bad_input():
    with pytest.raises(ArgumentError, match="rank=7 is outside 1 to 6"):
        factorize(layer(), 7)
    with pytest.raises(ArgumentError, match="rank=0"):
        sweep(layer(), [0])
    with pytest.raises(ArgumentError, match="ranks is empty"):
        sweep(layer(), [])
    with pytest.raises(ArgumentError, match="Conv2d"):
        factorize(nn.Conv2d(1, 1, 1), 1)
    made = layer()
    with torch.no_grad():
        made.weight[0, 0] = math.nan
    with pytest.raises(ArgumentError, match="NaN"):
        factorize(made, 2)


def test_a_computed_weight_is_not_factorized() -> None:
    layer = torch.nn.utils.parametrizations.orthogonal(nn.Linear(6, 4))
    with pytest.raises(ArgumentError, match=r"the layer cannot be factorized: weight is computed"):
        factorize(layer, 2)
