"""Ternary products: the claims of made-up times, every way's answer, and a library that is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.core.errors import ArgumentError
from gossamer.experiments.inference import ggml, ternary


def test_claims_can_fail() -> None:
    ms = {"ternary": 0.06, "ggml TQ2_0": 0.05, "onnxruntime-int8": 0.30, "ggml Q8_0": 0.24}
    row = {"hot_ms": ms, "cold_ms": {**ms, "ternary": 0.04}}
    claims = ternary._judge({"products": dict.fromkeys(ternary.SIZES, row)})
    assert [(round(c.value, 3), c.holds) for c in claims] == [
        (0.06, False), (0.833, False), (1.25, True), (0.833, False), (1.25, True), (4.0, False),
        (6.0, True),
    ]  # fmt: skip
    for part in row.values():
        del part["ggml TQ2_0"], part["ggml Q8_0"]
    assert len(ternary._judge({"products": dict.fromkeys(ternary.SIZES, row)})) == 3


@pytest.mark.slow
def test_every_way_gives_the_product() -> None:
    pytest.importorskip("onnxscript")
    found = ternary.measured(256, 512, 1, 1 << 16)
    errors = found["error"]
    assert set(found["hot_ms"]) == set(found["cold_ms"]) == set(errors)
    for name, error in errors.items():
        exact = "float32" in name
        assert error < (1e-5 if exact else 0.03), name
    assert (ggml.library() is None) == ("ggml TQ2_0" not in errors)


def test_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ggml.VARIABLE, raising=False)
    assert ggml.library() is None
    for path in (tmp_path / "none.so", Path(__file__)):
        monkeypatch.setenv(ggml.VARIABLE, str(path))
        with pytest.raises(ArgumentError, match="is no ggml"):
            ggml.library()
