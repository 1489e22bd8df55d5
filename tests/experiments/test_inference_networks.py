"""The claims of whole networks, of made-up times; and one network in small."""

from pathlib import Path

import pytest

from gossamer.experiments.inference import networks


def row(name: str, ours: float, exact: float, eight: float | None) -> dict:
    dense = {"onnxruntime": exact, "torch": 2 * exact, "gossamer": exact}
    if eight is not None:
        dense["onnxruntime-int8"] = eight
    accuracy = {"before": 91.7, "after": 89.0, "images": 2000}
    return {
        "name": name, "density": 0.1, "accuracy": accuracy,
        "ms": {
            "dense": dense,
            "sparse": {"gossamer": ours, "gossamer-int8": ours / 2, "onnxruntime": exact},
        },
    }  # fmt: skip


def test_claims_are_against_the_best_dense_engine() -> None:
    rows = [
        row("alexnet", 2.0, 9.0, 3.0),
        row("resnet-20", 0.5, 0.4, None),
        row("lenet-5", 1, 2, 3),
    ]
    claims = networks._judge({"networks": rows})
    assert [(c.id, c.value, c.holds) for c in claims[:3]] == [
        ("inference.5", 4.5, True),
        ("inference.5", 9.0, True),
        ("inference.5", 3.0, True),
    ]
    assert [c.holds for c in claims[3:]] == [False, False, False]  # without int8 nothing is claimed
    assert claims[5].value == pytest.approx(2.7)
    del rows[0]["ms"]["sparse"]["gossamer-int8"]  # a plan that was refused is no plan
    assert [c.value for c in networks._judge({"networks": rows})[:3]] == [4.5, 0.0, 0.0]


def test_a_network_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "ENGINES", ("gossamer", "gossamer-int8", "torch"))
    found = networks.network("lenet-300-100", tmp_path / "w", True, tmp_path)
    assert set(found["ms"]) == {"dense", "sparse"}
    assert all(set(ms) == {"gossamer", "gossamer-int8", "torch"} for ms in found["ms"].values())
    assert found["density"] == pytest.approx(1 / 12, abs=0.01)
