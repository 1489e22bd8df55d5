from pathlib import Path
from typing import Any

import pytest

from gossamer.core.errors import ArgumentError
from gossamer.experiments.deconstructing import deconstruct
from gossamer.experiments.lottery_ticket import lottery
from gossamer.experiments.shared.curves import density_curves, plot_density_curves


def row(way: str, number: int, stop: float, early: float, seed: int = 0) -> dict[str, Any]:
    return {
        "way": way, "round": number, "seed": seed, "density": 0.8**number,
        "early_stop": stop, "early_accuracy": early, "accuracy": early,
    }  # fmt: skip


def test_figures_are_put_together_by_way_and_round() -> None:
    rows = [
        row("ticket", 1, 200, 0.8),
        row("ticket", 0, 100, 0.5),
        row("ticket", 0, 300, 0.7, seed=1),
        row("reinit", 1, 500, 0.6),
    ]
    found = density_curves(rows)
    assert list(found) == ["ticket", "reinit"]
    dense, pruned = found["ticket"]
    assert (dense["round"], dense["density"], dense["early_stop"]["mean"]) == (0, 1.0, 200)
    assert dense["early_accuracy"]["mean"] == pytest.approx(0.6)
    assert (dense["early_stop"]["min"], dense["early_stop"]["max"]) == (100, 300)
    assert (pruned["round"], pruned["early_stop"]["n"]) == (1, 1)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_curves_are_drawn_with_their_bars(tmp_path: Path, suffix: str) -> None:
    rows = [row("ticket", n, 100 + 50 * s, 0.9, s) for n in range(3) for s in range(2)]
    path = plot_density_curves(density_curves(rows), tmp_path / f"c.{suffix}", title="LeNet")
    data = path.read_bytes()
    assert data.startswith(b"<?xml" if suffix == "svg" else b"\x89PNG")
    if suffix == "svg":
        assert data.count(b'id="LineCollection_') == 4  # bars of three panels and the legend
    with pytest.raises(ArgumentError, match="no curve to draw"):
        plot_density_curves({"ticket": []}, tmp_path / "none.svg")


def test_the_lottery_points_are_read_off_the_means() -> None:
    rows = [
        row("ticket", 0, 1000, 0.980),
        row("ticket", 7, 600, 0.983),
        row("ticket", 9, 600, 0.984),
        row("ticket", 12, 900, 0.982),
        row("ticket", 15, 1500, 0.976),
        row("reinit", 7, 1200, 0.979),
        row("reinit", 12, 1200, 0.970),
        row("random sparsity", 7, 1500, 0.978),
        row("random sparsity", 12, 1500, 0.971),
        row("one-shot", 12, 1000, 0.981),
        row("one-shot", 15, 1000, 0.977),
    ]
    found = lottery._judge_lenet({"curves": density_curves(rows), "runs": rows})
    assert [c.id[-1] for c in found] == list("12222334444")
    expected = [21.1 - 100 * 0.8**7, 0.6, 0.3, 0.4, -0.4, 2.0, 0.4, 0.1, -0.1, -0.1, 0.1]
    assert [c.value for c in found] == pytest.approx(expected)
    assert [c.holds for c in found] == [False, True, True, True, False, True, True, True, False,
                                        True, False]  # fmt: skip


def test_the_deconstruction_points_are_read_off_the_means() -> None:
    start = {name: {"mean": 85.0} for name in deconstruct.UNTRAINED} | {"random": {"mean": 11.0}}
    after = {name: {"mean": 98.0} for name in deconstruct.VARIANTS}
    after |= {"random": {"mean": 97.0}, "small_final": {"mean": 96.5}}
    after |= {f"{k}, unsigned": {"mean": 97.5} for k in ("reinit", "reshuffle", "constant")}
    after["removed: freeze"] = {"mean": 97.9}
    assert all(c.holds for c in deconstruct._judge({"untrained": start, "trained": after}))
    after["removed: freeze"], start["random"] = {"mean": 98.1}, {"mean": 30.0}
    failed = [
        c.id for c in deconstruct._judge({"untrained": start, "trained": after}) if not c.holds
    ]
    assert failed == ["deconstructing.1", "deconstructing.5"]


def test_every_experiment_setting_names_rounds_that_it_runs() -> None:
    for setting in lottery.SETTINGS.values():
        assert max(max(at) for at in setting.controls.values()) <= setting.rounds
        assert max(max(at) for at in setting.short().controls.values()) <= 2
