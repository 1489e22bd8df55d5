import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gossamer import experiments
from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.experiments import Claim, Context, spread


def square(x: int) -> int:
    return x * x


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    experiments.names()  # load the real ones first, so that the copy is complete
    monkeypatch.setattr(experiments, "_REGISTRY", dict(experiments._REGISTRY))


@pytest.mark.parametrize(
    ("value", "relation", "limit", "holds"),
    [
        (27.0, "<=", 27.0, True),
        (27.1, "<=", 27.0, False),
        (0.5, ">", 0.5, False),
        (0.5, ">=", 0.5, True),
        (1.0, "==", 1.0, True),
        (math.nan, "<=", 1.0, False),
        (math.nan, ">=", 1.0, False),
    ],
)
def test_holds_is_computed_from_value_and_bound(
    value: float, relation: str, limit: float, holds: bool
) -> None:
    claim = Claim("page.1", "what", value, relation, limit)
    assert claim.holds is holds
    assert claim.as_dict()["holds"] is holds
    assert claim.as_dict()["bound"] == f"{relation} {limit:g}"


def test_unknown_relation_is_refused() -> None:
    with pytest.raises(ArgumentError, match="'=<'"):
        Claim("page.1", "what", 1.0, "=<", 2.0)


@pytest.mark.usefixtures("registry")
def test_run_writes_the_results_file_with_failures_kept(tmp_path: Path) -> None:
    def judge(raw: Mapping[str, Any]) -> list[Claim]:
        return [Claim("toy.1", "largest square", max(raw["all"]), "<=", 10)]

    @experiments.experiment("toy", judge=judge, seeds=(3, 4))
    def toy(context: Context) -> dict[str, Any]:
        """A toy."""
        return {"all": context.map(square, [(s,) for s in context.seeds])}

    said: list[str] = []
    path = experiments.run("toy", out=tmp_path, work=tmp_path / "w", workers=1, say=said.append)
    data = json.loads(path.read_text())
    assert path == tmp_path / "toy.json"
    assert data["command"] == "gossamer reproduce toy"
    assert data["seeds"] == [3, 4]
    assert data["all"] == [9, 16]
    assert data["claims"] == [
        {"id": "toy.1", "what": "largest square", "value": 16.0, "bound": "<= 10", "holds": False}
    ]
    assert {"commit", "hardware", "seconds"} <= set(data)
    assert any("FALLS SHORT" in line for line in said)


@pytest.mark.usefixtures("registry")
def test_quick_runs_never_overwrite_results(tmp_path: Path) -> None:
    @experiments.experiment("toy", judge=lambda raw: [])
    def toy(context: Context) -> dict[str, Any]:
        """A toy."""
        return {"quick": context.quick}

    path = experiments.run("toy", out=tmp_path, work=tmp_path / "w", quick=True, say=lambda _: None)
    assert path.name == "toy.quick.json"
    assert not (tmp_path / "toy.json").exists()


def test_parallel_map_keeps_order(tmp_path: Path) -> None:
    context = Context(tmp_path, (0,), workers=2)
    assert context.map(square, [(i,) for i in range(4)]) == [0, 1, 4, 9]
    assert context.alone(square, [(i,) for i in range(4, 6)]) == [16, 25]
    assert [part.job for part in context.ledger.parts] == [f"square {i}" for i in range(6)]


@pytest.mark.usefixtures("registry")
def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="'no-such' does not exist; there are: "):
        experiments.run("no-such", out=tmp_path)

    @experiments.experiment("empty", judge=lambda raw: [])
    def empty(context: Context) -> dict[str, Any]:
        """Nothing."""
        return {}

    with pytest.raises(GossamerError, match="returned nothing"):
        experiments.run("empty", out=tmp_path, work=tmp_path / "w", say=lambda _: None)
    with pytest.raises(ArgumentError, match="seeds is empty"):
        experiments.run("empty", out=tmp_path, seeds=[], work=tmp_path / "w")
    with pytest.raises(ArgumentError, match="registered twice"):
        experiments.experiment("empty", judge=lambda raw: [])(empty)


@pytest.mark.parametrize("name", [name for name, _ in experiments.names()])
def test_stored_claims_are_those_of_the_stored_figures(name: str, tmp_path: Path) -> None:
    stored = Path(__file__).parents[2] / "results" / f"{name}.json"
    if not stored.exists():
        pytest.skip("not measured yet")
    copy = tmp_path / stored.name
    copy.write_bytes(stored.read_bytes())
    experiments.judge(name, out=tmp_path, say=lambda _: None)
    claims, again = (json.loads(path.read_text())["claims"] for path in (stored, copy))
    assert claims == again


def test_spread_hand_computed() -> None:
    figures = spread([2.0, 4.0, 6.0])
    assert (figures["mean"], figures["std"], figures["n"]) == (4.0, 2.0, 3)
    with pytest.raises(ArgumentError, match="no values"):
        spread([])
