"""Cold starts: the claims of made-up times, and a network in small."""

from pathlib import Path

import pytest

from gossamer.core.errors import ArgumentError
from gossamer.experiments.inference import cold


def row(name: str, plan: float, session: float) -> dict:
    whole = {"first": plan + 1, "plan": plan, "onnxruntime": session}
    return {"name": name, "seconds": {way: {"whole": s} for way, s in whole.items()}}


def test_claims_are_parts_of_a_session_s_start() -> None:
    claims = cold._judge({"networks": [row("a", 0.2, 0.4), row("b", 0.3, 0.4)]})
    assert [(c.value, c.holds) for c in claims] == [(0.5, True), (pytest.approx(0.75), False)]


def test_a_network_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    found = cold.turns("lenet-300-100", tmp_path / "w", quick=True)
    assert set(found["seconds"]) == {"first", "plan", "onnxruntime"}
    for parts in found["seconds"].values():
        assert set(parts) == {"import", "load", "answer", "whole"}
        assert 0 < max(parts["import"], parts["load"], parts["answer"]) < parts["whole"]
    assert found["plan_bytes"] < found["onnx_bytes"]
    assert found["ready_bytes"] == 0
    monkeypatch.setattr(cold, "_OURS", cold._OURS.replace("y = net(x)", "y = net(x) + 1"))
    with pytest.raises(ArgumentError, match="first: differs by"):
        cold.turns("lenet-300-100", tmp_path / "w", quick=True)
