from typing import Any

import pytest
import torch
from torch import nn

from gossamer import datasets
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import EmptyLayerWarning, Eraser, Masks
from gossamer.core.method import Masked
from gossamer.prune.deconstruct import (
    CRITERIA,
    KEPT,
    REMOVED,
    apply_actions,
    criterion_masks,
    scores,
)
from gossamer.training import TrainConfig, train

WI = {"w": torch.tensor([1.0, -2.0, 0.5, -0.5, 0.0])}
WF = {"w": torch.tensor([3.0, 1.0, -2.0, -0.25, 4.0])}
# by hand, alpha = 2 for the two that take both magnitudes
EXPECTED = {
    "large_final": [3, 1, 2, 0.25, 4],
    "small_final": [-3, -1, -2, -0.25, -4],
    "large_init": [1, 2, 0.5, 0.5, 0],
    "small_init": [-1, -2, -0.5, -0.5, 0],
    "large_init_large_final": [1, 2, 0.5, 0.5, 0],  # min of 6 2 4 .5 8 and 1 2 .5 .5 0
    "small_init_small_final": [-6, -2, -4, -0.5, -8],
    "magnitude_increase": [2, -1, 1.5, -0.25, 4],
    "movement": [2, 3, 2.5, 0.25, 4],
    "large_final_same_sign": [3, 0, 0, 0.25, 0],
    "large_final_diff_sign": [0, 1, 2, 0, 0],
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_criterion_by_hand() -> None:
    assert set(EXPECTED) == set(CRITERIA)
    for name, expected in EXPECTED.items():
        assert scores(name, WI, WF, alpha=2.0)["w"].tolist() == expected, name


def test_alpha_weighs_the_final_weight() -> None:
    assert scores("large_init_large_final", WI, WF, alpha=0.1)["w"][1] == pytest.approx(0.1)
    assert scores("small_init_small_final", WI, WF, alpha=0.1)["w"][1] == -2


def test_random_and_a_function_of_the_users_own() -> None:
    one = scores("random", WI, WF, alpha=1.0, generator=generator())["w"]
    assert torch.equal(one, scores("random", WI, WF, alpha=1.0, generator=generator())["w"])
    assert not torch.equal(one, scores("random", WI, WF, alpha=1.0, generator=generator(1))["w"])
    masks = criterion_masks(lambda wi, wf: wf - wi, WI, WF, 0.4, alpha=1.0)
    assert masks["w"].tolist() == [False, True, False, False, True]


def test_masks_keep_exact_counts_with_stable_ties() -> None:
    masks = criterion_masks("large_final_same_sign", WI, WF, {"w": 0.6}, alpha=1.0)
    assert masks["w"].tolist() == [True, True, False, True, False]  # of the zeros the first


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"criterion": "largest"}, "'largest' is not one of large_final, .*random"),
        ({"criterion": "random"}, "needs generator"),
        ({"criterion": lambda wi, wf: wf[:2]}, "no score of shape"),
        ({"criterion": lambda wi, wf: wf / 0 * 0}, "NaN"),
        ({"density": 0.0}, r"outside \(0, 1\]"),
        ({"density": 1.5}, r"outside \(0, 1\]"),
        ({"density": {"v": 0.5}}, "different tensors"),
        ({"alpha": 0.0}, "alpha=0"),
        ({"final": {"v": WF["w"]}}, "differ in: v, w"),
        ({"final": {"w": torch.zeros(2)}}, "shape"),
    ],
)
def test_bad_criteria_are_named(change: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {
        "criterion": "large_final", "initial": WI, "final": WF, "density": 0.5, "alpha": 1.0
    }  # fmt: skip
    with pytest.raises(ArgumentError, match=match):
        criterion_masks(**{**given, **change})


def test_an_emptied_layer_is_warned_of() -> None:
    with pytest.warns(EmptyLayerWarning, match="'w' keeps none"):
        criterion_masks("movement", WI, WF, 0.05, alpha=1.0)


# Actions

MASK = Masks({"w": torch.tensor([True, True, False, False, True])})


def act(kept: str = "rewind", signed: bool = True, removed: str = "zero", **options: Any):
    given = {"fresh": {"w": torch.tensor([-9.0, 8.0, 7.0, 6.0, -5.0])}, "generator": generator()}
    start = apply_actions(
        WI, WF, MASK, kept=kept, signed=signed, removed=removed, **{**given, **options}
    )
    return start.values["w"].tolist()


def test_mask_1_actions_by_hand() -> None:
    std = float(WI["w"].std(correction=0))
    assert act() == [1, -2, 0, 0, 0]
    assert act(signed=False) == [1, -2, 0, 0, 0]
    assert act("reinit", signed=False) == [-9, 8, 0, 0, -5]
    assert act("reinit") == [9, -8, 0, 0, 5]
    assert act("constant") == pytest.approx([std, -std, 0, 0, std])
    shuffled = act("reshuffle", signed=False)
    assert sorted(shuffled) == [-2, 0, 0, 0, 1]
    assert shuffled[2:4] == [0, 0]


def test_random_actions_permute_and_flip() -> None:
    wi = {"w": torch.randn(400, generator=generator())}
    masks = Masks({"w": torch.arange(400) < 300})
    kept = masks["w"]
    for signed in (True, False):
        found = apply_actions(
            wi, wi, masks, kept="reshuffle", signed=signed, removed="zero", generator=generator(1)
        ).values["w"][kept]
        assert torch.equal(found.abs().sort().values, wi["w"][kept].abs().sort().values)
        assert not torch.equal(found, wi["w"][kept])
        assert bool((found.sign() == wi["w"][kept].sign()).all()) is signed
        if not signed:
            assert torch.equal(found.sort().values, wi["w"][kept].sort().values)
    flat = apply_actions(
        wi, wi, masks, kept="constant", signed=False, removed="zero", generator=generator(1)
    ).values["w"][kept]
    assert len(flat.unique()) == 2
    assert float((flat > 0).float().mean()) == pytest.approx(0.5, abs=0.1)


def test_mask_0_actions_by_hand() -> None:
    # |wf| >= |wi| at 0, 2, 4; shrunk: 1 (kept), 3 (removed)
    assert act(removed="zero") == [1, -2, 0, 0, 0]
    assert act(removed="freeze") == [1, -2, 0.5, -0.5, 0]
    assert act(removed="movement") == [1, -2, 0.5, 0, 0]
    assert act(removed="movement_both") == [1, 0, 0.5, 0, 0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kept": "resample"}, "kept='resample' is not one of rewind, reinit"),
        ({"removed": "one"}, "removed='one' is not one of zero, freeze"),
        ({"kept": "reshuffle", "generator": None}, "pass generator"),
        ({"kept": "constant", "signed": False, "generator": None}, "pass generator"),
        ({"kept": "reinit", "fresh": None}, "needs fresh"),
        ({"kept": "reinit", "fresh": {"w": torch.zeros(2)}}, "shape"),
    ],
)
def test_bad_actions_are_named(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        act(**change)
    with pytest.raises(ArgumentError, match="shape"):
        apply_actions(
            WI, WF, Masks({"w": torch.ones(2) > 0}), kept="rewind", signed=True, removed="zero"
        )


# Holding removed weights


def test_holding_takes_the_bits() -> None:
    w, values = torch.tensor([-0.0, 5.0, 6.0, 7.0]), torch.tensor([1.0, -0.0, float("nan"), 3.5])
    mask = Masks({"w": torch.tensor([True, False, False, False])})
    Eraser(mask, {"w": values}).hold_("w", w)
    assert torch.equal(
        w.view(torch.int32),
        torch.tensor([-0.0, -0.0, float("nan"), 3.5]).view(torch.int32),
    )
    half = torch.ones(2, dtype=torch.bfloat16)
    mask = Masks({"w": torch.tensor([True, False])})
    Eraser(mask, {"w": torch.tensor([9.0, 0.5])}).hold_("w", half)
    assert half.tolist() == [1, 0.5]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("removed", REMOVED)
def test_removed_weights_stay_at_their_values_to_the_bit(optimizer: str, removed: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    data = datasets.load("digits")
    initial = {n: w.detach().clone() for n, w in names.weights(model).items()}
    final = {n: w + 0.1 * torch.randn(w.shape, generator=generator()) for n, w in initial.items()}
    masks = criterion_masks("large_final", initial, final, 0.4, alpha=1.0)
    start = apply_actions(initial, final, masks, kept="rewind", signed=True, removed=removed)
    start.apply_(model)
    config = TrainConfig(2, batch_size=60, lr=0.01, optimizer=optimizer, weight_decay=0.01)
    train(model, data, config, methods=[start.method()])
    for name, w in names.weights(model).items():
        held = ~masks[name]
        assert torch.equal(w[held], start.values[name][held])
        assert bool((w[masks[name]] != start.values[name][masks[name]]).any())
        if removed == "freeze":
            assert bool((w[held] != 0).all())


def test_held_values_are_checked_and_resumed() -> None:
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    masks = Masks({"weight": torch.tensor([[True, False]])})
    for values in ({"weight": torch.zeros(3)}, {"bias": torch.zeros(1)}):
        with pytest.raises(ArgumentError, match="has no mask of its shape"):
            Masked(masks, values=values).attach(model)
        assert torch.equal(model.weight, before)
    saved = Masked(masks, values={"weight": torch.tensor([[1.0, 2.0]])}).state_dict()
    again = Masked(Masks({"weight": torch.tensor([[False, True]])})).attach(model)
    assert model.weight[0, 0] == 0
    again.load_state_dict(saved)
    assert model.weight[0, 1] == 2
    again.finish()


def test_the_tables_name_every_action() -> None:
    assert KEPT == ("rewind", "reinit", "reshuffle", "constant")
    assert len(CRITERIA) + 1 == 11
