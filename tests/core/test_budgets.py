"""Budgets by layer: exact totals, whatever the distribution."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.budgets import DISTRIBUTIONS, apportion, layer_counts, random_masks
from gossamer.core.errors import ArgumentError

SHAPES = {"conv": (16, 3, 3, 3), "fc": (100, 400), "out": (10, 100)}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5, 0.9, 1.0])
def test_counts_sum_to_the_density_and_fit(distribution, density):
    counts = layer_counts(SHAPES, density, distribution)
    sizes = {n: math.prod(s) for n, s in SHAPES.items()}
    assert sum(counts.values()) == int(density * sum(sizes.values()) + 0.5)
    assert all(0 <= counts[n] <= sizes[n] for n in sizes)


def test_erdos_renyi_by_hand():
    # densities in proportion (10+10)/100 : (10+90)/900, so weights 20 : 100 of 200
    assert layer_counts({"a": (10, 10), "b": (10, 90)}, 0.2, "erdos-renyi") == {"a": 33, "b": 167}
    # with kernels: (4+2+3+3)/72 * 72 = 12 and (6+4)/24 * 24 = 10, of 44 in all
    kernels = layer_counts({"c": (4, 2, 3, 3), "f": (6, 4)}, 44 / 96, "er-kernel")
    assert kernels == {"c": 24, "f": 20}
    # without: (4+2)/8 * 72 = 54 and 10
    assert layer_counts({"c": (4, 2, 3, 3), "f": (6, 4)}, 32 / 96, "erdos-renyi") == {
        "c": 27,
        "f": 5,
    }


def test_a_layer_that_is_full_gives_the_rest_to_the_others():
    counts = layer_counts({"a": (2, 2), "b": (10, 90)}, 0.5, "erdos-renyi")
    assert counts == {"a": 4, "b": 448}


def test_equal_overflow_by_hand():
    # claims 60, 30, 10 of 100; a holds 20, so 40 more: 20 each; c holds 25: 5 more to b
    counts = apportion({"a": 6, "b": 3, "c": 1}, 100, {"a": 20, "b": 90, "c": 25}, overflow="equal")
    assert counts == {"a": 20, "b": 55, "c": 25}
    proportional = apportion({"a": 6, "b": 3, "c": 1}, 100, {"a": 20, "b": 90, "c": 25})
    assert proportional == {"a": 20, "b": 60, "c": 20}


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 50)), min_size=1, max_size=6),
    st.floats(0, 1),
    st.sampled_from(["proportional", "equal"]),
)
def test_apportion_is_exact_and_within_capacity(rows, part, overflow):
    shares = {str(i): s for i, (s, _) in enumerate(rows)}
    capacity = {str(i): c for i, (_, c) in enumerate(rows)}
    total = int(part * sum(capacity.values()))
    if total and not sum(shares.values()):
        with pytest.raises(ArgumentError, match="nowhere to go"):
            apportion(shares, total, capacity, overflow=overflow)
        return
    counts = apportion(shares, total, capacity, overflow=overflow)
    assert sum(counts.values()) == total
    assert all(0 <= counts[n] <= capacity[n] for n in capacity)


def test_densities_of_the_users_own():
    own = {"conv": 1.0, "fc": 0.1, "out": 0.5}
    assert layer_counts(SHAPES, own) == {"conv": 432, "fc": 4000, "out": 500}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((SHAPES, 0.0), r"density =0.0 is outside \(0, 1\]"),
        ((SHAPES, 1.5), "outside"),
        ((SHAPES, float("nan")), "outside"),
        ((SHAPES, 0.5, "gaussian"), "'gaussian' is not one of uniform"),
        (({}, 0.5), "no layer"),
        ((SHAPES, {"conv": 0.5}), "name different tensors: fc, out"),
        ((SHAPES, {"conv": 0.5, "fc": 2, "out": 1}), "fc=2"),
    ],
)
def test_bad_budgets_are_refused(arguments, told):
    with pytest.raises(ArgumentError, match=told):
        layer_counts(*arguments)


def test_apportion_refuses_what_cannot_be():
    with pytest.raises(ArgumentError, match="all capacities together"):
        apportion({"a": 1}, 5, {"a": 4})
    with pytest.raises(ArgumentError, match="at least 0 and finite"):
        apportion({"a": -1, "b": 2}, 1, {"a": 4, "b": 4})


def test_random_masks_have_exact_counts_and_follow_the_generator():
    counts = layer_counts(SHAPES, 0.1)
    masks = random_masks(SHAPES, counts, torch.Generator().manual_seed(0))
    assert {n: int(m.sum()) for n, m in masks.items()} == counts
    again = random_masks(SHAPES, counts, torch.Generator().manual_seed(0))
    other = random_masks(SHAPES, counts, torch.Generator().manual_seed(1))
    assert all(torch.equal(masks[n], again[n]) for n in masks)
    assert any(not torch.equal(masks[n], other[n]) for n in masks)
    with pytest.raises(ArgumentError, match=r"out=1001 is outside \[0, 1000\]"):
        random_masks(SHAPES, {**counts, "out": 1001}, torch.Generator())


def test_counts_of_random_masks_from_none_to_all():
    generator = torch.Generator().manual_seed(0)
    masks = random_masks({"a": (2, 3), "b": (4,)}, {"a": 0, "b": 4}, generator)
    assert masks["a"].shape == (2, 3)
    assert not masks["a"].any()
    assert masks["b"].all()
    for bad in (-1, 5):
        with pytest.raises(ArgumentError, match=rf"count a={bad} is outside \[0, 4\]"):
            random_masks({"a": (4,)}, {"a": bad}, generator)


def test_apportion_by_hand():
    # all claims zero beside a full one: the excess goes to the others in equal parts
    assert apportion({"a": 1.0, "b": 0.0, "c": 0.0}, 6, {"a": 2, "b": 4, "c": 4}) == {
        "a": 2,
        "b": 2,
        "c": 2,
    }
    # 10 * 5/6 = 8.33 and 1.67: the largest remainder rounds up
    assert apportion({"a": 5.0, "b": 1.0}, 10, {"a": 10, "b": 10}) == {"a": 8, "b": 2}
    # ties to the earlier
    assert apportion({"a": 1.0, "b": 1.0}, 3, {"a": 9, "b": 9}) == {"a": 2, "b": 1}
    # exactly all that there is room for, and nothing
    assert apportion({"a": 1.0, "b": 9.0}, 5, {"a": 2, "b": 3}) == {"a": 2, "b": 3}
    assert apportion({"a": 1.0}, 0, {"a": 2}) == {"a": 0}
    assert apportion({"a": 0.0}, 0, {"a": 2}) == {"a": 0}
    # the last unit finds the first of largest remainder full
    assert apportion({"a": 3.0, "b": 2.0}, 3, {"a": 1, "b": 9}) == {"a": 1, "b": 2}
