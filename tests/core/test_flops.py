"""Multiply-accumulates: hand-computed cases, and torch's own counter as an oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gossamer import nets
from gossamer.core.errors import ArgumentError
from gossamer.core.flops import Flops, count


def rows(found: Flops) -> dict[str, tuple[float, float, float]]:
    return {row.name: (row.macs, row.nonzero, row.live) for row in found.rows}


def kill(weight: Tensor, *outputs: int) -> None:
    with torch.no_grad():
        weight[list(outputs)] = 0


def test_resnet_20_is_the_40_6_million_of_its_paper() -> None:
    found = count(nets.build("resnet-20"), torch.zeros(1, 3, 32, 32))
    assert found.macs == found.nonzero == found.live == 40_551_040
    assert rows(found)["conv1.weight"][0] == 32 * 32 * 16 * 27
    assert rows(found)["linear.weight" if "linear.weight" in rows(found) else "fc.weight"][0] == 640


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn, self.head = kind(8, 6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 6, 2, 2, groups=2),
        nn.Conv2d(6, 4, 1, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, 3),
    )


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (convolutions(), torch.zeros(2, 4, 8, 8)),
        (Recurrent(nn.LSTM), torch.zeros(2, 5, 8)),
        (Recurrent(nn.GRU), torch.zeros(2, 5, 8)),
        (nn.Conv1d(4, 6, 3, dilation=2), torch.zeros(2, 4, 9)),
        (nn.Linear(4, 3), torch.zeros(2, 7, 4)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_dense_counts_are_torchs(model: nn.Module, example: Tensor) -> None:
    counter = FlopCounterMode(display=False)
    fused = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # its recurrent layers are one operator, not counted
    try:
        with counter, torch.no_grad():
            model(example)
    finally:
        torch._C._set_mkldnn_enabled(fused)
    assert count(model, example).macs == counter.get_total_flops() / 2 / len(example)


def test_dead_filters_leave_the_layers_behind_them() -> None:
    net = convolutions()
    kill(net[0].weight, 0)
    found = rows(count(net, torch.zeros(2, 4, 8, 8)))
    assert found["0.weight"] == (9216, 9216 * 7 / 8, 9216 * 7 / 8)
    assert found["3.weight"] == (2592, 2592, 2592 * 7 / 8)  # its depthwise filter has no input
    # 8 -> 6 in 2 groups at 6 x 6 places of 2 x 2: one of four inputs of the first group is dead
    assert found["4.weight"] == (36 * 96, 36 * 96, 36 * 96 * 7 / 8)
    assert found["5.weight"] == (6 * 6 * 24,) * 3  # all six are still made of others


def test_a_dead_filter_with_a_constant_and_zero_columns() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2), nn.Linear(2, 5))
    kill(net[0].weight, 1)  # sigmoid(bias), a constant
    with torch.no_grad():
        net[2].weight[:, 3] = 0  # reads three of four, one of them the constant
    kill(net[2].weight, 0)
    found = rows(count(net, torch.ones(1, 4)))
    assert found["0.weight"] == (16, 12, 12)
    assert found["2.weight"] == (8, 3, 2)
    assert found["3.weight"] == (10, 10, 5)


def test_residuals_keep_a_channel_alive_and_concatenation_its_place() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
            self.c, self.d = nn.Conv2d(2, 3, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = self.a(x), self.b(x)
            return self.c(a + b), self.d(torch.cat([a, b], 1))

    net = Branches()
    kill(net.a.weight, 0)
    found = rows(count(net, torch.ones(1, 2, 1, 1)))
    assert found["c.weight"] == (6, 6, 6)
    assert found["d.weight"] == (12, 12, 9)
    kill(net.b.weight, 0)
    found = rows(count(net, torch.ones(1, 2, 1, 1)))
    assert found["c.weight"] == (6, 6, 3)
    assert found["d.weight"] == (12, 12, 6)


def test_a_norm_without_gain_is_a_constant() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    kill(net[1].weight, 0, 1)
    assert rows(count(net, torch.ones(1, 1, 2, 2)))["3.weight"] == (24, 24, 8)


def test_dead_units_of_an_lstm() -> None:
    net = Recurrent(nn.LSTM)
    for weight in (net.rnn.weight_ih_l0, net.rnn.weight_hh_l0):
        kill(weight, 0, 6, 12, 18)  # the four gates of unit 0
    found = rows(count(net, torch.zeros(2, 5, 8)))
    assert found["rnn.weight_ih_l0"] == (5 * 24 * 8, 5 * 20 * 8, 5 * 20 * 8)
    assert found["rnn.weight_hh_l0"] == (5 * 24 * 6, 5 * 20 * 6, 5 * 20 * 5)
    assert found["rnn.weight_ih_l1"] == (5 * 24 * 6, 5 * 24 * 6, 5 * 24 * 5)
    assert found["rnn.weight_hh_l1"] == (5 * 24 * 6,) * 3


def test_heads_and_units_of_a_transformer_layer() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.zeros(2, 5, 16)
    whole = rows(count(layer, x))
    assert whole["self_attn.in_proj_weight"][0] == 5 * 16 * 48
    assert whole["self_attn (product)"][0] == 2 * 5 * 5 * 16
    kill(layer.linear1.weight, *range(10))
    with torch.no_grad():
        layer.self_attn.in_proj_weight.view(3, 2, 8, 16)[:, 0] = 0  # a head
        layer.self_attn.in_proj_bias.zero_()
    found = rows(count(layer, x))
    assert found["self_attn.in_proj_weight"] == (3840, 1920, 1920)
    assert found["self_attn.out_proj.weight"] == (1280, 1280, 640)
    assert found["linear2.weight"] == (2560, 2560, 2560 * 22 / 32)
    assert torch.backends.mha.get_fastpath_enabled()


def test_low_rank_pairs_embeddings_and_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.pair = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4))

        def forward(self, ids: Tensor) -> Tensor:
            return self.pair(self.table(ids)) @ self.table.weight.t()

    found = rows(count(Tied(), torch.zeros(2, 3, dtype=torch.int64)))
    assert found == {
        "pair.0.weight": (12,) * 3,
        "pair.1.weight": (12,) * 3,
        "table.weight": (3 * 4 * 9,) * 3,
    }


def test_decisions_by_value_count_as_alive() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x.float())
            h = h * (h > 0)
            return self.c(torch.where(h > 1, self.b(h), torch.zeros_like(h)))

    found = count(Gate(), torch.zeros(2, 3, dtype=torch.uint8))
    assert found.live == found.macs == 12 + 16 + 8


def test_masks_wrappers_and_the_model_itself() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    nn.utils.prune.l1_unstructured(net[0], "weight", 36)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = count(nn.DataParallel(net).half(), torch.zeros(1, 2, 3, 3).half())
    assert found.totals() == {"macs": 72, "nonzero": 36, "live": found.live}
    net.float()
    assert all(torch.allclose(v, before[k], atol=1e-3) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules())
    assert "total" in str(found)
    assert found.as_dict()["rows"][0]["name"] == "0.weight"


def test_what_cannot_be_counted() -> None:
    with pytest.raises(ArgumentError, match="holds no tensor"):
        count(nn.Linear(2, 2), None)
    with pytest.raises(ArgumentError, match=r"Linear on \(1, 3\) float32 cannot be counted"):
        count(nn.Linear(2, 2), torch.zeros(1, 3))
