"""Post-training's experiments in small."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer import experiments
from gossamer.experiments.post_training import exact, resnets
from gossamer.experiments.post_training.resnets import bytes_at


def quickly(name: str, tmp_path: Path) -> dict[str, Any]:
    path = experiments.run(
        name, out=tmp_path, work=tmp_path / "w", seeds=1, quick=True, workers=1, say=lambda _: None
    )
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def test_the_solver_is_the_surgeon(tmp_path: Path) -> None:
    data = quickly("post-training-exact", tmp_path)
    claims = [c for c in data["claims"] if "price" not in c["what"]]
    assert len(claims) == 4
    assert all(c["holds"] for c in claims)


def test_brute_force_makes_its_own_choices() -> None:
    row, hessian = exact.problem(4, 0)
    found = exact.surgeon(row[0], hessian, [2, 0, 3, 1], prune=True, rounds=False)
    assert int((found == 0).sum()) == 2
    alone = exact.surgeon(row[0], torch.eye(4).double(), range(4), prune=True, rounds=False)
    least = row[0].abs().argsort()[:2]
    assert set((alone == 0).nonzero().flatten().tolist()) == set(least.tolist())


def test_a_killed_stage_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    data = quickly("post-training-large", tmp_path)
    claims = {c["what"]: c for c in data["claims"]}
    assert claims["tensors that a kill and a restart change"]["holds"]
    assert claims["layers found done by the restart"]["value"] == 4


def test_the_language_model_is_rounded(tmp_path: Path) -> None:
    data = quickly("post-training-language", tmp_path)
    assert len(data["ways"]) == 3
    assert all(row["bytes"] < data["before"]["bytes"] for row in data["ways"])


def test_bytes_at_an_accuracy() -> None:
    rows = [
        {"bytes": None, "accuracy": 92.0},
        {"bytes": 60, "accuracy": 88.0},
        {"bytes": 100, "accuracy": 91.0},
        {"bytes": 90, "accuracy": 91.0},  # the smaller of two that are as good
        {"bytes": 120, "accuracy": 90.0},
    ]
    assert bytes_at(rows, 88.0) == 60
    assert bytes_at(rows, 89.5) == 75
    assert bytes_at(rows, 91.0) == 90
    assert bytes_at(rows, 99.0) == 120
    assert bytes_at(rows, 50.0) != bytes_at(rows, 50.0)


def test_the_resnets_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer import datasets, nets

    digits = datasets.load("digits")
    monkeypatch.setattr(resnets, "calibrated", lambda quick: digits)
    build = nets.build
    monkeypatch.setattr(
        nets,
        "build",
        lambda name, **options: build("resnet-8", in_shape=(1, 8, 8), width=0.25, seed=0),
    )
    data = quickly("post-training-resnets", tmp_path)
    assert {c["id"] for c in data["claims"]} == {"post-training.2", "post-training.3"}
    assert data["files"][0]["bytes"] > 0
