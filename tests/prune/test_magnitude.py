import copy
import math

import pytest
import torch
from torch import nn

from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.datasets import Split
from gossamer.prune import EmptyLayerWarning, magnitude, prune, rescale_dropout, scan


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3), nn.Dropout(0.2)
    )


def test_density_by_pattern_counts_exactly() -> None:
    model = net()
    masks = prune(model, {"*": 0.5, "3": 1 / 3})
    assert {n: int(m.sum()) for n, m in masks.items()} == {"0.weight": 12, "3.weight": 6}
    kept = model[0].weight[masks["0.weight"]].abs().min()
    gone = model[0].weight[~masks["0.weight"]].abs().max()
    assert kept >= gone


def test_threshold_is_quality_times_std_over_the_living() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.0, 1.0, -1.0, 4.0]])
    # living: 1, -1, 4: mean 4/3, std sqrt(14/3 - ...) = 2.0548
    std = float(torch.tensor([1.0, -1.0, 4.0]).std(correction=0))
    assert std == pytest.approx(2.0548, abs=1e-4)
    masks = magnitude.threshold_masks(model, 0.9 / std)
    assert masks["0.weight"].tolist() == [[False, True, True, True]]
    masks = magnitude.threshold_masks(model, {"0": 1.1 / std})
    assert masks["0.weight"].tolist() == [[False, False, False, True]]


def test_unnamed_layers_stay_whole() -> None:
    model = net()
    model[3].weight.data[0, 0] = 0
    assert magnitude.threshold_masks(model, {"0": 1.0})["3.weight"].all()


def test_ladder_removes_the_same_fraction_each_round() -> None:
    ladder = magnitude.density_ladder({"w": 0.125}, 3)
    assert [round(step["w"], 12) for step in ladder] == [0.5, 0.25, 0.125]
    with pytest.raises(ArgumentError, match="rounds=0"):
        magnitude.density_ladder({"w": 0.1}, 0)


def test_dropout_follows_the_square_root_of_the_kept_connections() -> None:
    model = net()
    masks = prune(model, {"0": 0.25, "3": 1 / 9})
    old = rescale_dropout(model, masks)
    assert old == {"2": 0.5, "4": 0.2}
    assert model[2].p == pytest.approx(0.5 * math.sqrt(6 / 24))
    assert model[4].p == pytest.approx(0.2 * math.sqrt(2 / 18))
    with pytest.raises(ArgumentError, match="'1', which is no dropout"):
        rescale_dropout(model, masks, layers={"1": "0.weight"})
    with pytest.raises(ArgumentError, match=r"'9\.weight', masks are"):
        rescale_dropout(model, masks, layers={"2": "9.weight"})


def test_a_layer_that_empties_is_warned_of_and_a_floor_prevents_it() -> None:
    model = net()
    with pytest.warns(EmptyLayerWarning, match=r"'3\.weight' keeps none of its 18 weights"):
        prune(model, {"3": 0.0}, floor=0)
    assert prune(model, {"3": 0.0})["3.weight"].sum() == 1


def test_random_scores_come_from_the_generator() -> None:
    one, two = (magnitude.random_scores(net(), torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no weight to prune"):
        prune(nn.Sequential(nn.ReLU()), 0.5)


class Interrupting(nn.Module):
    """Raises KeyboardInterrupt at its third evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(4, 2), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        out: torch.Tensor = self.fc(x)
        return out


def split() -> Split:
    g = torch.Generator().manual_seed(0)
    return Split(torch.randn(20, 4, generator=g), torch.randint(0, 2, (20,), generator=g))


def test_the_scan_measures_every_layer_and_leaves_the_model_bit_for_bit() -> None:
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    told: list[tuple[int, int]] = []
    found = scan(
        model,
        split(),
        densities=(1.0, 0.5, 0.25),
        progress=lambda done, all_: told.append((done, all_)),
    )
    assert told == [(i, 6) for i in range(1, 7)]
    assert found.layers == ["0.weight", "3.weight"]
    assert [p[0] for p in found.as_dict()["0.weight"]] == [1.0, 0.5, 0.25]
    assert found.as_dict()["0.weight"][0][1] == found.base
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert "0.weight" in found.table()


def test_an_interrupted_scan_gives_the_weights_back() -> None:
    model = Interrupting()
    before = model.fc.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        scan(model, split(), densities=(0.5, 0.25))
    assert torch.equal(model.fc.weight, before)


def test_suggestions_stop_at_the_first_density_that_fails() -> None:
    from gossamer.prune.sensitivity import Sensitivity

    accuracies = {1.0: 0.9, 0.5: 0.9, 0.25: 0.7, 0.1: 0.9}
    rows = tuple(
        {"layer": "a", "setting": d, "density": d, "score": a, "loss": 0.0}
        for d, a in accuracies.items()
    )
    found = Sensitivity(rows, 0.9)
    assert found.suggest(0.01) == {"a": 0.5}
    assert found.suggest(0.3) == {"a": 0.1}
    with pytest.raises(ArgumentError, match="max_drop=2"):
        found.suggest(2)


def test_the_scan_is_drawn(tmp_path: object) -> None:
    found = scan(net(), split(), densities=(1.0, 0.5))
    path = found.plot(f"{tmp_path}/scan.svg")
    assert "0.weight" in path.read_text()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "depth"}, "'depth' is not one of"),
        ({"densities": ()}, "densities is empty"),
        ({"densities": (1.5,)}, "outside"),
        ({"include": "x"}, "matches nothing"),
    ],
)
def test_bad_scans_are_named(options: dict, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        scan(net(), split(), **options)


def test_masked_networks_are_pruned_further_within() -> None:
    model = net()
    first = prune(model, 0.5)
    second = prune(model, 0.25, within=first)
    assert all(bool((second[n] <= first[n]).all()) for n in first)
    assert isinstance(second, Masks)


def test_dropout_rescaled_twice_is_rescaled_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.8), nn.Linear(4, 2))
    quarter = torch.zeros(4, 4, dtype=torch.bool)
    quarter[0] = True  # 4 of 16: sqrt is 1/2
    masks = Masks({"0.weight": quarter})
    assert rescale_dropout(model, masks) == {"1": 0.8}
    assert rescale_dropout(model, masks) == {"1": 0.8}
    assert model[1].p == pytest.approx(0.4)
    one = torch.zeros(4, 4, dtype=torch.bool)
    one[0, 0] = True  # a later round: 1 of 16
    assert rescale_dropout(copy.deepcopy(model), Masks({"0.weight": one})) == {"1": 0.8}
    assert rescale_dropout(model, Masks({"0.weight": one})) == {"1": 0.8}
    assert model[1].p == pytest.approx(0.2)
    model[1].p = 0.6  # a rate that the user gives is a new one
    assert rescale_dropout(model, masks) == {"1": 0.6}
    assert model[1].p == pytest.approx(0.3)
