"""Dead units are taken out with the same outputs; claims can fail."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer import datasets, experiments, nets
from gossamer.core.errors import ArgumentError, DatasetError
from gossamer.core.groups import masks_of
from gossamer.core.layer_groups import layer_groups
from gossamer.datasets import Dataset, Split
from gossamer.experiments.shared import packages
from gossamer.experiments.structured_sparsity import (
    channels,
    channels_int8,
    convnet,
    figures,
    iss,
    resnet56,
    smallest,
    speaker,
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


def quickly(name: str, tmp_path: Path) -> dict[str, Any]:
    path = experiments.run(
        name, out=tmp_path, work=tmp_path / "w", seeds=1, quick=True, workers=1, say=lambda _: None
    )
    data: dict[str, Any] = json.loads(path.read_text())
    return data


class Encoder(nn.Module):
    """What the speaker encoder of a package is, smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 16, 3, batch_first=True)
        self.linear = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 5) -> (N, 6), of norm 1."""
        made = self.linear(self.lstm(x)[1][0][-1])
        return made / made.norm(dim=1, keepdim=True)


def test_an_encoder_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speaker, "speaker", lambda n, generator: (Encoder(), torch.randn(n, 9, 5)))
    data = quickly("shrink-speaker-encoder", tmp_path)
    assert [r["units"][1] for r in data["runs"]] == [[8, 8, 8]]
    assert data["runs"][0]["units"][0] == [16, 16, 16]
    kept = 4 * 8 * (5 + 2 * 8 + 2 * 8 + 8 + 3 * 2) + 6 * 8 + 6
    assert data["runs"][0]["parameters"][1] == kept
    held = {c["what"].partition(": ")[2]: c["holds"] for c in data["claims"]}
    assert held["largest difference of shrunk and masked embeddings"]
    assert held["parameters left, part of before"]
    assert held["largest difference once loaded from its file, without pickle"]
    row = data["runs"][0] | {
        "difference": 2e-5, "parameters": [10, 6], "reloaded_difference": 1e-9, "interval": [1, 2],
    }  # fmt: skip
    assert [c.holds for c in speaker._judge({"runs": [row]})] == [False] * 4


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(ArgumentError, match="pip install --no-deps no_such_package"):
        packages.imported("no_such_package.inside")


def test_products_by_thread_count(tmp_path: Path) -> None:
    rows = quickly("ssl-threads", tmp_path)["rows"]
    assert [r["threads"] for r in rows] == [1] * 5 + [2] * 5
    assert all(r[way]["speed_up"] > 0 for r in rows for way in ("l1", "ssl"))


def test_2d_filters_that_count() -> None:
    net = nets.build("lenet-5", seed=0)
    with torch.no_grad():
        net.get_parameter("conv1.weight")[0] = 0
        net.get_parameter("conv2.weight")[:, 1] = 0  # nobody reads filter 1
        net.get_parameter("conv2.weight")[2, 3] = 0
    one, two = figures.filters_2d(net)
    assert (~one).nonzero().tolist() == [[0, 0], [1, 0]]
    gone = {(n, c) for n in range(50) for c in (0, 1)} | {(2, 3)}
    assert {(n, c) for n, c in (~two).nonzero().tolist()} == gone


def test_figures_of_a_lenet_in_small(tmp_path: Path) -> None:
    try:
        data = quickly("ssl-figures", tmp_path)
    except DatasetError:
        pytest.skip("MNIST is not here")
    assert data["claims"] == []
    (row,) = data["runs"]
    for seen in (row["dense"], *row["points"]):
        assert [len(seen["reconstruction_error"][x]) for x in ("conv1", "conv2")] == [21, 51]
    assert figures.draw(data, tmp_path) == data["pictures"]
    assert all((tmp_path / name).read_text().startswith("<?xml") for name in data["pictures"])


def test_a_lasso_ends_when_enough_groups_are_zero() -> None:
    close = partial(pytest.approx, rel=1e-6)
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]))
    net = nn.Sequential(layer)
    made = torch.optim.SGD(net.parameters(), lr=1.0)

    def method() -> convnet.Until:
        return convnet.Until(layer_groups(net, "column"), 0.5, growth=2.0, share=0.5)

    lasso = method().attach(net, made)
    layer.weight.grad = torch.zeros(2, 4)
    made.step()  # .5
    made.step()  # 1: the first column is zero
    assert layer.weight[0].tolist() == close([0.0, 0.5, 1.5, 2.5])
    assert lasso.ended is None
    state = lasso.state_dict()
    made.step()  # 2: two of four are, and it would have been 4 at the next
    assert layer.weight[0].tolist() == close([0.0, 0.0, 0.0, 0.5])
    assert lasso.ended == 2
    layer.weight.grad = torch.full((2, 4), -1.0)
    made.step()  # held, and nothing else shrinks
    assert layer.weight.tolist() == [close(r) for r in [[0.0, 0.0, 0.0, 1.5], [0.0, 0.0, 0.0, 0.0]]]
    assert lasso.now() == 2.0
    ended = lasso.state_dict()
    lasso.detach()
    again = method()
    again.load_state_dict(ended)
    again.attach(net, made)
    made.step()
    assert layer.weight[0].tolist() == close([0.0, 0.0, 0.0, 2.5])
    assert again.ended == 2
    again.detach()
    again = method()
    again.load_state_dict(state)
    assert (again.steps, again.ended, again.now()) == (2, None, 2.0)


def test_claims_of_the_convnet_hold_and_fall_short() -> None:
    def raw(columns: float, more: float) -> dict[str, object]:
        return {
            "runs": [
                {"column_sparsity": columns, "error": {"baseline": 20.0, "sparse": 20.0 + more}}
            ]
        }

    assert [c.holds for c in convnet._judge(raw(0.56, 0.4))] == [True] * 2
    assert [c.holds for c in convnet._judge(raw(0.54, 0.6))] == [False] * 2


def test_the_shrunk_lenet_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = datasets.load("digits", subset=200)
    train, validation, test = (
        Split(nn.functional.interpolate(s.batch(slice(None))[0], size=28), s.targets)
        for s in (digits.train, digits.validation, digits.test)
    )
    monkeypatch.setattr(
        smallest, "mnist", lambda quick: Dataset("digits", train, validation, test, 10)
    )
    data = quickly("smallest-shrunk-lenet", tmp_path)
    (row,) = data["runs"]
    assert row["macs"][1] < 0.5 * row["macs"][0]
    assert {r["engine"] for r in row["latency"]} >= {"torch eager"}
    assert [layer["shape"][0] for layer in row["layers"] if layer["name"].endswith("weight")] == [
        10, 24, 80, 10,
    ]  # fmt: skip


def test_shifted_images_are_the_images() -> None:
    images = torch.full((50, 1, 6, 6), -1.0)
    images[:, :, 2:4, 2:4] = torch.arange(50.0).view(50, 1, 1, 1)
    made = smallest.shifted(images, torch.Generator().manual_seed(0))
    assert made.shape == images.shape
    assert torch.equal(made.sum((1, 2, 3)), images.sum((1, 2, 3)))  # all of it is still there
    where = {tuple((m[0] >= 0).nonzero()[0].tolist()) for m in made}
    assert where <= {(y, x) for y in range(5) for x in range(5)}
    assert len(where) > 10


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


@pytest.mark.parametrize("name", ["channels-and-int8", "resnet-56-channels", "ssl-convnet"])
def test_a_quick_run_ends_in_claims(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    try:
        path = experiments.run(
            name, out=tmp_path, work=tmp_path / "w", quick=True, workers=1, say=lambda _: None
        )
    except DatasetError:
        pytest.skip("CIFAR-10 or published weights are not here")
    assert len(json.loads(path.read_text())["claims"]) == 2
