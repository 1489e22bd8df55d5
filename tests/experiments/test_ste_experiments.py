"""The experiments of straight-through estimators, on their quick paths."""

from pathlib import Path

import pytest

from gossamer.experiments import Context
from gossamer.experiments.straight_through.ste import (
    _judge_closed_forms,
    _judge_figure_1,
    closed_forms,
    descent,
    deviations,
    draw_landscape,
    figure_1,
    identities,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_figure_1_becomes_smooth_and_monotone(tmp_path: Path) -> None:
    raw = figure_1(Context(tmp_path, (0, 1, 2), quick=True, say=lambda _: None))
    claims = _judge_figure_1(raw)
    assert all(claim.holds for claim in claims)
    assert {claim.id for claim in claims} == {"straight-through.3"}
    assert raw["means"]["rises"][0] > 0.05
    assert (tmp_path / "ste-figure-1.svg").exists()


def test_landscape_tells_the_identity_from_the_others(tmp_path: Path) -> None:
    # 1,100 steps of .01 * .0957 take w through zero
    rows = [descent(estimator, 0, 1200) for estimator in ("identity", "relu")]
    assert rows[0]["largest_rise"] > 0.1
    assert 900 < rows[0]["at_step"] < 1200
    assert rows[1]["largest_rise"] <= 1e-6
    assert draw_landscape(rows, tmp_path / "x.svg", 5).stat().st_size > 1000


def test_closed_forms_and_identities(tmp_path: Path) -> None:
    found = deviations(0, 5_000)
    assert max(max(p["deviation"].values()) for p in found["points"]) < 0.3
    assert identities(1, 5) <= 1e-10
    raw = closed_forms(Context(tmp_path, (0,), quick=True, say=lambda _: None))
    assert len(_judge_closed_forms(raw)) == 7
