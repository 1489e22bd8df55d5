import json
from pathlib import Path

from gossamer import experiments
from gossamer.experiments.ttq import ttq
from gossamer.experiments.ttq.quantizer_overhead import QUANTIZERS, claims, ratios


def test_exact_projections_hold(tmp_path: Path) -> None:
    path = experiments.run(
        "loss-aware-exact",
        out=tmp_path,
        work=tmp_path / "w",
        seeds=1,
        quick=True,
        workers=1,
        say=lambda _: None,
    )
    claims = json.loads(path.read_text())["claims"]
    assert {c["id"] for c in claims} == {"loss-aware.4"}
    assert all(c["holds"] for c in claims)


def test_ternary_gradients_agree_with_the_formulas() -> None:
    assert max(ttq.gradients(0, "double").values()) < 1e-12


def test_overhead_is_a_ratio_for_each_quantizer() -> None:
    only = list(QUANTIZERS)
    rows = ratios("lenet-5", 2, 1, only)
    assert list(rows) == only
    assert all(0 < row["ratio"] < float("inf") for row in rows.values())
    assert {claim.id for claim in claims("lenet-5", rows)} == {
        "ttq.beyond",
        "loss-aware.beyond",
        "fixed-point.beyond",
    }
