"""What auto loses: networks that can be built, and claims of made-up times."""

import pytest
import torch

from gossamer.experiments.inference import auto


@pytest.mark.parametrize("name", [n for n in auto.NETWORKS if "alexnet" not in n])
def test_networks_are_built_as_they_are_named(name: str) -> None:
    net, example = auto._made(name)
    with torch.no_grad():
        assert net(example).isfinite().all()
    matrices = [p for p in net.parameters() if p.ndim > 1][1:]
    kept = sum(int(p.count_nonzero()) for p in matrices) / sum(p.numel() for p in matrices)
    assert (0.05 < kept < 0.2) == ("sparse" in name)


def test_recurrent_networks_are_built() -> None:
    for name in auto.LOOPS:
        net, example = auto._made(name)
        with torch.no_grad():
            assert net(example).shape == (1, 10)
    assert set(auto.EIGHT_BITS) < set(auto.NETWORKS)


@pytest.mark.parametrize(("name", "precision"), [("mlp 64-32-10", "float32"), ("lenet-5", "int8")])
def test_what_auto_runs_is_told(name: str, precision: str) -> None:
    row = auto.measured(name, precision, True)
    assert row["ms"].keys() >= {"gossamer"}
    assert min(row["ms"].values()) > 0
    engine, _, kind = row["runs"].rpartition(" in ")
    assert engine in row["candidates"]
    assert kind in ("float32", precision)
    assert "relative difference" in row["check"]


def test_the_worst_network_is_judged() -> None:
    def claim(*ours: float) -> tuple[float, bool, str]:
        rows = [
            {"name": f"net {i}", "ms": {"gossamer": ms, "torch": 3.0, "onnxruntime": 1.0}}
            for i, ms in enumerate(ours)
        ]
        (found,) = auto._judge({"networks": rows})
        others = auto._judge({"networks": rows, "loops": rows, "eight_bits": rows[:1]})
        assert [c.id for c in others] == [f"inference.auto{s}" for s in ("", ".loops", ".int8")]
        assert [c.value for c in others[:2]] == [found.value] * 2
        return round(found.value, 6), found.holds, found.what

    assert claim(0.5, 1.02)[:2] == (0.02, True)
    value, holds, what = claim(0.5, 1.2, 1.0)
    assert (value, holds) == (0.2, False)
    assert "3 networks (net 1)" in what
