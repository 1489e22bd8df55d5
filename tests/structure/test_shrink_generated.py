"""500 generated networks: no wrong output, all but a few shrunk, the rest named."""

import pytest

from gossamer.experiments.structured_sparsity.generated import checked


@pytest.mark.parametrize("tens", range(10))
def test_generated_networks_shrink(tens: int) -> None:
    results = {seed: checked(seed) for seed in range(50 * tens, 50 * tens + 50)}
    assert not {s: r for s, r in results.items() if r[1] in ("wrong", "silent")}
    assert {s: r for s, r in results.items() if ":" in r[1]} == {}
    assert sum(r[1] == "shrunk" for r in results.values()) >= 30
