"""The stage quantize_biases and the floor of a run."""

from pathlib import Path

import pytest
import torch
from torch import nn

import gossamer

STAGES = [{"quantize_biases": {"bits": 8}}, "pack"]


def network(far: float) -> nn.Module:
    """With one bias far from the others, of a unit that never speaks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6, bias=False))
    with torch.no_grad():
        net[0].bias[0] = -far
    return net


@pytest.mark.parametrize(("far", "values"), [(2.0, 256), (300.0, 1 << 12), (1e6, None)])
def test_biases_get_the_bits_that_the_floor_asks_for(
    far: float, values: int | None, tmp_path: Path
) -> None:
    net, inputs = network(far), torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    recipe = {"name": "r", "max_drop": 0.001, "stages": STAGES}
    found = gossamer.compress(net, inputs, recipe=recipe, out=tmp_path)
    assert found.run["floor"]["kept"]
    bias = found.model[0].bias.detach()
    if values is None:
        assert torch.equal(bias, net[0].bias)
        return
    step = (bias[1:, None] - bias[None, 1:]).abs()
    step = step[step > 0].min()
    assert 1 < far / float(step) <= 2 * values


def test_where_the_floor_was_lost_before_they_are_rounded_as_asked(tmp_path: Path) -> None:
    net, inputs = network(300.0), torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    recipe = {"name": "r", "max_drop": 0.001, "stages": [{"prune": {"density": 0.2}}, *STAGES]}
    with pytest.warns(UserWarning, match="FLOOR NOT KEPT"):
        found = gossamer.compress(net, inputs, recipe=recipe, out=tmp_path)
    assert found.model[0].bias[1:].abs().max() < 3  # zero and a step of 300 / 127
