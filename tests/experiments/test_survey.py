"""Distillation's gradient by temperature, and lowered products beside CSR."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from gossamer.experiments.structured_sparsity import speed
from gossamer.experiments.survey import exact


def test_the_gradient_is_softmax_difference_times_temperature() -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    found = exact.gradient(student, teacher, 5.0)
    wanted = 5.0 * ((student / 5).softmax(1) - (teacher / 5).softmax(1)) / 3
    torch.testing.assert_close(found, wanted)


def test_claims_of_distillation_hold_and_fall_short() -> None:
    small, large = exact._random(1.0, 0), exact._random(12.0, 0)
    assert small["spread"] < 0.02
    assert large["spread"] > 0.1
    assert small["without_square"] == pytest.approx(25, rel=0.02)
    raw = {"random": {"1": small}, "published": large}
    assert [c.holds for c in exact._judge(raw)] == [True, False, True]


def test_claims_of_lowered_products_hold_and_fall_short(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [1.0, 0.5, 0.25, 1.0, 1.0]  # dense, CSR, lowered, convolution, lowered layer

    def best_of(runs: Sequence[Callable[[], Any]], rounds: int, **_: Any) -> list[float]:
        for run in runs:
            run()
        return seconds

    monkeypatch.setattr(speed, "best_of", best_of)
    row = speed.layer("conv2", 1, small=8)
    assert row["zeros"]["csr"] == pytest.approx(0.924, abs=0.01)
    assert row["theory"] == pytest.approx(1 / ((1 - 0.632) * (1 - 0.129)), rel=0.03)
    assert (row["lowered"], row["csr"]) == (4.0, 2.0)
    good = speed._judge({"layers": [row]})
    assert [c.holds for c in good] == [True, True]
    worse = copy.deepcopy(row) | {"lowered": 1.5, "of_theory": 0.4}
    assert [c.holds for c in speed._judge({"layers": [worse]})] == [False, False]
