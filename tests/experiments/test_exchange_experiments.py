import json
import math
from pathlib import Path
from typing import Any

import pytest

from gossamer import experiments
from gossamer.distribute import SQm, TernGrad
from gossamer.experiments.exchange.exchange_codecs import parity
from gossamer.experiments.terngrad.gradient_exact import clip_error, length, variance
from gossamer.experiments.terngrad.terngrad_exact import clipping, sizes, unbiased


def quick(name: str, tmp_path: Path) -> list[dict[str, Any]]:
    path = experiments.run(
        name, out=tmp_path, work=tmp_path / "w", seeds=1, quick=True, workers=1, say=lambda _: None
    )
    return json.loads(path.read_text())["claims"]


def test_terngrad_exact(tmp_path: Path) -> None:
    claims = quick("terngrad-exact", tmp_path)
    assert {c["id"] for c in claims} == {"terngrad.1", "terngrad.2", "terngrad.3"}
    assert all(c["holds"] for c in claims if c["id"] != "terngrad.2")


@pytest.mark.parametrize("codec", [TernGrad(clip=None), SQm(4)], ids=repr)
def test_unbiased(codec: TernGrad | SQm) -> None:
    found = unbiased(codec, 2000, 1)
    assert found["largest_deviation_in_standard_errors"] < 4
    assert 0.6 < found["mean_square_deviation"] < 1.5
    assert found["error_over_bound"] < 1


def test_clipping_of_a_gaussian() -> None:
    found = clipping(400_000, 2.5, 0)
    assert found["zeros"] == pytest.approx(0.6824, abs=0.003)
    assert found["length"] == pytest.approx(-0.0113, abs=0.001)
    assert found["angle"] == pytest.approx(2.75, abs=0.1)
    assert found["slope_of_draw"] == pytest.approx(found["slope"], abs=0.01)


def test_sizes() -> None:
    ratios, lost = sizes(20_000, 0)
    assert lost == 0
    assert ratios["base3"] == 20


def test_length_and_variance_and_clip_error() -> None:
    assert length(1000, 2.0, 100, 0)["drawn"] == pytest.approx(1.56, abs=0.02)
    assert length(100, None, 400, 0)["mean_of_ratio"] == pytest.approx(2.20, abs=0.05)
    assert variance(3, 10, 8, 0) < 1
    measured, closed = clip_error(1.0, 200_000, 0)
    assert closed == pytest.approx(0.1507, abs=1e-4)
    assert math.isclose(measured, closed, rel_tol=0.02)


def test_parity() -> None:
    table = parity(3000, 0)
    assert table
    assert all(row["other_bits"] == 0 for row in table.values())
