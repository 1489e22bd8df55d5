"""Stages that make a network sparse from the start, alone and composed with the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer import datasets, nets
from gossamer.compression import fresh
from gossamer.core import names
from gossamer.core.errors import ArgumentError, RecipeError
from gossamer.pack import describe
from gossamer.prune.tickets import load_tickets
from gossamer.training import load_checkpoint
from stages import Killed, Stop, job

FAST = {"epochs": 3, "lr": 0.1}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    net = nets.build("mlp-64-24-10", seed=0)
    gossamer.train(net, datasets.load("digits"), gossamer.TrainConfig(epochs=4, lr=0.1))
    return net


METHODS = ["sparse-momentum", "set", "rigl", "dsr", "gradual-magnitude", "static"]


@pytest.mark.parametrize("method", METHODS)
def test_sparse_training_from_the_initial_weights(
    method: str, tmp_path: Path, trained: nn.Module
) -> None:
    stage = {"sparse_train": {"method": method, "density": 0.3, "every": 8, "train": FAST}}
    state, rows, _ = job([stage], trained, tmp_path).stages()
    assert state.masks.density == pytest.approx(0.3, abs=1e-3)
    kept = {n: w != 0 for n, w in names.weights(state.model).items()}
    assert all(not bool((kept[n] & ~m).any()) for n, m in state.masks.items())
    assert rows[0]["density"] <= 0.3005
    assert (rows[0]["reallocations"] > 0) == (method != "static")
    assert rows[0]["score"] > 0.5


def test_sparse_training_goes_on_from_masks_and_is_followed_by_any_stage(
    tmp_path: Path, trained: nn.Module
) -> None:
    given = [
        {"prune": {"method": "snip", "density": 0.4, "scope": "global"}},
        {"sparse_train": {"method": "rigl", "start": "present", "every": 5, "train": FAST}},
        {"share": {"bits": 3}},
    ]
    state, rows, _ = job(given, trained, tmp_path).stages()
    assert [r["density"] for r in rows] == pytest.approx([0.4, 0.4, 0.4], abs=2e-3)
    assert all(len(w.unique()) <= 8 for w in names.weights(state.model).values())


def test_by_layer_and_axes_of_ones_own(tmp_path: Path, trained: nn.Module) -> None:
    settings = {
        "method": "set",
        "density": {"fc1": 0.2},
        "growth": "gradient",
        "redistribution": "none",
        "rate": 0.1,
        "train": {**FAST, "momentum": 0.0},
    }
    state, _, _ = job([{"sparse_train": settings}], trained, tmp_path).stages()
    assert state.masks.densities() == pytest.approx(
        {"fc1.weight": 0.2, "fc2.weight": 1.0}, abs=1e-3
    )


def test_the_page_tells_each_round(tmp_path: Path, trained: nn.Module) -> None:
    stage = {"tickets": {"rounds": 2, "rate": 0.5, "train": {"epochs": 1, "lr": 0.1}}}
    recipe = {"name": "t", "max_drop": 1, "stages": [stage, {"evaluate": {"latency": False}}]}
    page = gossamer.compress(trained, "digits", recipe=recipe, out=tmp_path / "r").report
    text = page.read_text().replace("<wbr>", "")
    assert all(f"1-tickets, round {number}" in text for number in (0, 1, 2))
    assert "1-tickets, round 3" not in text


TICKETS = {"tickets": {"rounds": 2, "rate": 0.3, "output": "fc2", "rewind_step": 4, "train": FAST}}


def test_tickets_are_searched_kept_in_one_file_and_resume_to_the_same_bits(
    tmp_path: Path, trained: nn.Module
) -> None:
    whole, rows, _ = job([TICKETS], trained, tmp_path / "whole").stages()
    found = load_tickets(tmp_path / "whole" / "1-tickets.gsm")
    assert len(found.masks) == 3
    assert found.masks[1].densities() == pytest.approx(
        {"fc1.weight": 0.7, "fc2.weight": 0.85}, abs=3e-3
    )
    assert all(torch.equal(m, found.masks[2][n]) for n, m in whole.masks.items())
    assert [r["density"] for r in rows[0]["tickets"]] == [m.density for m in found.masks]
    assert len(whole.curves) == 9
    broken = tmp_path / "broken"
    for after in (1, 3, 2):
        with pytest.raises(Stop):
            job([TICKETS], trained, broken, Killed(after)).stages()
    again, rows_again, _ = job([TICKETS], trained, broken).stages()
    assert fresh.digest(again.model.state_dict()) == fresh.digest(whole.model.state_dict())
    assert again.curves == whole.curves
    assert rows_again[0]["tickets"] == rows[0]["tickets"]
    assert not list(broken.glob("*.search"))


def test_the_ticket_starts_from_the_weights_that_the_run_began_with(
    tmp_path: Path, trained: nn.Module
) -> None:
    stage = {"tickets": {"rounds": 1, "rate": 0.5, "train": {"epochs": 0}}}
    state, _, _ = job([{"train": FAST}, stage], trained, tmp_path).stages()
    theta = load_checkpoint(tmp_path / "stage-0.pt")["model"]
    for name, mask in state.masks.items():
        assert torch.equal(names.parameters(state.model)[name][mask], theta[name][mask])


@pytest.mark.parametrize("criterion", ["magnitude_increase", "movement", "large_init"])
def test_a_one_shot_ticket_by_any_criterion(
    criterion: str, tmp_path: Path, trained: nn.Module
) -> None:
    given = [
        {"train": FAST},
        {"prune": {"method": criterion, "density": 0.4}},
        {"rewind": {"kept": "constant"}},
    ]
    state, _, _ = job(given, trained, tmp_path).stages()
    theta, end = state.initial(), load_checkpoint(tmp_path / "stage-1.pt")["model"]
    scores = {
        "magnitude_increase": lambda n: end[n].abs() - theta[n].abs(),
        "movement": lambda n: (end[n] - theta[n]).abs(),
        "large_init": lambda n: theta[n].abs(),
    }[criterion]
    for name, mask in state.masks.items():
        assert int(mask.sum()) == int(0.4 * mask.numel() + 0.5)
        assert scores(name)[mask].min() >= scores(name)[~mask].max()
        level = theta[name].std(correction=0)
        wanted = torch.where(theta[name] < 0, -level, level) * mask
        assert torch.allclose(names.parameters(state.model)[name], wanted)
    bias = state.model.get_parameter("fc1.bias")
    assert torch.equal(bias, theta["fc1.bias"])


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ({"sparse_train": {"method": "ril", "train": FAST}}, "rigl"),
        ({"sparse_train": {"density": 0, "train": FAST}}, "greater than 0"),
        ({"sparse_train": {"density": 0.1}}, "train"),
        ({"sparse_train": {"every": 0, "density": 0.1, "train": FAST}}, "every"),
        (
            {"sparse_train": {"method": "gradual-magnitude", "growth": "random", "train": FAST}},
            "only removes",
        ),
        ({"tickets": {"rounds": 0, "train": FAST}}, "rounds"),
        ({"tickets": {"rate": -1, "train": FAST}}, "rate"),
    ],
)
def test_mistakes_are_told_at_their_key(stage: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        gossamer.recipe.load({"name": "t", "stages": [stage]})


def test_what_only_the_run_can_know(tmp_path: Path, trained: nn.Module) -> None:
    with pytest.raises(ArgumentError, match="no earlier stage has pruned these layers"):
        job([{"sparse_train": {"train": FAST}}], trained, tmp_path / "a").stages()
    plain = {**FAST, "momentum": 0.0}
    with pytest.raises(ArgumentError, match="needs an optimizer with momentum"):
        job([{"sparse_train": {"density": 0.1, "train": plain}}], trained, tmp_path / "b").stages()
    with pytest.raises(ArgumentError, match="rate"):
        job([{"tickets": {"rate": 1.5, "train": FAST}}], trained, tmp_path / "c").stages()


SUPERMASK = {"supermask": {"train": {"epochs": 12, "batch_size": 32, "lr": 30.0}}}


def test_a_supermask_is_a_file_of_seed_and_mask(tmp_path: Path, trained: nn.Module) -> None:
    recipe = {"name": "t", "max_drop": 1, "stages": [SUPERMASK, {"evaluate": {"latency": False}}]}
    result = gossamer.compress(trained, "digits", recipe=recipe, out=tmp_path / "r")
    with gossamer.Archive(result.file) as archive:
        codecs = {row["name"]: row["codec"] for row in describe(archive)}
    assert codecs["fc1.weight"].startswith("seeded")
    assert result.bytes < 1776 / 8 + 250  # a bit a weight, and the frame
    assert result.accuracy_after > 0.6
    assert result.run["bytes"]["reloaded"]["identical"]


def test_a_stage_that_changes_the_weights_ends_the_seed(tmp_path: Path, trained: nn.Module) -> None:
    whole, _, _ = job([SUPERMASK, {"prune": {"density": 0.2}}], trained, tmp_path / "a").stages()
    assert set(whole.seeds) == {"fc1.weight", "fc2.weight"}  # fewer of the same values
    again, _, _ = job([SUPERMASK, {"prune": {"density": 0.2}}], trained, tmp_path / "a").stages()
    assert again.seeds == whole.seeds
    changed, _, _ = job([SUPERMASK, {"train": FAST}], trained, tmp_path / "b").stages()
    assert changed.seeds == {}
