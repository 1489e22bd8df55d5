"""Runs that are told how large their file may be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import gossamer
from gossamer import datasets, nets
from gossamer.cli import app
from gossamer.compression.size import NEAR, priced
from gossamer.core.errors import RecipeError
from stages import Killed, Stop

ONE = {"epochs": 2, "lr": 0.02, "batch_size": 64}
BEFORE = {"prune": {"density": 0.3, "retrain": ONE}}
AFTER = [{"quantize_biases": {"bits": 8}}, "pack", {"evaluate": {"latency": False}}]
WAYS: dict[str, list[Any]] = {
    "rate_aware": [BEFORE, {"rate_aware": {"retrain": {**ONE, "epochs": 6}}}],
    "ecsq": [BEFORE, {"ecsq": {"lam": 0.03, "finetune": {**ONE, "lr": 0.0002}}}],
    "ecsq-by-layer": [{"ecsq": {"lam": {"fc1": 0.01, "fc2": 0.03}}}],
    "obs": [{"obs": {"rate": "auto", "calibration": 128}}],
    "obs-one-rate": [{"obs": {"rate": 0.002, "calibration": 128}}],
    "obs-by-layer": [{"obs": {"rate": {"fc1": 0.002, "fc*": 0.001}, "calibration": 128}}],
}


def recipe(*stages: Any, **more: Any) -> dict[str, Any]:
    return {"name": "t", "max_drop": 1, "stages": [*stages, *AFTER], **more}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    net = nets.build("mlp-64-48-10", seed=0)
    gossamer.train(net, datasets.load("digits"), gossamer.TrainConfig(epochs=8, lr=0.1))
    return net


@pytest.mark.parametrize("way", WAYS)
def test_a_file_comes_within_two_percent_of_what_it_may_have(
    way: str, tmp_path: Path, trained: nn.Module
) -> None:
    most = {"rate_aware": 750, "ecsq-by-layer": 2000, "obs-by-layer": 2000}.get(way, 1100)
    result = gossamer.compress(
        trained, "digits", recipe=recipe(*WAYS[way]), out=tmp_path / "r", max_bytes=most
    )
    assert NEAR * most <= result.bytes <= most
    assert result.bytes == (tmp_path / "r/model.gsm").stat().st_size
    assert result.after.accuracy > 0.6
    assert result.problems == []
    run = json.loads((tmp_path / "r/run.json").read_text())
    assert run["size"] == {"most": most, "bytes": result.bytes, "kept": True}
    stage = next(row for row in run["stages"] if "size" in row)
    if way == "obs":  # the page names the rate itself; of several, their factor
        assert stage["obs"]["rate"] == pytest.approx(0.001 * stage["size"]["factor"])
    elif way == "obs-one-rate":
        assert stage["obs"]["rate"] == pytest.approx(0.002 * stage["size"]["factor"])
    elif way == "obs-by-layer":
        assert "rate" not in stage["obs"]
    # the stages after it were foreseen, and so was the packer
    assert abs(stage["size"]["bytes"] - result.bytes) <= most // 100
    assert f"at most {most:,}" in result.report.read_text()


def test_a_file_that_is_smaller_anyway_is_told(tmp_path: Path, trained: nn.Module) -> None:
    result = gossamer.compress(
        trained, "digits", recipe=recipe(*WAYS["rate_aware"]), out=tmp_path / "r", max_bytes=5000
    )
    assert result.bytes < 2500
    assert result.problems == []
    told = [note for note in result.run["notes"] if "of the 5,000 bytes" in note]
    assert len(told) == 1
    assert told[0] in result.report.read_text()


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, trained: nn.Module) -> None:
    options: dict[str, Any] = {"recipe": recipe(*WAYS["rate_aware"]), "max_bytes": 700}
    whole = gossamer.compress(trained, "digits", out=tmp_path / "whole", **options)
    with pytest.raises(Stop):
        gossamer.compress(trained, "digits", out=tmp_path / "cut", progress=Killed(5), **options)
    again = gossamer.compress(trained, "digits", out=tmp_path / "cut", **options)
    assert again.file.read_bytes() == whole.file.read_bytes()


def test_what_no_price_brings_about_is_written_and_told(tmp_path: Path, trained: nn.Module) -> None:
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    (tmp_path / "r.yaml").write_text(json.dumps(recipe({"ecsq": {"lam": 0.03}})))
    args = ["compress", "mlp-64-48-10", "--data", "digits", "--recipe", str(tmp_path / "r.yaml"),
            "--weights", str(tmp_path / "w.pt"), "--out", str(tmp_path / "o"),
            "--max-bytes", "100"]  # fmt: skip
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 5, done.output
    assert "SIZE NOT KEPT: the file has" in done.output
    assert "of at most 100" in done.output
    assert (tmp_path / "o/model.gsm").exists()
    args = [*args[:-3], str(tmp_path / "enough"), "--max-bytes", "3000"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert "size     kept: the file has" in done.output
    assert "of at most 3,000" in done.output


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([{"prune": {"density": 0.1, "retrain": ONE}}], "no stage sets a price of bits"),
        ([{"obs": {"bits": 4}}], "add one of ecsq, obs, rate_aware"),
        ([{"rate_aware": {"retrain": {**ONE, "epochs": 0}}}], "no stage sets a price of bits"),
        (
            [{"ecsq": {"lam": 0.1}}, {"obs": {"bits": 4}}],
            "what obs after it does to the file cannot be foreseen",
        ),
    ],
)
def test_a_recipe_that_cannot_be_told_a_size_is_refused(stages: list[Any], told: str) -> None:
    with pytest.raises(RecipeError, match=f"max_bytes.*3,000 bytes: .*{told}"):
        gossamer.recipe.load(recipe(*stages), ["max_bytes=3000"])


def test_a_size_that_is_not_asked_for_is_no_part_of_a_runs_key(
    tmp_path: Path, trained: nn.Module
) -> None:
    """The setting is new: what older versions have begun is the same run."""
    plain = gossamer.compress(trained, "digits", recipe=recipe(*WAYS["ecsq"]), out=tmp_path / "r")
    path = tmp_path / "r/run-key.json"
    key = json.loads(path.read_text())
    assert "max_bytes" not in key["recipe"]
    assert plain.run["size"] is None


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24)
        block = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True)
        self.block, self.lstm = nn.TransformerEncoder(block, 1), nn.LSTM(24, 24, batch_first=True)
        self.out = nn.Linear(24, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.lstm(self.block(self.table(tokens)))[0][:, -1])
        return found


def test_tables_attention_and_recurrent_layers_come_to_a_size_without_labels(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (90, 6))
    result = gossamer.compress(
        Recurrent().eval(), tokens, out=tmp_path / "r", max_bytes=5000, max_drop=1
    )
    assert NEAR * 5000 <= result.bytes <= 5000
    assert result.after.score > 0.9  # cosine


def test_a_price_is_found_for_a_size() -> None:
    asked: list[float] = []

    def measured(price: float) -> int:
        asked.append(price)
        return int(1000 / price**0.3)

    price, size = priced(500, 1.0, measured)
    assert 490 <= size <= 500
    assert size == measured(price)
    assert len(asked) < 9
    price, size = priced(3000, 1.0, measured)
    assert 2940 <= size <= 3000


def test_a_price_is_found_where_sizes_jump_and_where_none_fits() -> None:
    price, size = priced(500, 1.0, lambda p: 900 if p < 7 else 300)
    assert (size, price >= 7) == (300, True)
    price, size = priced(100, 1.0, lambda p: 200 + int(100 / p))
    assert size == 200 + int(100 / price)
    assert size < 202
    # smaller than asked at any price: the lowest is taken, and that is that
    assert priced(5000, 1.0, lambda p: 400)[1] == 400
