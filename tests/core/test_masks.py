import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.core.errors import ArgumentError
from gossamer.core.masks import (
    EmptyLayerWarning,
    Eraser,
    Masks,
    above_quality,
    keep_counts,
    keep_top,
    warn_empty,
)


def test_masks_hold_only_bools() -> None:
    with pytest.raises(ArgumentError, match=r"'w' must be a bool tensor, got torch\.uint8"):
        Masks({"w": torch.ones(2, dtype=torch.uint8)})
    masks = Masks()
    with pytest.raises(ArgumentError, match="got list"):
        masks["w"] = [True]  # type: ignore[assignment]


def test_density_counts_over_all_tensors() -> None:
    masks = Masks({"a": torch.tensor([True, False, False]), "b": torch.tensor([True])})
    assert masks.kept == 2
    assert masks.density == 0.5
    assert masks.densities() == {"a": 1 / 3, "b": 1.0}
    assert Masks().density == 1.0


def test_apply_checks_every_shape_before_it_writes() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = net[0].weight.detach().clone()
    bad = Masks({"0.weight": torch.zeros(2, 2, dtype=torch.bool), "1.weight": torch.ones(3) > 0})
    with pytest.raises(
        ArgumentError, match=r"'1\.weight' has shape \(3,\), its parameter \(2, 2\)"
    ):
        bad.apply_(net)
    assert torch.equal(net[0].weight, before)
    with pytest.raises(ArgumentError, match="'x' has no parameter"):
        Masks({"x": torch.ones(1) > 0}).apply_(net)


def test_apply_turns_nan_and_negative_weights_into_plus_zero() -> None:
    w = torch.tensor([float("nan"), -1.0, 2.0])
    Masks({"w": torch.tensor([False, False, True])}).apply_({"w": w})
    assert w.tolist() == [0.0, 0.0, 2.0]
    assert not torch.signbit(w).any()


def test_the_pattern_of_tensors_is_what_is_not_zero() -> None:
    found = Masks.of({"w": torch.tensor([0.0, 1.0, -0.0, 2.0])})
    assert found["w"].tolist() == [False, True, False, True]


@settings(max_examples=60)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    st.floats(0, 1),
    st.sampled_from(["layer", "global"]),
)
def test_counts_are_exact_and_ties_go_to_the_earlier(
    values: list[int], density: float, scope: str
) -> None:
    score = torch.tensor(values, dtype=torch.float32)
    mask = keep_top({"w": score}, density, scope=scope)["w"]  # type: ignore[arg-type]
    count = int(density * len(values) + 0.5)
    assert int(mask.sum()) == count
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert sorted(mask.nonzero().flatten().tolist()) == sorted(order[:count])


def test_within_narrows_and_never_widens() -> None:
    score = {"w": torch.tensor([5.0, 4.0, 3.0, 2.0])}
    within = Masks({"w": torch.tensor([False, True, True, True])})
    assert keep_top(score, 0.5, within=within)["w"].tolist() == [False, True, True, False]
    assert keep_top(score, 1.0, within=within)["w"].tolist() == [False, True, True, True]
    assert keep_top(score, 1.0, scope="global", within=within)["w"].sum() == 3


def test_a_global_budget_with_a_floor_empties_no_layer() -> None:
    score = {"big": torch.full((8,), 10.0), "small": torch.tensor([1.0, 2.0])}
    bare = keep_top(score, 0.4, scope="global")
    assert not bare["small"].any()
    floored = keep_top(score, 0.4, scope="global", floor=1)
    assert floored["small"].tolist() == [False, True]
    assert floored.kept == 4


@pytest.mark.parametrize(
    ("density", "options", "match"),
    [
        (1.2, {}, "density w=1.2 is outside"),
        (-0.1, {}, "outside"),
        (float("nan"), {}, "outside"),
        ({"x": 0.5}, {}, "different tensors: w, x"),
        ({"w": 0.5}, {"scope": "global"}, "needs scope='layer'"),
        (0.5, {"scope": "net"}, "'net' is not one of"),
    ],
)
def test_bad_budgets_are_named(density: object, options: dict, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        keep_top({"w": torch.ones(3)}, density, **options)  # type: ignore[arg-type]


def test_nan_scores_and_no_scores_are_refused() -> None:
    with pytest.raises(ArgumentError, match="score 'w' holds NaN"):
        keep_top({"w": torch.tensor([1.0, float("nan")])}, 0.5)
    with pytest.raises(ArgumentError, match="scores is empty"):
        keep_top({}, 0.5)


def test_quality_threshold_ignores_the_zeros_of_earlier_rounds() -> None:
    w = torch.tensor([0.0, 0.0, 0.0, 1.0, -1.0, 3.0, -3.0])
    # the non-zero values have standard deviation sqrt(5) = 2.236
    assert above_quality(w, 1.0).tolist() == [False] * 5 + [True, True]
    assert above_quality(w, 0.4).tolist() == [False] * 3 + [True] * 4
    with pytest.raises(ArgumentError, match="quality fc=-1"):
        above_quality(w, -1, name="fc")
    with pytest.raises(ArgumentError, match="holds NaN"):
        above_quality(torch.tensor([float("nan")]), 1.0)


def test_counts_by_hand_from_none_to_all() -> None:
    scores = {"a": torch.tensor([1.0, 3.0, 3.0]), "b": torch.tensor([[2.0, 1.0]])}
    found = keep_counts(scores, {"a": 0, "b": 2})
    assert found["a"].tolist() == [False, False, False]
    assert found["b"].tolist() == [[True, True]]
    assert keep_counts(scores, {"a": 1, "b": 0})["a"].tolist() == [False, True, False]
    within = Masks({"a": torch.tensor([True, False, True]), "b": torch.zeros(1, 2) > 0})
    assert keep_counts(scores, {"a": 2, "b": 0}, within=within)["a"].tolist() == [True, False, True]
    assert keep_counts(scores, {"a": 0, "b": 0}, within=within).kept == 0
    with pytest.raises(ArgumentError, match=r"count b=1 is outside \[0, 0\]"):
        keep_counts(scores, {"a": 2, "b": 1}, within=within)
    with pytest.raises(ArgumentError, match=r"count a=3 is outside \[0, 2\]"):
        keep_counts(scores, {"a": 3, "b": 0}, within=within)
    with pytest.raises(ArgumentError, match=r"count a=-1 is outside \[0, 3\]"):
        keep_counts(scores, {"a": -1, "b": 0})
    with pytest.raises(ArgumentError, match=r"count b=3 is outside \[0, 2\]"):
        keep_counts(scores, {"a": 0, "b": 3})
    with pytest.raises(ArgumentError, match="counts has none for 'b'"):
        keep_counts(scores, {"a": 0})
    with pytest.raises(ArgumentError, match="score 'a' holds NaN"):
        keep_counts({"a": torch.tensor([float("nan")])}, {"a": 0})


def test_densities_of_none_and_all_and_a_half_up() -> None:
    scores = {"a": torch.tensor([1.0, 4.0, 2.0, 3.0, 5.0])}
    assert keep_top(scores, 0.0).kept == 0
    assert keep_top(scores, 1.0).kept == 5
    assert keep_top(scores, 0.1)["a"].tolist() == [False, False, False, False, True]  # 0.5, up
    assert keep_top(scores, 0.0, floor=2)["a"].tolist() == [False, True, False, False, True]
    assert keep_top(scores, 0.0, floor=9).kept == 5


def test_a_quality_counts_exactly_what_is_above() -> None:
    # std over the non-zero weights is 1 exactly: the values at the threshold itself go
    w = torch.tensor([0.0, 2.0, -2.0, 2.0, -2.0, 0.0])
    assert above_quality(w, 1.0).tolist() == [False] * 6
    assert above_quality(w, 0.99).tolist() == [False, True, True, True, True, False]
    assert above_quality(w, 0).tolist() == (w != 0).tolist()
    ones = torch.tensor([1.0, 1.0, 1.0, 4.0])  # a weight of 1 is no zero
    assert above_quality(ones, 1.0).tolist() == [False, False, False, True]
    assert above_quality(ones, 0.7).tolist() == [True] * 4
    with pytest.raises(ArgumentError, match="at least 0"):
        above_quality(w, -1e-9)


def test_a_layer_that_keeps_nothing_is_warned_of_and_no_other() -> None:
    some = torch.tensor([True, False])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_empty(Masks({"a": some, "none to keep": torch.zeros(0, dtype=torch.bool)}))
    with pytest.warns(EmptyLayerWarning, match="layer 'b' keeps none of its 2 weights"):
        warn_empty(Masks({"a": some, "b": torch.zeros(2, dtype=torch.bool)}))


def test_ties_go_to_the_earlier_however_many_there_are() -> None:
    score = torch.arange(40_000).remainder(3).double()
    kept = keep_counts({"w": score}, {"w": 20_000})["w"]
    twos, ones = score == 2, score == 1
    assert kept[twos].all()
    left = 20_000 - int(twos.sum())
    assert kept[ones].nonzero().flatten().tolist() == list(range(left))
    assert not kept[score == 0].any()


def test_an_eraser_makes_its_bits_once() -> None:
    mask = torch.tensor([True, False, True])
    eraser = Eraser(Masks({"w": mask}), {"w": torch.tensor([0.0, -0.0, 0.0])})
    for _ in range(2):
        w = torch.tensor([1.0, 2.0, float("nan")])
        eraser.erase_("w", w)
        assert w[:2].tolist() == [1.0, 0.0]
        eraser.hold_("w", w)
        assert math.copysign(1.0, float(w[1])) == -1.0  # bit for bit
