"""CIFAR-10 in half a second: claims that can fail, and a small file run as the experiment does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer import nets
from gossamer.compression.recipe import load
from gossamer.datasets import Dataset, Split
from gossamer.experiments.inference import cifar_file
from gossamer.experiments.inference import cifar_half_second as half
from gossamer.pack import pack

GOOD: dict[str, Any] = {
    "plan": {"bytes": 40_000},
    "whole": {
        "images": 10_000,
        "batches": {
            "10": {"seconds": 0.6, "right": [9_120]},
            "25": {"seconds": 0.5, "right": [9_100, 9_120]},
        },
    },
    "single": {"microseconds": {"gossamer": 100.0, "onnxruntime": 10.0}},
}


def test_claims_hold_and_fall_short() -> None:
    assert [(c.value, c.holds) for c in half._judge(GOOD)] == [
        (40_000, True), (pytest.approx(91.0), True), (0.5, True), (100.0, True),
    ]  # fmt: skip
    bad = copy.deepcopy(GOOD)
    bad["plan"]["bytes"] = 40_001
    bad["whole"]["batches"]["10"]["right"] = [9_099]  # every run counts, not the fastest alone
    bad["whole"]["batches"]["25"]["seconds"] = 0.51
    bad["single"]["microseconds"]["gossamer"] = 100.1
    assert [c.holds for c in half._judge(bad)] == [False] * 4


def test_a_smoke_run_s_settings_fit_the_recipe() -> None:
    found = load(cifar_file.RECIPE, list(cifar_file._QUICK))
    assert found.subset == 500


def pictures() -> Dataset:
    g = torch.Generator().manual_seed(0)
    splits = (
        Split(
            torch.randint(256, (count, 3, 32, 32), generator=g, dtype=torch.uint8),
            torch.randint(10, (count,), generator=g),
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
        )
        for count in (40, 20, 60)
    )
    return Dataset("pictures", *splits, classes=10)


@pytest.mark.slow
def test_a_file_s_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "calibrated", lambda quick: pictures())
    monkeypatch.setattr(half, "OTHERS", ())
    net = nets.build("resnet-20", seed=0).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 4 and p.shape[1] > 3:
                live = torch.rand(p.shape[0], p.shape[1] // 4, *p.shape[2:]) < 0.25
                p.copy_((p / 0.02).round() * 0.02 * live.repeat_interleave(4, 1))
    pack(net, tmp_path / "model.gsm").close()
    made = half.planned(tmp_path / "model.gsm", tmp_path / "w", quick=True)
    path = tmp_path / "w" / "resnet-20.plan"
    assert made["bytes"] == path.stat().st_size < 50_000
    found = half.whole(path, tmp_path / "w", quick=True)
    rights = {right for row in found["batches"].values() for right in row["right"]}
    assert len(rights) == 1  # the same labels, however images are shared
    assert all(0 < row["loaded"] < row["seconds"] for row in found["batches"].values())
    monkeypatch.setattr(nets, "build", lambda *a, **k: net)
    assert set(half.single(path, quick=True)["microseconds"]) == {"gossamer"}
