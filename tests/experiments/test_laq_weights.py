"""Convergence of loss-aware weights, on short runs."""

from pathlib import Path

import pytest
import torch

from gossamer.experiments import Context
from gossamer.experiments.loss_aware import laq_weights
from gossamer.experiments.loss_aware.laq_weights import (
    _judge_dimension,
    dimension,
    draw_perceptron,
    linear_run,
    perceptron_run,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_regret_grows_with_the_dimension_and_falls_with_the_bits(tmp_path: Path) -> None:
    raw = dimension(Context(tmp_path, (0, 1), quick=True, say=lambda _: None))
    claims = _judge_dimension(raw)
    assert {claim.id for claim in claims} == {"loss-aware.5"}
    assert all(claim.holds for claim in claims), claims
    assert (tmp_path / "laq-dimension.svg").stat().st_size > 1000


def test_no_binary_weights_beat_the_best_ones() -> None:
    # the best binary w_q is |w*| in the mean: E(|w*| - 1/4)^2 = 1/48 a weight, over 24
    row = linear_run(400, 1, 150, 0)
    assert row["final"] > 0.9 * 400 / 48 / 24
    assert row["average_regret"][0] > row["final"]
    assert 0 < row["reached"] < 150
    close = linear_run(400, None, 150, 0)
    assert close["final"] < row["final"] / 4


def test_more_bits_are_closer_to_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.datasets import Dataset, Split

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(640, 1, 28, 28, generator=g), torch.arange(640) % 10
    x += 2 * torch.randn(10, 1, 28, 28, generator=g)[y]
    split = Split(x, y)
    monkeypatch.setattr(
        laq_weights, "mnist", lambda quick: Dataset("points", split, split, split, 10)
    )
    rows = [perceptron_run(16, bits, 50, 0) for bits in (1, 2, 3, 4, None)]
    assert rows[0]["final"] > rows[2]["final"]
    assert abs(rows[3]["final"] - rows[4]["final"]) < rows[0]["final"] - rows[4]["final"]
    assert draw_perceptron(rows, tmp_path / "x.svg").stat().st_size > 1000
