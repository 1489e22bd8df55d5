"""What LeNet experiments share: the run of a recipe, done once, and what it was after a stage."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer import compression, datasets
from gossamer.compression.recipe import Recipe, load
from gossamer.experiments import Context
from gossamer.experiments.deep_compression import smallest
from gossamer.experiments.shared import lenets, recipes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_settings_are_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for net in lenets.NETS:
        made, shipped = lenets.recipe(net, 3, False), load(net)
        assert made.seed == 3
        assert made.work == shipped.work
    context = Context(tmp_path, (0,))
    before = lenets.lenets_folder(context)
    monkeypatch.setattr(recipes, "load", lambda net: load(net, ["stages.prune.rounds=2"]))
    assert lenets.lenets_folder(context) != before


def test_a_changed_recipe_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    class Stop(Exception):
        pass

    def figures(context: Context) -> None:
        with pytest.raises(Stop):
            smallest.lenets(context)

    def run(recipe: Recipe, model: None, dataset: None, out: Path) -> Any:
        seen.append(out)
        raise Stop

    monkeypatch.setattr(smallest, "run", run)
    context = Context(tmp_path, (0,), workers=1)
    figures(context)
    figures(context)
    monkeypatch.setattr(recipes, "load", lambda net: load(net, ["max_drop=0.02"]))
    figures(context)
    assert (seen[0] == seen[1], seen[0].name == seen[2].name) == (True, True)
    assert seen[0] != seen[2]


def test_a_run_is_done_once_and_read_stage_by_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {
        "name": "tiny",
        "model": "mlp",
        "dataset": "digits",
        "max_drop": 1,
        "stages": [{"train": {"epochs": 1}}, {"prune": {"density": 0.5}}, "pack"],
    }
    runs: list[Path] = []

    def run(recipe: Recipe, model: None, dataset: None, out: Path) -> Any:
        runs.append(out)
        return compression.run(recipe, model, dataset, out)

    monkeypatch.setattr(lenets, "recipe", lambda net, seed, quick: load(tiny, [f"seed={seed}"]))
    monkeypatch.setattr(lenets, "mnist", lambda quick: datasets.load("digits"))
    monkeypatch.setattr(lenets, "run", run)
    dense, pruned = (lenets.after(s, "mlp", 1, tmp_path, False) for s in ("train", "prune"))
    assert runs == [tmp_path / "mlp-1"]
    assert (len(dense.masks), pruned.masks.density) == (0, pytest.approx(0.5, abs=1e-3))
    assert (dense.number, pruned.number) == (2, 3)
    kept = pruned.masks["fc1.weight"]
    weights = [state.model.get_parameter("fc1.weight") for state in (dense, pruned)]
    assert torch.equal(weights[0] * kept, weights[1])
