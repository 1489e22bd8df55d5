"""What goes together, as data."""

import pytest
import torch
from torch import nn

from gossamer.core.errors import ArgumentError
from gossamer.nets.language import LSTMLM
from gossamer.nets.resnet import resnet
from gossamer.nets.transformer import GPT
from gossamer.structure.coupling import coupled_groups


def test_channels_with_their_norm_and_their_readers() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    )
    groups = coupled_groups(net, torch.randn(2, 1, 4, 4))
    assert [g.name for g in groups] == [f"0 channel[{i}]" for i in range(3)]
    found = {(m.parameter, m.axis): (m.index, m.role) for m in groups[1].members}
    assert found == {
        ("0.weight", 0): ((1,), "produces"),
        ("0.bias", 0): ((1,), "produces"),
        ("1.weight", 0): ((1,), "scales"),
        ("1.bias", 0): ((1,), "scales"),
        ("4.weight", 1): ((4, 5, 6, 7), "consumes"),
    }


def test_the_residual_stream_is_one_group_a_channel() -> None:
    groups = coupled_groups(resnet(8), torch.randn(1, 3, 32, 32), ["channel"])
    sizes = [len({m.parameter for m in g.members}) for g in groups]
    # the first stage's stream runs on through both others to the linear layer; the channels that
    # the shortcuts pad with zeros cannot go, for the padding is a number
    assert len(groups) == 16 + (16 + 32 + 64)
    assert max(sizes) > 15


def test_states_heads_and_units() -> None:
    lm = coupled_groups(LSTMLM(9, 4, (5, 6)), torch.randint(9, (2, 3)), ["unit"])
    assert len(lm) == 11
    first = {(m.parameter, m.axis): m.index for m in lm[0].members}
    assert first[("rnn.0.weight_ih_l0", 0)] == (0, 5, 10, 15)
    assert first[("rnn.0.weight_hh_l0", 1)] == (0,)
    assert first[("rnn.1.weight_ih_l0", 1)] == (0,)
    gpt = coupled_groups(GPT(9, 8, 8, 1, 2, tied=True), torch.randint(9, (2, 3)))
    assert sorted({g.kind for g in gpt}) == ["feed-forward", "head"]
    head = next(g for g in gpt if g.kind == "head")
    assert {m.parameter: m.index for m in head.members}["block.0.attention.packed.weight"] == (
        *range(4), *range(8, 12), *range(16, 20),
    )  # fmt: skip
    assert "block.0.attention.packed head[0]: " in str(head)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ArgumentError, match="kinds='layer'"):
        coupled_groups(nn.Linear(2, 2), torch.randn(1, 2), ["layer"])
