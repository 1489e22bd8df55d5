"""Networks of few bits: their weights, claims of made-up times, and one network in small."""

from pathlib import Path

import pytest
import torch

from gossamer.experiments.inference import few_bits


def test_weights_by_hand() -> None:
    weight = torch.tensor([[0.1, -0.2, 1.0, -3.0], [7.0, -5.2, 0.3, 1.0]])
    ternary = few_bits.fewer(weight, "ternary")  # of each row the two largest: 2 and 6.1
    torch.testing.assert_close(ternary, torch.tensor([[0, 0, 2.0, -2.0], [6.1, -6.1, 0, 0]]))
    grid = few_bits.fewer(weight, "grid")  # steps 3 / 7 and 1
    wanted = torch.tensor([[0, 0, 2 * 3 / 7, -3.0], [7.0, -5.0, 0, 0]])
    torch.testing.assert_close(grid, wanted)
    assert torch.equal(few_bits.fewer(weight, "dense"), weight)
    for form, most in (("ternary", 3), ("grid", 15)):
        rows = few_bits.fewer(torch.randn(5, 300), form)
        assert max(len(row.unique()) for row in rows) <= most
        assert 0.4 < float((rows == 0).float().mean()) < 0.6


def test_claims_are_against_the_best_dense_engine() -> None:
    ms = {
        "dense": {"gossamer": 1.0, "torch": 4.0, "onnxruntime": 3.0},
        "ternary": {"gossamer": 1.5, "torch": 0.1}, "grid": {"gossamer": 4.0},
    }  # fmt: skip
    size = {"dense": 160, "ternary": 20, "grid": 40}
    claims = few_bits._judge({"networks": [{"name": "lstm", "ms": ms, "bytes": size}]})
    assert [(c.value, c.holds) for c in claims] == [(2.0, True), (0.75, False), (8.0, True)]


@pytest.mark.slow
def test_a_network_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_bits, "ENGINES", ("gossamer", "torch"))
    found = few_bits.measured("lstm", tmp_path / "w", quick=True)
    assert set(found["ms"]) == set(few_bits.FORMS)
    assert all(set(ms) == {"gossamer", "torch"} for ms in found["ms"].values())
    assert found["bytes"]["ternary"] < found["bytes"]["grid"] < found["bytes"]["dense"]
