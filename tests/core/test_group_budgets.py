"""Budgets over groups: exact, stable on ties, never empty; against a search over all lengths."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.group_budgets import (
    FloorWarning,
    GroupBudget,
    group_scores,
    n_of_m,
    select,
    weight_cost,
)
from gossamer.core.groups import Group, Slice, families
from gossamer.core.layer_groups import layer_groups
from gossamer.core.masks import Masks


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.Conv2d(6, 10, 3, bias=False))


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    return {n: w.detach().abs() for n, w in names.weights(model).items()}


def rows(masks: Masks, name: str) -> list[int]:
    return masks[name].flatten(1).all(1).nonzero()[:, 0].tolist()


def test_scores_of_groups_by_hand() -> None:
    (family,) = layer_groups(nn.Sequential(nn.Linear(2, 2)), "row")
    values = {"0.weight": torch.tensor([[3.0, -4.0], [1.0, 1.0]])}
    assert group_scores([family], values)[0].tolist() == [-1, 2]
    assert group_scores([family], values, "mean")[0].tolist() == [-0.5, 1]
    assert group_scores([family], values, "l2")[0].tolist() == pytest.approx([5, math.sqrt(2)])
    with pytest.raises(ArgumentError, match="how='max' is not one of"):
        group_scores([family], values, "max")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"score '0\.weight' holds NaN"):
        group_scores([family], {"0.weight": torch.full((2, 2), math.nan)})


def test_counts_are_exact_and_ties_go_to_the_earlier() -> None:
    model = net()
    made = layer_groups(model, "filter")
    masks = select(made, [torch.ones(6), torch.ones(10)], GroupBudget(0.5))
    assert rows(masks, "0.weight") == [0, 1, 2]
    assert rows(masks, "1.weight") == [0, 1, 2, 3, 4]
    assert masks["0.bias"].tolist() == [True] * 3 + [False] * 3
    scores = [torch.tensor([1.0, 5, 5, 2, 0, 0]), torch.tensor([5.0, 5] + [1] * 8)]
    whole = select(made, scores, GroupBudget(limit=5, scope="global"))
    assert rows(whole, "0.weight") == [1, 2, 3]
    assert rows(whole, "1.weight") == [0, 1]
    by = select(made, scores, GroupBudget({"1": 0.1}))
    assert len(rows(by, "0.weight")) == 6
    assert rows(by, "1.weight") == [0]


@pytest.mark.filterwarnings("ignore::gossamer.core.group_budgets.FloorWarning")
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("multiple", [1, 4])
def test_any_cost_keeps_the_longest_run_that_it_pays_for(scope: Any, multiple: int) -> None:
    for seed in range(4):
        model = net(seed)
        made = layer_groups(model, "filter")
        scores = group_scores(made, magnitudes(model), "l2")
        cost = weight_cost({"0.weight": 49.0, "1.weight": 25.0})
        whole = cost(Masks.of(dict(names.parameters(model))))
        budget = GroupBudget(0.6, scope=scope, multiple=multiple)
        masks = select(made, scores, budget, cost=cost)
        counts = [len(rows(masks, n)) for n in ("0.weight", "1.weight")]
        each = [49.0 * 18, 25.0 * 54]
        spent = sum(c * e for c, e in zip(counts, each, strict=True))
        assert spent == cost(masks)
        assert all(c % multiple == 0 or c == n for c, n in zip(counts, (6, 10), strict=True))
        if scope == "layer":
            for c, n in zip(counts, (6, 10), strict=True):
                most = [k for k in range(1, n + 1) if k <= 0.6 * n + 1e-9]
                assert c == max([multiple, *(k for k in most if k % multiple == 0)])
            continue
        assert spent <= 0.6 * whole
        # the slow way: every length of the ranking, rounded
        ranking = sorted(
            ((-float(s), i, j) for i, part in enumerate(scores) for j, s in enumerate(part))
        )
        best = 0.0
        for length in range(17):
            found = [sum(i == k for _, i, _ in ranking[:length]) for k in (0, 1)]
            rounded = [
                max(multiple, n if n == size else n - n % multiple)
                for n, size in zip(found, (6, 10), strict=True)
            ]
            price = sum(n * e for n, e in zip(rounded, each, strict=True))
            best = max(best, price if price <= 0.6 * whole else 0.0)
        assert spent == best


def test_measured_milliseconds_are_a_cost_like_any() -> None:
    model = net()
    made = layer_groups(model, "filter")
    asked = []

    def milliseconds(masks: Masks) -> float:
        asked.append(masks)
        return 1.0 + 0.5 * len(rows(masks, "0.weight")) + 0.25 * len(rows(masks, "1.weight"))

    scores = group_scores(made, magnitudes(model))
    masks = select(made, scores, GroupBudget(limit=4.0, scope="global"), cost=milliseconds)
    assert milliseconds(masks) in (3.75, 4.0)
    assert len(asked) <= 8
    with pytest.raises(ArgumentError, match=r"budget of 1\.5 is below 1\.75, which 2 groups cost"):
        select(made, scores, GroupBudget(limit=1.5, scope="global"), cost=milliseconds)


def test_a_layer_is_never_emptied_and_it_is_said() -> None:
    model = net()
    made = layer_groups(model, "filter")
    scores = [torch.zeros(6), torch.ones(10)]
    with pytest.warns(FloorWarning, match="^0 would keep fewer"):
        masks = select(made, scores, GroupBudget(0.25, scope="global"))
    assert [len(rows(masks, n)) for n in masks if n.endswith("weight")] == [1, 3]
    with pytest.warns(FloorWarning, match="^0, 1 would keep fewer"):
        select(made, scores, GroupBudget(0.01))
    with pytest.raises(ArgumentError, match="below 2, which 2 groups cost"):
        select(made, scores, GroupBudget(0.05, scope="global"))


def test_alike_groups_compete_by_their_own_mean() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(8, 4))
    made = [*layer_groups(model, "filter"), *layer_groups(model, "row")]
    scores = [torch.tensor([1.0, 2, 3, 4]), torch.tensor([100.0, 200, 300, 400])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FloorWarning)
        plain = select(made, scores, GroupBudget(0.5, scope="global"))
    fair = select(made, scores, GroupBudget(0.5, scope="global", normalise=True))
    assert len(rows(plain, "0.weight")) == 1
    assert rows(fair, "0.weight") == rows(fair, "2.weight") == [2, 3]


def test_coupled_groups_share_a_budget() -> None:
    model = net()
    coupled = [
        Group(
            "channel", f"c{i}", (Slice("0.weight", 0, (i,)), Slice("1.weight", 1, (i,), "consumes"))
        )
        for i in range(6)
    ]
    made = families(coupled, names.parameters(model))
    scores = group_scores(made, magnitudes(model), "l2")
    masks = select(made, scores, GroupBudget(0.5), cost=weight_cost({"0.weight": 4.0}))
    kept = rows(masks, "0.weight")
    assert kept == sorted(scores[0].topk(3).indices.tolist())
    assert masks["1.weight"].any(0).flatten(1).any(1).nonzero()[:, 0].tolist() == kept


def test_n_of_m() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Conv2d(4, 1, 1))
    made = layer_groups(model, "2:4")
    scores = {"0.weight": torch.tensor([[1.0, 3, 3, 3], [9, 0, 0, 0]]), "1.weight": torch.ones(1)}
    masks = n_of_m(made[0], scores)
    assert masks["0.weight"].tolist() == [[False, True, True, False], [True, True, False, False]]
    torch.manual_seed(0)
    whole = magnitudes(nn.Sequential(nn.Linear(8, 3), nn.Conv2d(8, 5, 3)))
    for family in layer_groups(nn.Sequential(nn.Linear(8, 3), nn.Conv2d(8, 5, 3)), "2:4"):
        name = family.parameters[0]
        mask = n_of_m(family, whole)[name]
        by = mask.movedim(1, -1).reshape(-1, 4)
        assert (by.sum(1) == 2).all()
        score = whole[name].movedim(1, -1).reshape(-1, 4)
        assert (score.masked_fill(~by, 9).min(1).values >= score.masked_fill(by, 0).amax(1)).all()
    with pytest.raises(ArgumentError, match="no groups of N:M"):
        n_of_m(layer_groups(model, "row")[0], scores)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "give either density"),
        ({"density": 0.5, "limit": 3.0}, "give either density"),
        ({"density": 0.0}, r"density =0\.0 is outside"),
        ({"density": {"a": 2.0}}, r"density a=2\.0"),
        ({"density": {"a": 0.5}, "scope": "global"}, "needs scope='layer'"),
        ({"limit": math.inf}, "limit=inf"),
        ({"density": 0.5, "floor": -1}, "floor=-1 must be at least 0"),
        ({"density": 0.5, "multiple": 0}, "multiple=0"),
        ({"density": 0.5, "scope": "all"}, "scope='all' is not one of"),
    ],
)
def test_bad_budgets_are_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        GroupBudget(**options)


def test_scores_that_do_not_fit_are_named() -> None:
    made = layer_groups(net(), "filter")
    with pytest.raises(ArgumentError, match="2 families have 1 scores"):
        select(made, [torch.ones(6)], GroupBudget(0.5))
    with pytest.raises(ArgumentError, match=r"of 1> has a score of shape \(6,\)"):
        select(made, [torch.ones(6)] * 2, GroupBudget(0.5))
    with pytest.raises(ArgumentError, match="hold NaN"):
        select(made, [torch.full((6,), math.nan), torch.ones(10)], GroupBudget(0.5))
