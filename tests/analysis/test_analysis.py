import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.analysis import (
    against_density,
    compare,
    histograms,
    layer_densities,
    pictures,
    pixel_counts,
    specialization,
    speedups,
)
from gossamer.analysis.layers import channels
from gossamer.analysis.specialization import Specialization, class_shares
from gossamer.analysis.speedup import empty_weight_channels, to_csr
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.core.timing import best_of
from gossamer.datasets import Split

# ---- class specialization


def test_shares_by_hand() -> None:
    # totals 60, 36, 4 and 0 of 100: the last two hold 4 % together
    sums = torch.tensor([[30.0, 15.0, 15.0], [0.0, 0.0, 36.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert class_shares(sums).tolist() == [0.5, 1.0]
    assert class_shares(sums, last=0.04).tolist() == [0.5, 1.0]  # 4 % are the last 4 %
    assert class_shares(sums, last=0.03).tolist() == [0.5, 1.0, 1.0]
    assert class_shares(sums, last=0.0).tolist() == [0.5, 1.0, 1.0]  # the silent one goes
    assert class_shares(sums, last=0.4).tolist() == [0.5]
    assert class_shares(torch.zeros(3, 2)).tolist() == []


def test_shares_refuse_what_is_no_sum_of_activations() -> None:
    with pytest.raises(ArgumentError, match=r"last=1 is outside \[0, 1\)"):
        class_shares(torch.ones(2, 2), last=1)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ArgumentError, match="negative or non-finite"):
            class_shares(torch.tensor([[1.0, bad]]))


def two_units() -> tuple[nn.Sequential, Split]:
    """Unit 0 passes input 0 on, unit 1 the negative of input 1, unit 2 is dead."""
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]))
        net[2].weight.fill_(1.0)
    inputs = torch.tensor([[3.0, 0.0], [1.0, 2.0], [0.0, -4.0], [0.0, -4.0]])
    return net, Split(inputs, torch.tensor([0, 1, 1, 0]))


def test_specialization_of_units_by_hand() -> None:
    net, split = two_units()
    found = specialization(net, split, include="0")
    assert found.classes == 2
    assert found.scores["0"].tolist() == [0.75, 0.5]  # 3 and 1; 4 and 4, the -2 rectified
    assert found.channels == {"0": 3}
    signed = specialization(net, split, include="0", rectified=False)
    assert signed.scores["0"].tolist() == [0.75, 0.6]  # class 1: 2 + 4 of 10
    again = specialization(net, split, include="0", batch_size=1)
    assert torch.equal(again.scores["0"], found.scores["0"])
    assert list(specialization(net, split).scores) == ["0", "2"]
    assert list(specialization(net, split, exclude="2").scores) == ["0"]
    # an activation module in place of the layer before it
    assert specialization(net, split, include="1").scores["1"].tolist() == [0.75, 0.5]
    assert found.as_dict()["0"] == {
        "channels": 3, "dropped": 1, "mean": 0.625, "median": 0.625, "largest": 0.75,
        "scores": [0.75, 0.5],
    }  # fmt: skip
    json.dumps(found.as_dict())
    assert found.table().splitlines()[1].split() == ["0", "3", "1", "62.50", "62.50", "75.00"]
    edges, counts = found.histogram("0", bins=2)
    assert edges.tolist() == [0.5, 0.75, 1.0]
    assert counts.tolist() == [1, 1]
    assert int(found.histogram()[1].sum()) == 2
    with pytest.raises(ArgumentError, match="'7' is not one of 0"):
        found.histogram("7")
    with pytest.raises(ArgumentError, match="bins=0"):
        found.histogram(bins=0)


def test_specialization_of_maps_sums_over_positions() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
    images = torch.zeros(2, 1, 2, 2)
    images[0, 0] = torch.tensor([[1.0, 2.0], [0.0, -3.0]])
    images[1, 0] = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    found = specialization(net, Split(images, torch.tensor([0, 1])))
    assert found.scores["0"].tolist() == [0.75, 0.75]  # 3 and 1; 3 and 1


def test_a_dead_layer_has_no_scores() -> None:
    net, split = two_units()
    with torch.no_grad():
        net[0].weight.zero_()
    found = specialization(net, split, include="0")
    assert len(found.scores["0"]) == 0
    assert found.table().splitlines()[1].split() == ["0", "3", "3", "-", "-", "-"]
    rows = compare(found, found).rows
    assert rows["0"]["ks"] is None
    assert "-" in compare(found, found).table()


def scored(*values: float) -> Specialization:
    return Specialization({"l": torch.tensor(values, dtype=torch.float64)}, {"l": len(values)}, 4)


def test_comparison_by_hand() -> None:
    row = compare(scored(0.9, 0.5, 0.3), scored(0.4, 0.5)).rows["l"]
    assert row["difference"] == pytest.approx(1.7 / 3 - 0.45)
    # 0.9 beats both, 0.5 beats one and ties one, 0.3 none
    assert row["higher"] == pytest.approx((2 + 1.5) / 6)
    # at 0.3: 1/3 against 0; at 0.4: 1/3 against 1/2; at 0.5: 2/3 against 1
    assert row["ks"] == pytest.approx(1 / 3)
    same = compare(scored(0.3, 0.4), scored(0.3, 0.4)).rows
    assert (same["l"]["ks"], same["l"]["higher"], same["all"]["difference"]) == (0.0, 0.5, 0.0)
    apart = compare(scored(0.8), scored(0.3, 0.4)).rows["all"]
    assert (apart["ks"], apart["higher"]) == (1.0, 1.0)
    text = compare(scored(0.8), scored(0.3, 0.4)).table()
    assert text.splitlines()[1].split() == ["l", "80.00", "35.00", "45.00", "1.00", "1.00"]
    with pytest.raises(ArgumentError, match="compare the same"):
        compare(scored(0.5), Specialization({}, {}, 4))


def test_looking_leaves_the_model_and_needs_what_can_be_looked_at() -> None:
    net, split = two_units()
    net.train()
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    specialization(net, split)
    speedups(net, split, rounds=1)
    assert [m.training for m in net.modules()] == [True, True, False, True]
    assert not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    with pytest.raises(ArgumentError, match="one class index an example"):
        specialization(net, Split(split.inputs, torch.zeros(4)))
    with pytest.raises(ArgumentError, match="one class index an example"):
        specialization(net, Split(split.inputs, torch.zeros(4, 2, dtype=torch.int64)))
    with pytest.raises(ArgumentError, match="last=-1"):
        specialization(net, split, last=-1)
    with pytest.raises(ArgumentError, match="split is empty"):
        specialization(net, split.take(slice(0, 0)))
    with pytest.raises(ArgumentError, match="batch_size=0"):
        specialization(net, split, batch_size=0)
    with pytest.raises(ArgumentError, match="'conv1' matches nothing"):
        specialization(net, split, include="conv1")
    with pytest.raises(ArgumentError, match="no layer to look at"):
        specialization(nn.Sequential(nn.ReLU()), split)
    with pytest.raises(ArgumentError, match="no convolution or linear layer"):
        speedups(net, split, include="1")
    assert not any(m._forward_hooks for m in net.modules())


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.spare = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x)[0]).mean(1)


def test_layers_that_are_never_called() -> None:
    g = torch.Generator().manual_seed(0)
    split = Split(torch.randn(6, 5, 4, generator=g), torch.arange(6) % 3)
    net = Attending()
    assert list(specialization(net, split).scores) == ["out"]
    found = speedups(net, split, rounds=1, batch_size=2)
    assert [row.layer for row in found.rows] == ["out"]
    with pytest.raises(ArgumentError, match="spare are never called"):
        specialization(net, split, include=["spare", "out"])


def test_which_dimension_holds_the_channels() -> None:
    linear, conv, relu = nn.Linear(2, 3), nn.Conv1d(1, 3, 1), nn.ReLU()
    x = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(channels("l", linear, x), x.transpose(1, 2))
    assert torch.equal(channels("c", conv, x), x)
    assert channels("r", relu, torch.zeros(2, 3, 4, 5)).shape == (2, 3, 20)
    assert channels("r", relu, torch.zeros(2, 3)).shape == (2, 3, 1)
    with pytest.raises(ArgumentError, match=r"'r' \(ReLU\) is \(2, 4, 3\)"):
        channels("r", relu, x)
    with pytest.raises(ArgumentError, match=r"'r' \(LSTM\) is tuple"):
        channels("r", nn.LSTM(2, 2), (x, x))


# ---- the three speed-up figures


def test_empty_weight_channels_by_hand() -> None:
    conv = nn.Conv2d(4, 2, 3)
    with torch.no_grad():
        conv.weight[:, 1] = 0
        conv.weight[0, 2] = 0  # still read by the other filter
    assert empty_weight_channels(conv) == 0.25
    grouped = nn.Conv2d(4, 4, 1, groups=2)
    with torch.no_grad():
        grouped.weight[:2, 0] = 0  # input 0 of the first group; in the second it is input 2
    assert empty_weight_channels(grouped) == 0.25
    transposed = nn.ConvTranspose2d(4, 2, 3, groups=2)
    with torch.no_grad():
        transposed.weight[3] = 0
    assert empty_weight_channels(transposed) == 0.25
    linear = nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight[:, :3] = 0
    assert empty_weight_channels(linear) == 0.75
    with pytest.raises(ArgumentError, match="ReLU is no convolution"):
        empty_weight_channels(nn.ReLU())


def small() -> tuple[nn.Sequential, Split]:
    """Two input maps, one of them empty in half of the examples, and half the weights gone."""
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0]]).view(2, 2, 1, 1))
        net[0].bias.copy_(torch.tensor([0.0, -100.0]))  # the second map is off
        net[3].weight.fill_(1.0)
        net[3].weight[0] = 0
    images = torch.ones(4, 2, 2, 2)
    images[:2, 1] = 0
    images[3, 0, 0, 0] = 0
    return net, Split(images, torch.zeros(4, dtype=torch.int64))


def test_the_estimates_by_hand() -> None:
    net, split = small()
    found = speedups(net, split, batch_size=2, rounds=2)
    conv, linear = found.rows
    assert (conv.layer, conv.kind, conv.csr_ms) == ("0", "Conv2d", None)
    assert (conv.weight_density, conv.empty_weight_channels) == (0.5, 0.5)
    assert conv.input_density == (32 - 8 - 1) / 32
    assert conv.empty_activation_channels == 2 / 8
    assert conv.channel_ms == pytest.approx(conv.dense_ms * 0.5 * 0.75)
    assert conv.ideal_ms == pytest.approx(conv.dense_ms * 0.5 * 23 / 32)
    assert (linear.layer, linear.kind) == ("3", "Linear")
    assert linear.weight_density == 16 / 24
    assert linear.input_density == 15 / 32
    assert linear.channel_ms == linear.dense_ms
    assert linear.csr_ms is not None
    assert linear.csr_ms > 0
    dense = conv.dense_ms + linear.dense_ms
    assert found.channel == pytest.approx(dense / (conv.channel_ms + linear.channel_ms))
    assert found.ideal == pytest.approx(dense / (conv.ideal_ms + linear.ideal_ms))
    assert found.measured > 0
    assert found.interval is None  # of two pairs
    assert "too few pairs" in found.table()
    found = speedups(net, split, batch_size=2, rounds=8)
    assert found.interval[0] <= found.measured <= found.interval[1]
    assert "95 % interval of (c): " in found.table()
    assert found.as_dict()["measured_interval"] == list(found.interval)
    assert found.batch_size == 2
    data = found.as_dict()
    json.dumps(data)
    assert data["rows"][0]["weight_density"] == 0.5
    lines = found.table().splitlines()
    assert len(lines) == 6
    assert lines[1].split()[:3] == ["0", "50.00", "71.88"]
    assert lines[1].split()[-1] == "-"
    assert "estimated" in lines[-2]


def test_a_network_without_weights_or_activations() -> None:
    net, split = small()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    found = speedups(net, split, rounds=1)
    assert found.ideal == math.inf
    assert found.rows[0].empty_weight_channels == 1.0


def test_csr_computes_the_same_wherever_the_layer_is() -> None:
    g = torch.Generator().manual_seed(0)
    shared = nn.Linear(6, 6)
    with torch.no_grad():
        shared.weight.mul_(torch.rand(6, 6, generator=g) < 0.3)
    net = nn.Sequential(shared, nn.Sequential(nn.Tanh(), shared), nn.Linear(6, 2, bias=False))
    for shape in ((1, 6), (5, 6), (2, 3, 6)):
        x = torch.randn(shape, generator=g)
        twin = to_csr(net, ["0", "1.1", "2"])
        torch.testing.assert_close(twin(x), net(x))
        assert not any(isinstance(m, nn.Linear) for m in twin.modules())
    assert isinstance(net[0], nn.Linear)
    with pytest.raises(ArgumentError, match=r"'1\.0', which is no linear layer"):
        to_csr(net, ["1.0"])
    with pytest.raises(ArgumentError, match="'7'"):
        to_csr(net, ["7"])


class Halved(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * (torch.arange(w.numel()).view_as(w) % 2)


def test_speedups_of_parametrized_layers_and_bad_arguments() -> None:
    net, split = two_units()
    with torch.no_grad():
        net[2].weight.fill_(1.0)
    parametrize.register_parametrization(net[2], "weight", Halved())
    assert speedups(net, split, include="2", rounds=1).rows[0].weight_density == 0.5
    for wrong in ({"batch_size": 0}, {"rounds": 0}):
        with pytest.raises(ArgumentError, match="must be at least 1"):
            speedups(net, split, **wrong)
    with pytest.raises(ArgumentError, match="split is empty"):
        speedups(net, split.take(slice(0, 0)))


def test_best_of_interleaves() -> None:
    order: list[int] = []
    best = best_of([lambda: order.append(0), lambda: order.append(1)], 3)
    assert order == [0, 1, 0, 1, 0, 1]
    assert all(0 <= t < math.inf for t in best)
    with pytest.raises(ArgumentError, match="rounds=0"):
        best_of([], 0)


# ---- plots


def test_pixel_counts() -> None:
    mask = torch.zeros(3, 8, dtype=torch.bool)  # two channels of 1 x 4 pixels
    mask[:, 1] = True
    mask[0, 5] = True
    mask[2, 7] = True
    assert pixel_counts(mask, (2, 1, 4)).tolist() == [[0, 4, 0, 1]]
    with pytest.raises(ArgumentError, match=r"\(3, 8\) does not read"):
        pixel_counts(mask, (1, 3, 3))
    with pytest.raises(ArgumentError, match="does not read"):
        pixel_counts(torch.ones(2, 1, 3, 3).bool(), (1, 3, 3))


MASKS = {
    "a": Masks({"c.weight": torch.tensor([True, False]), "f.weight": torch.ones(4).bool()}),
    "b": Masks({"f.weight": torch.tensor([False] * 4)}),
}


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_every_plot_is_drawn_in_the_format_of_its_suffix(tmp_path: Path, suffix: str) -> None:
    g = torch.Generator().manual_seed(0)
    net, split = two_units()
    kernels = torch.rand(3, 2, 4, 4, generator=g)
    curves = {"ticket": {0.1: [0.9, 0.8], 1.0: [0.95]}, "random": {0.1: [0.5, 0.6]}}
    scores = specialization(net, split).scores
    drawn = [
        layer_densities(MASKS, tmp_path / f"deep/layers.{suffix}"),
        layer_densities(MASKS, tmp_path / f"one.{suffix}", include="f"),
        pictures({"x": torch.eye(4), "y": torch.zeros(4, 4)}, tmp_path / f"pixels.{suffix}"),
        pictures(kernels, tmp_path / f"kernels.{suffix}"),
        pictures(kernels > 0.5, tmp_path / f"mask.{suffix}", columns=3),
        against_density({"accuracy": curves}, tmp_path / f"curves.{suffix}"),
        histograms({"sparse": scores, "dense": scores}, tmp_path / f"pair.{suffix}", low=0.5),
        specialization(net, split).plot(tmp_path / f"single.{suffix}"),
    ]
    start = b"<?xml" if suffix == "svg" else b"\x89PNG"
    for path in drawn:
        assert path.read_bytes().startswith(start)
        assert path.stat().st_size > 1000
    if suffix == "svg":
        text = (tmp_path / "curves.svg").read_text()
        assert "ticket" in text
        assert "accuracy" in text


def test_plots_say_what_they_cannot_draw(tmp_path: Path) -> None:
    path = tmp_path / "x.svg"
    with pytest.raises(ArgumentError, match="masks name no layer"):
        layer_densities({}, path)
    with pytest.raises(ArgumentError, match="matches nothing"):
        layer_densities(MASKS, path, include="conv9")
    with pytest.raises(ArgumentError, match=r"'x' has shape \(3,\)"):
        pictures({"x": torch.ones(3)}, path)
    with pytest.raises(ArgumentError, match=r"\(3, 3\); kernels are"):
        pictures(torch.ones(3, 3), path)
    with pytest.raises(ArgumentError, match="0 pictures"):
        pictures({}, path)
    with pytest.raises(ArgumentError, match="401 pictures"):
        pictures(torch.ones(401, 1, 2, 2), path)
    with pytest.raises(ArgumentError, match="no curve to draw"):
        against_density({"y": {"a": {}}}, path)
    with pytest.raises(ArgumentError, match=r"0 values at density 0\.5"):
        against_density({"y": {"a": {0.5: []}}}, path)
    with pytest.raises(ArgumentError, match="density 0;"):
        against_density({"y": {"a": {0: [1.0]}}}, path)
    with pytest.raises(ArgumentError, match="scores of 0 layers"):
        histograms({}, path, low=0.1)
    assert not path.exists()


def test_without_a_linear_layer_no_speed_up_is_measured() -> None:
    net = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Flatten())
    found = speedups(net, Split(torch.rand(4, 1, 3), torch.arange(4)), rounds=8)
    assert found.measured is found.interval is None
    assert "the same operations" in found.table()
