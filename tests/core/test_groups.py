"""Groups as data, and their families against sums by hand over sets of weights."""

import math

import pytest
import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.core.groups import Family, Group, Slice, families, masks_of, zero_masks

G = torch.Generator().manual_seed(0)
WEIGHTS = {
    "a.weight": torch.randn(4, 3, 2, 2, generator=G),
    "a.bias": torch.randn(4, generator=G),
    "b.weight": torch.randn(5, 5, generator=G),
}


def places(group: Group, name: str) -> set[int]:
    """The slow way: every place of a parameter that a slice holds."""
    found: set[int] = set()
    for piece in group.members:
        if piece.parameter == name:
            shape = piece.view or tuple(WEIGHTS[name].shape)
            for flat in range(math.prod(shape)):
                where = torch.unravel_index(torch.tensor(flat), shape)
                if int(where[piece.axis]) in piece.index:
                    found.add(flat)
    return found


def total(group: Group, values: dict[str, Tensor]) -> float:
    return sum(
        float(values[n].reshape(-1)[i]) for n in values for i in places(group, n)
    )  # each once


GROUPS = [
    Group("unit", "one", (Slice("a.weight", 0, (0, 2)), Slice("a.bias", 0, (0, 2)))),
    Group("unit", "two", (Slice("a.weight", 1, (1,), "consumes"),)),
    Group(
        "cross",
        "three",
        (Slice("b.weight", 0, (1, 3)), Slice("b.weight", 1, (1, 2), "consumes")),
    ),
    Group("cross", "four", (Slice("b.weight", 1, (2,)), Slice("b.weight", 0, (2,)))),
    Group("cross", "five", (Slice("b.weight", 0, (0,)), Slice("b.weight", 0, (0, 4)))),
    Group("many", "six", (Slice("a.weight", 0, (1,)), Slice("a.weight", 2, (0,)),
                          Slice("a.weight", 0, (3, 7), view=(24, 2)))),
]  # fmt: skip


def test_each_level_of_a_recurrent_module_is_a_layer() -> None:
    """One budget for all levels could leave the last without a unit."""
    rnn = torch.nn.Sequential(torch.nn.LSTM(3, 4, 2, bidirectional=True))
    tensors = dict(rnn.named_parameters())
    groups = [
        Group("unit", f"{tail}[{i}]", (Slice(f"0.weight_ih{tail}", 0, (i, i + 4, i + 8, i + 12)),))
        for tail in ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
        for i in range(4)
    ]
    made = families(groups, tensors)
    assert [(f.layer, len(f)) for f in made] == [
        ("0_l0", 4), ("0_l0_reverse", 4), ("0_l1", 4), ("0_l1_reverse", 4),
    ]  # fmt: skip
    alone = Group("unit", "a", (Slice("weight_hh_l0", 0, (0,)),))
    assert families([alone], dict(torch.nn.GRU(3, 4).named_parameters()))[0].layer == "l0"
    named = Group("row", "b", (Slice("weight_ih_later", 0, (0,)),))  # torch names none so
    assert families([named], {"weight_ih_later": torch.ones(2, 2)})[0].layer == "weight_ih_later"


def test_sums_sizes_norms_and_spread_agree_with_sets_of_places() -> None:
    made = families(GROUPS, WEIGHTS)
    assert [f.kind for f in made] == ["unit", "cross", "many"]
    flat = [(f, i) for f in made for i in range(len(f))]
    for (family, number), group in zip(flat, GROUPS, strict=True):
        assert float(family.sums(WEIGHTS)[number]) == pytest.approx(total(group, WEIGHTS), abs=1e-5)
        squares = {n: w.square() for n, w in WEIGHTS.items()}
        assert float(family.norms(WEIGHTS)[number]) == pytest.approx(
            total(group, squares) ** 0.5, abs=1e-5
        )
        assert int(family.sizes()[number]) == sum(len(places(group, n)) for n in WEIGHTS)
        assert family.name(number) == group.name == family[number].name
        for name in family.parameters:
            ones = torch.zeros(len(family))
            ones[number] = 1
            inside = family.spread(ones, name).reshape(-1)
            assert set(inside.nonzero()[:, 0].tolist()) == places(group, name)
            assert inside.max() <= 1


def test_a_group_prints_itself_and_comes_back_as_data() -> None:
    assert str(GROUPS[0]) == "one: a.weight[0+2], a.bias[0+2]"
    assert str(Slice("w", 2, tuple(range(9)))) == "w[:, :, 0:9]"
    assert str(Slice("w", 0, tuple(range(0, 40, 2)), view=(40,))).endswith("[0+2+4+6+...+38]")
    family = families(GROUPS[:1], WEIGHTS)[0]
    assert list(family) == GROUPS[:1]
    assert repr(family) == "<1 unit groups of a>"
    with pytest.raises(IndexError):
        family[1]


def test_masks_remove_what_any_removed_group_holds() -> None:
    family = families(GROUPS[2:5], WEIGHTS)[0]
    masks = masks_of([(family, torch.tensor([True, False, False]))])
    gone = places(GROUPS[3], "b.weight") | places(GROUPS[4], "b.weight")
    assert set((~masks["b.weight"]).reshape(-1).nonzero()[:, 0].tolist()) == gone


def test_zero_masks_hold_whole_groups_only() -> None:
    weights = {n: w.clone() for n, w in WEIGHTS.items()}
    family = families(GROUPS[:2], weights)[0]
    weights["a.weight"][:, 1] = 0
    weights["a.weight"][3] = 0  # of no group
    masks = zero_masks([family], weights)
    assert not masks["a.weight"][:, 1].any()
    assert masks["a.weight"][3, 0].all()
    assert masks["a.bias"].all()


def test_weights_only_leaves_biases_out() -> None:
    family: Family = families(GROUPS[:1], WEIGHTS)[0].weights_only()
    assert family.parameters == ["a.weight"]


@pytest.mark.parametrize(
    ("piece", "told"),
    [
        (Slice("c.weight", 0, (0,)), "no parameter 'c.weight'"),
        (Slice("b.weight", 2, (0,)), "does not fit"),
        (Slice("b.weight", 0, (0,), view=(4, 6)), "does not fit"),
        (Slice("b.weight", 0, (5,)), "outside"),
    ],
)
def test_members_that_do_not_fit_are_named(piece: Slice, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        families([Group("row", "g", (piece,))], WEIGHTS)


def test_a_family_of_another_network_is_refused() -> None:
    family = families(GROUPS[:1], WEIGHTS)[0]
    with pytest.raises(ArgumentError, match=r"no parameter .a\.weight."):
        family.check({})
    with pytest.raises(ArgumentError, match=r"has shape \(1,\)"):
        family.check({"a.weight": torch.ones(1)})
    with pytest.raises(ArgumentError, match="no members"):
        families([Group("row", "g", ())], WEIGHTS)
    with pytest.raises(ArgumentError, match=r"values has none of a\.weight"):
        family.sums({})
