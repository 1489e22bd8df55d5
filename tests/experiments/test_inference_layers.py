"""The experiment of single layers runs, and its claims can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.experiments import Context
from gossamer.experiments.inference import layers


@pytest.mark.slow
def test_a_quick_run_judges_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(layers, "LAYERS", {"one": (16, 16, 6, 3, 1)})
    raw = layers.layers(Context(tmp_path, (0,), quick=True, say=lambda _: None))
    claims = layers._judge(raw)
    assert {c.id for c in claims} == {f"inference.{n}" for n in (1, 2, 3, 4)}
    assert all(c.value > 0 for c in claims)


def test_one_slow_layer_fails_the_claim() -> None:
    fast = {
        "float32": dict.fromkeys(("0.2", "0.1", "0.05"), 99.0),
        "int8_over_float32": {"unstructured": 99.0, "blocks": 99.0},
        "int8_over_int8": {"unstructured": 99.0, "blocks": 99.0},
    }
    slow = {**fast, "float32": {"0.2": 99.0, "0.1": 4.0, "0.05": 99.0}}
    ratios = {"sparse int8": 99.0, "ternary": 17.0}
    raw = {
        "layers": {"a": fast, "b": slow},
        "product": {"hot": ratios, "cold": ratios, "cold_over_int8": 9.0},
    }
    assert [c.what for c in layers._judge(raw) if not c.holds] == [
        "float32 convolution at density 0.1, least of the layers, over the best dense",
        "ternary 4096 x 9216, times as fast as the float32 product, hot",
    ]
