"""Generated tokens: a step beside the whole network, claims of made-up rates, a run in small."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gossamer import nets
from gossamer.experiments.inference import tokens
from gossamer.runtime.engines import Call


def test_steps_give_what_the_whole_network_gives() -> None:
    places, heads, width = 7, 2, 8
    net = nets.build(
        "gpt", classes=11, width=width, layers=2, heads=heads, context=places, tied=False, seed=0
    ).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(5)  # so that attention is no mean
    shapes = [(4, places), (places, 4)]
    zero = torch.zeros(1, dtype=torch.int64)
    batch = (zero, zero.clone(), torch.zeros(1, 1, places),
             *[torch.zeros(1, heads, *shapes[i % 2]) for i in range(4)])  # fmt: skip
    step = tokens.Step(net)
    made = tokens.Generator(Call(partial(step, *batch), list), batch)
    with torch.no_grad():
        text = made.sequence()
        again = made.sequence()  # an empty context again
        logits = made.logits(text)
        whole = net(torch.tensor([text]))[0]
    assert text == again
    assert len(text) == places
    assert text[0] == 0
    torch.testing.assert_close(logits, whole)
    assert whole.argmax(1)[:-1].tolist() == text[1:]


def test_claims_are_against_the_best_dense_engine() -> None:
    rate = {
        "dense": {"torch": 100.0, "onnxruntime": 200.0, "onnxruntime-int8": 300.0,
                  "gossamer": 999.0},
        "ternary": {"gossamer": 250.0, "gossamer-int8": 360.0},
        "grid": {"gossamer": 180.0, "gossamer-int8": 150.0},
    }  # fmt: skip
    claims = tokens._judge({"networks": {"a": {"tokens_per_second": rate}}})
    assert [(c.value, c.holds) for c in claims] == [
        (1.25, True), (1.2, True), (0.9, False), (0.6, False),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(tokens, "DENSE", ("torch", "onnxruntime"))
    monkeypatch.setattr(tokens, "PLANS", ("gossamer",))
    found = tokens.measured(64, 1, 16, 1)
    rate = found["tokens_per_second"]
    assert set(rate["dense"]) == {"torch", "onnxruntime", "gossamer"}
    assert set(rate["ternary"]) == set(rate["grid"]) == {"gossamer"}
    assert all(v > 0 for row in rate.values() for v in row.values())
