"""Average pools whose windows hang over, and powers: lowered, and torch's results."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer import nets
from gossamer.runtime.flat import flatten
from gossamer.runtime.plan.capture import capture
from gossamer.runtime.plan.door import compile_network


class Hangs(nn.Module):
    """One average pool and a power."""

    def __init__(self, counted: bool, padding: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 2, padding, ceil_mode=True, count_include_pad=counted)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 3, H, W)."""
        return self.pool(x.abs() + 0.1).pow(-0.75) + x.mean((1, 2, 3), keepdim=True) ** 2


def left(net: nn.Module, x: Tensor) -> list[str]:
    """Why operators stay in torch."""
    flat, tensors, _ = flatten(net.eval(), x)
    nodes = capture(flat, tensors).graph.nodes
    return [str(n.attributes["reason"]) for n in nodes if n.op == "torch"]


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize(("counted", "padding"), [(True, 0), (False, 0), (False, 1)])
def test_windows_that_hang_over(counted: bool, padding: int, side: int) -> None:
    net, x = Hangs(counted, padding), torch.randn(2, 3, side, side + 2)
    assert left(net, x) == []
    plan = compile_network(net, x, engine="plan", rounds=1)
    for batch in (x, 3 * x[:1]):
        np.testing.assert_allclose(plan(batch).numpy(), net(batch).numpy(), rtol=1e-5, atol=1e-6)


def test_padding_that_counts_and_a_window_beyond_it_stay_in_torch() -> None:
    net, x = Hangs(True, 1), torch.randn(1, 3, 8, 8)
    assert F.avg_pool2d(x, 3, 2, 1, ceil_mode=True).shape == (1, 3, 5, 5)  # it does hang over
    (reason,) = left(net, x)
    assert "hang over padding that counts" in reason


def test_an_exponent_that_is_computed_stays_in_torch() -> None:
    class Powers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """x: (batch, 3)."""
            return 2.0**x + x.abs() ** x

    x = torch.randn(2, 3)
    assert len(left(Powers(), x)) >= 1
    plan = compile_network(Powers().eval(), x, engine="plan", rounds=1)
    torch.testing.assert_close(plan(x), Powers()(x))


def test_networks_with_response_normalization_need_no_torch() -> None:
    x = torch.randn(1, 3, 32, 32)
    net = nets.build("convnet", in_shape=(3, 32, 32), seed=0)
    assert left(net, x) == []
    torch.testing.assert_close(compile_network(net, x, rounds=1)(x), net(x), rtol=1e-4, atol=1e-5)
