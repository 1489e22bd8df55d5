"""The low-rank experiments in small."""

import json
from pathlib import Path

from gossamer import experiments
from gossamer.experiments.low_rank import exact, mlp


def test_the_fit_against_brute_force(tmp_path: Path) -> None:
    path = experiments.run(
        "low-rank-exact", out=tmp_path, work=tmp_path / "w", seeds=1, quick=True, workers=1,
        say=lambda _: None,
    )  # fmt: skip
    claims = json.loads(path.read_text())["claims"]
    assert {c["id"] for c in claims} == {f"low-rank.{n}" for n in (1, 2, 3, 4)} | {"survey.1"}
    # without tensorly, Tucker's outputs are not there to be compared
    assert [c["what"] for c in claims if not c["holds"] and "Tucker-2" not in c["what"]] == []


def test_greedy_is_compared_with_what_is_best() -> None:
    rows = exact._toy(3)["rows"]
    assert len(rows) == 4
    assert all(row["behind"] >= -1e-9 for row in rows)


def test_claims_are_of_the_worst_seed() -> None:
    run = {
        "seed": 0,
        "chosen": [{"test": 50.0 - n, "macs": [8.0, 4.0 / n]} for n in (1, 2)],
        "times": {"torch": [3.0, 2.0, 4.0], "onnxruntime": None},
    }
    other = {**run, "seed": 1}
    claims = mlp._judge(
        {"trained": [{"seed": 0, "test": 49.2}, {"seed": 1, "test": 51}], "runs": [run, other]}
    )
    values = [(c.value, c.holds) for c in claims]
    assert values == [
        (2.0, False),
        (2.0, True),
        (1.5, True),
        (3.0, False),
        (4.0, True),
        (0.75, False),
    ]
