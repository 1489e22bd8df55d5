"""What a stage leaves is held by the later ones, or its loss is told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer import datasets, nets
from gossamer.core import names
from gossamer.core.errors import RecipeError
from stages import job, mistaken, unfit

ONE = {"epochs": 1, "lr": 0.02, "batch_size": 256}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    net = nets.build("mlp-64-24-16-10", seed=0)
    gossamer.train(net, datasets.load("digits"), gossamer.TrainConfig(epochs=2, lr=0.1))
    return net


LATER: list[dict[str, Any]] = [
    {"share": {"bits": 3, "include": ["fc2"], "finetune": ONE}},
    {"ecsq": {"lam": 0.05, "include": ["fc2"], "finetune": ONE}},
    {"rate_aware": {"include": ["fc2"], "retrain": ONE}},
    {"supermask": {"include": ["fc2"], "train": {**ONE, "lr": 30.0}}},
]
FIRST: list[dict[str, Any]] = [
    {"share": {"bits": 3, "include": ["fc1"]}},
    {"ecsq": {"lam": 0.1, "include": ["fc1"]}},
    {"rate_aware": {"step": 1.0, "include": ["fc1"], "retrain": ONE}},
]


@pytest.mark.parametrize("later", LATER, ids=lambda s: next(iter(s)))
@pytest.mark.parametrize("first", FIRST, ids=lambda s: next(iter(s)))
def test_a_later_training_holds_shared_values_and_biases_on_a_grid(
    first: dict[str, Any], later: dict[str, Any], tmp_path: Path, trained: nn.Module
) -> None:
    given = [first, {"quantize_biases": {"bits": 4}}]
    before = names.parameters(job(given, trained, tmp_path / "a").stages()[0].model)
    state, rows, _ = job([*given, later], trained, tmp_path / "b").stages()
    after = names.parameters(state.model)
    own = {"fc2.bias"} if "supermask" in later else set[str]()  # which sets it to zero
    for name in {"fc1.weight", "fc1.bias", "fc2.bias", "fc3.bias"} - own:
        assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["fc2.weight"], after["fc2.weight"])
    assert all("undone" not in row for row in rows)
    assert all(p.requires_grad for p in after.values())


def test_a_bias_on_a_grid_stays_there_when_factors_take_its_layer(
    tmp_path: Path, trained: nn.Module
) -> None:
    given = [
        {"quantize_biases": {"bits": 4}},
        {"svd": {"rank": {"fc1": 4}}},
        {"share": {"bits": 3, "include": ["fc2"], "finetune": ONE}},
    ]
    state = job(given[:1], trained, tmp_path / "a").stages()[0]
    before = names.parameters(state.model)["fc1.bias"]
    state = job(given, trained, tmp_path / "b").stages()[0]
    assert torch.equal(names.parameters(state.model)["fc1.1.bias"], before)


def test_what_a_stage_undoes_of_another_is_told(tmp_path: Path, trained: nn.Module) -> None:
    given = [
        {"prune": {"density": 0.2, "include": ["fc1"]}},
        {"tickets": {"rounds": 1, "rate": 0.2, "train": ONE}},
        {"quantize": {"method": "twn", "include": ["fc2"]}},
        {"obs": {"density": 0.5, "include": ["fc2"], "calibration": 64}},
    ]
    made = job(given, trained, tmp_path)
    made.key["model"] = "mlp"
    done = made.stages()
    _, rows, _ = done
    assert len(rows[1]["undone"]) == len(rows[3]["undone"]) == 1
    assert "pruned before are not zero any more: fc1.weight" in rows[1]["undone"][0]
    assert "fc2.weight from 3 to" in rows[3]["undone"][0]
    assert "undone" not in rows[0] | rows[2]
    result = made.finish(done, "digits")
    assert f"2-tickets: {rows[1]['undone'][0]}" in result.run["notes"]
    assert "not zero any more" in result.report.read_text()


def test_sparse_training_of_some_layers_leaves_the_masks_of_others(
    tmp_path: Path, trained: nn.Module
) -> None:
    sparse = {"density": {"fc2": 0.5}, "start": "present", "every": 1, "train": ONE}
    given = [{"prune": {"density": 0.2, "include": ["fc1"]}}, {"sparse_train": sparse}]
    state, rows, _ = job(given, trained, tmp_path).stages()
    assert state.masks.densities()["fc1.weight"] == pytest.approx(0.2, abs=1e-3)
    assert "undone" not in rows[1]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("share: {bits: 3}\n  - rewind", ["line 4", "rewind after share", "undoes share"]),
        (
            "quantize_biases\n  - tickets: {train: {epochs: 1}}",
            ["line 4", "tickets after quantize_biases", "undoes"],
        ),
        (
            "share: {bits: 3}\n  - sparse_train: {density: 0.5, train: {epochs: 1}}",
            ["line 4", "sparse_train after share", "undoes share"],
        ),
        (
            "share: {bits: 3}\n"
            "  - sparse_train: {density: 0.5, start: present, train: {epochs: 1}}",
            ["line 4", "sparse_train after share would train the shared values apart"],
        ),
        (
            "absorb_batchnorm\n  - share: {bits: 3, finetune: {epochs: 1}}",
            ["line 4", "share after absorb_batchnorm trains", "move it before"],
        ),
    ],
)
def test_orders_that_would_undo_a_stage_are_refused(text: str, parts: list[str]) -> None:
    mistaken(text, parts)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tickets: {rate: 1.5, train: {epochs: 1}}", r"stages.0.rate: rate fc1.weight=1.5"),
        ("tickets: {output: fc9, train: {epochs: 1}}", r"stages.0.output: .*fc9"),
        ("tickets: {scope: global, output: fc2, train: {epochs: 1}}", "scope: global takes one"),
        (
            "sparse_train: {density: 0.5, train: {epochs: 1, momentum: 0}}",
            r"stages.0.train.momentum: 0: sparse-momentum grows by momentum",
        ),
        ("sparse_train: {train: {epochs: 1}}", "no stage before sparse_train prunes"),
        ("train: {epochs: 1, distill: 0.5}", "nothing is compressed before train"),
        (
            "quantize: {method: twn, train: {epochs: 1, distill: {teacher: bfore}}}",
            "teacher 'bfore' is neither before, start",
        ),
    ],
)
def test_what_the_door_can_know_is_told_before_any_work(
    text: str, told: str, trained: nn.Module
) -> None:
    unfit(text, told, trained)


def test_a_training_before_is_no_pruning(trained: nn.Module) -> None:
    stages = [{"train": ONE}, {"sparse_train": {"train": ONE}}]
    with pytest.raises(RecipeError, match="no stage before sparse_train"):
        gossamer.compress(trained, "digits", recipe=stages, out="never-made")
    assert not Path("never-made").exists()


def test_a_loss_aware_quantizer_of_no_epochs_is_one_without_training(
    tmp_path: Path, trained: nn.Module
) -> None:
    none = {"epochs": 0, "optimizer": "adam"}
    state, _, _ = job([{"quantize": {"method": "lab", "train": none}}], trained, tmp_path).stages()
    assert len(names.parameters(state.model)["fc2.weight"].unique()) == 2


def test_what_a_recurrent_layer_cannot_have_is_told_before_any_work() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8))
    unfit("rate_aware: {retrain: {epochs: 1}}", "weight_ih_l0 belongs to LSTM", net)
    unfit("supermask: {include: ['1*'], train: {epochs: 1}}", "a seed gives float32 of two", net)
