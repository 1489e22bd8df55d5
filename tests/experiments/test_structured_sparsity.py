"""Dead units are taken out with the same outputs; claims can fail."""

import json
from pathlib import Path

import pytest
import torch

from gossamer import experiments, nets
from gossamer.core.errors import DatasetError
from gossamer.core.groups import masks_of
from gossamer.experiments.structured_sparsity import (
    channels,
    channels_int8,
    iss,
    resnet56,
    resnet_depth,
    ssl,
)
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


def test_claims_of_resnet_56_hold_and_fall_short() -> None:
    def raw(accuracy: float, macs: float) -> dict[str, object]:
        trained = {"accuracy": accuracy, "macs": macs, "epochs": 4, "images": 45000}
        return {"dense": {"macs": 125.5e6, "accuracy": 94.4}, "trained": trained}

    assert [c.holds for c in resnet56._judge(raw(93.8, 58e6))] == [True] * 2
    assert [c.holds for c in resnet56._judge(raw(93.7, 60e6))] == [False] * 2


def test_claims_of_channels_in_int8_hold_and_fall_short() -> None:
    def raw(fast: float, small: float) -> dict[str, object]:
        ms = {"dense": {"onnxruntime": fast}, "half": {"onnxruntime-int8": 1.0}}
        times = {"ms": ms, "accuracy": {"onnxruntime-int8": 80.0}}
        made = {"bytes": [small, 1], "accuracy": [81.0, 80.0]}
        return {"runs": [{"compressed": made, "times": times}]}

    assert [c.holds for c in channels_int8._judge(raw(8.1, 13.1))] == [True] * 2
    assert [c.holds for c in channels_int8._judge(raw(7.9, 12.9))] == [False] * 2


def test_a_resnet_loses_a_block() -> None:
    net = nets.build("resnet-20", seed=0).eval()
    made = resnet_depth.without(net, ["layer2.1"])
    fewer = resnet_depth._convolutions(net) - resnet_depth._convolutions(made)
    assert fewer == 2
    x = torch.randn(2, 3, 32, 32)
    net.get_submodule("layer2.1.bn2").register_forward_hook(lambda m, i, o: torch.zeros_like(o))
    assert torch.allclose(made.eval()(x), net(x), atol=1e-5)


def test_claims_of_depth_hold_and_fall_short() -> None:
    def raw(convolutions: int, error: float) -> dict[str, object]:
        row = {"blocks": ["layer1.1"], "epochs": 2, "convolutions": convolutions, "error": error}
        return {"dense": {"convolutions": 19, "error": 8.0}, "trained": [row]}

    assert [c.holds for c in resnet_depth._judge(raw(17, 8.2))] == [True] * 2
    assert [c.holds for c in resnet_depth._judge(raw(18, 8.4))] == [False] * 2


@pytest.mark.parametrize("name", ["channels-and-int8", "resnet-56-channels", "resnet-depth"])
def test_a_quick_run_ends_in_claims(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    try:
        path = experiments.run(
            name, out=tmp_path, work=tmp_path / "w", quick=True, workers=1, say=lambda _: None
        )
    except DatasetError:
        pytest.skip("CIFAR-10 or published weights are not here")
    assert len(json.loads(path.read_text())["claims"]) == 2
