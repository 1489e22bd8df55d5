"""Tensors in tuples, lists and mappings."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from gossamer.core import nest
from gossamer.core.errors import ArgumentError

Pair = namedtuple("Pair", "a b")


def test_leaves_come_in_order_and_other_values_are_passed_over():
    found = nest.leaves({"x": torch.ones(1), "y": (torch.ones(2), None, [torch.ones(3)]), "z": 5})
    assert [len(t) for t in found] == [1, 2, 3]


def test_mapped_keeps_the_structure():
    value = {"x": Pair(torch.ones(2), None), "y": [torch.zeros(1)], "z": (torch.ones(1),)}
    found = nest.mapped(lambda t: t + 1, value)
    assert isinstance(found["x"], Pair)
    assert found["x"].a.tolist() == [2, 2]
    assert found["x"].b is None
    assert found["y"][0].tolist() == [1]
    assert found["z"][0].tolist() == [2]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ((torch.ones(2), torch.ones(3)), "first dimension"),
        (torch.tensor(1.0), "scalar"),
        ({"x": "text"}, "no tensor"),
    ],
)
def test_what_cannot_be_counted_is_refused(value, said):
    with pytest.raises(ArgumentError, match=said):
        nest.count(value)


class Sum(nn.Module):
    def forward(self, first, second=None):
        return first if second is None else first + 2 * second


def test_mappings_go_in_by_name_and_tuples_in_order():
    one, two = torch.ones(1), torch.full((1,), 3.0)
    assert nest.feed(Sum(), one).item() == 1
    assert nest.feed(Sum(), (one, two)).item() == 7
    assert nest.feed(Sum(), {"second": one, "first": two}).item() == 5


@dataclass
class Answer:
    logits: torch.Tensor
    more: tuple[torch.Tensor, ...] = ()
    words: str = ""


def test_a_dataclass_is_a_nest() -> None:
    made = Answer(torch.zeros(2, 3), (torch.ones(2),), "x")
    assert [tuple(t.shape) for t in nest.leaves(made)] == [(2, 3), (2,)]
    back = nest.mapped(lambda t: t + 1, made)
    assert isinstance(back, Answer)
    assert back.words == "x"
    assert float(back.logits.sum()) == 6
    assert float(back.more[0].sum()) == 4
    assert nest.leaves(Answer) == []
