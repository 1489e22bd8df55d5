"""Dead units are taken out with the same outputs; claims can fail."""

import pytest
import torch
from torch import nn

from gossamer import nets
from gossamer.core.errors import GossamerError
from gossamer.core.groups import masks_of
from gossamer.experiments.structured_sparsity import channels, iss, ssl
from gossamer.experiments.structured_sparsity.removal import alive, smaller, widths
from gossamer.nets.language import LSTMLM


def test_a_lenet_without_its_dead_units_puts_out_the_same() -> None:
    net = nets.build("lenet-5", seed=0)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 1:
                p.uniform_(-0.5, 0.5)  # constants that must be folded forward
        net.get_parameter("conv1.weight")[:15] = 0
        net.get_parameter("conv2.weight")[:, 16] = 0  # nobody reads it
        net.get_parameter("conv2.weight")[3:] = 0
        net.get_parameter("ip1.weight")[::2] = 0
    x = torch.randn(5, 1, 28, 28)
    made = smaller(net, x)
    assert widths(made)[:3] == [(4, 25), (3, 4 * 25), (250, 3 * 16)]
    assert [int(a.sum()) for a in alive(net)] == [4, 3, 250]
    assert torch.allclose(made(x), net.eval()(x), atol=1e-5)
    assert ssl._lenet_flop(made) == 3 * 100 / 25000


def test_other_outputs_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))  # no ReLU: constants differ
    with torch.no_grad():
        net[0].weight[1:] = 0
        net[0].bias.fill_(-1.0)
    with pytest.raises(GossamerError, match="outputs differ by"):
        smaller(net, torch.randn(3, 4))


def test_a_language_model_without_dead_units_puts_out_the_same() -> None:
    net = nets.build("lstm-lm", classes=9, embedding=4, hidden=(6, 5))
    assert isinstance(net, LSTMLM)
    with torch.no_grad():
        for family, dead in zip(iss.units(net), ([0, 3], [1, 2, 4]), strict=True):
            gone = torch.zeros(len(family), dtype=torch.bool)
            gone[dead] = True
            masks_of([(family, ~gone)]).apply_(net)  # biases stay: nobody reads them
    tokens = torch.arange(8).view(2, 4)
    made = iss.fewer_units(net, tokens)
    assert [layer.hidden_size for layer in made.rnn] == [4, 2]
    assert torch.allclose(made(tokens), net(tokens), atol=1e-5)


def row(flop: float, error: float) -> dict[str, object]:
    return {"points": [{"flop": flop, "error": error}, {"flop": flop / 3, "error": error}]}


def test_claims_hold_and_fall_short() -> None:
    good = ssl._judge_lenet({"runs": [row(0.09, 0.8), row(0.1, 0.95)]})
    assert [c.holds for c in good] == [True] * 4
    bad = ssl._judge_lenet({"runs": [row(0.09, 1.4), row(0.2, 0.95)]})
    assert [c.holds for c in bad] == [False] * 4
    with pytest.raises(LookupError):  # a point that was never reached
        ssl._judge_lenet({"runs": [{"points": []}]})


def test_ranks_of_resnet_20_by_its_widths() -> None:
    net = nets.build("resnet-20", seed=0)
    ranks = channels._ranks(net, (8, 16, 32))
    assert len(ranks) == 18
    assert "conv1" not in ranks
    assert ranks["layer3.2.conv2"] == (32, 32)


def resnet(points: float, macs: float, fast: float, low: float) -> dict[str, object]:
    row = {"accuracy": 92.0, "epochs": 1, "macs": 20e6, "live": 20e6}
    fewer = row | {"name": "fewer", "accuracy": 92.6 - points, "macs": macs, "live": macs}
    rest = [row | {"name": "half"}, row | {"name": "low-rank", "macs": 40e6 / low}]
    return {
        "dense": {"accuracy": 92.6, "macs": 40e6, "live": 40e6},
        "trained": [fewer, *rest],
        "times": {"onnxruntime": {"speed_up": [1.1, fast, fast]}},
    }


def test_claims_of_channels_hold_and_fall_short() -> None:
    assert [c.holds for c in channels._judge(resnet(0.6, 29e6, 1.7, 2.5))] == [True] * 6
    assert [c.holds for c in channels._judge(resnet(0.8, 30e6, 1.5, 1.9))] == [False] * 6
