"""Dead units are taken out with the same outputs; claims can fail."""

import pytest
import torch

from gossamer import nets
from gossamer.core.groups import masks_of
from gossamer.experiments.structured_sparsity import channels, iss, ssl
from gossamer.nets.language import LSTMLM
from gossamer.structure import shrink


def test_a_lenet_loses_its_dead_units() -> None:
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
    made = shrink(net, x).model
    assert ssl.widths(made)[:3] == [(4, 25), (3, 4 * 25), (250, 3 * 16)]
    assert torch.allclose(made.eval()(x), net.eval()(x), atol=1e-5)
    assert ssl._lenet_flop(made) == 3 * 100 / 25000
    # by hand: what is left are slices of what was
    rows = [[15, 17, 18, 19], [0, 1, 2], list(range(1, 500, 2))]
    conv2 = net.get_parameter("conv2.weight")[rows[1]][:, rows[0]]
    assert torch.equal(
        made.get_parameter("conv1.weight"), net.get_parameter("conv1.weight")[rows[0]]
    )
    assert torch.equal(made.get_parameter("conv2.weight"), conv2)
    ip1 = net.get_parameter("ip1.weight")[rows[2]].view(250, 50, 16)[:, rows[1]].flatten(1)
    assert torch.equal(made.get_parameter("ip1.weight"), ip1)


def test_a_language_model_loses_its_dead_units() -> None:
    net = nets.build("lstm-lm", classes=9, embedding=4, hidden=(6, 5))
    assert isinstance(net, LSTMLM)
    gone = [0, 3], [1, 2, 4]
    with torch.no_grad():
        for family, dead in zip(iss.units(net), gone, strict=True):
            keep = torch.ones(len(family), dtype=torch.bool)
            keep[list(dead)] = False
            masks_of([(family, keep)]).apply_(net)  # biases stay: nobody reads them
    tokens = torch.arange(8).view(2, 4)
    made = shrink(net, tokens).model
    assert isinstance(made, LSTMLM)
    assert iss._sizes(made) == [4, 2]
    assert torch.allclose(made.eval()(tokens), net.eval()(tokens), atol=1e-5)
    left = [[1, 2, 4, 5], [0, 3]]
    gates = [6 * g + i for g in range(4) for i in left[0]]
    whole = net.get_parameter("rnn.0.weight_hh_l0")[gates][:, left[0]]
    assert torch.equal(made.get_parameter("rnn.0.weight_hh_l0"), whole)
    assert torch.equal(
        made.get_parameter("output.weight"), net.get_parameter("output.weight")[:, left[1]]
    )


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
