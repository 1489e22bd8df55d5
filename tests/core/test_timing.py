"""Timings: no verdict where there is nothing to compare, an interval where there is."""

import itertools
import random
import re

import pytest
import torch
from torch import nn

from gossamer import report
from gossamer.compression import measure
from gossamer.core.errors import ArgumentError
from gossamer.core.same import same_operations
from gossamer.core.timing import median_interval, paired
from gossamer.datasets import Dataset, Split
from gossamer.report import words


class MadeUp:
    """A clock that is moved by what runs, by seconds drawn from a seed, and by nothing else."""

    def __init__(self, seed: int = 0) -> None:
        self.now, self.random = 0.0, random.Random(seed)

    def __call__(self) -> float:
        return self.now

    def spend(self, low: float, high: float) -> None:
        self.now += self.random.uniform(low, high)


def net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def data() -> Dataset:
    x, y = torch.zeros(4, 1, 2, 2), torch.arange(4) % 3
    return Dataset("d", Split(x, y), Split(x, y), Split(x, y), classes=3)


def timed(dense: nn.Module, other: nn.Module, spans: tuple, seed: int) -> dict:
    """Their latency where a pass of each takes made-up milliseconds, within its span."""
    clock = MadeUp(seed)
    for network, (low, high) in zip((dense, other), spans, strict=True):
        network.register_forward_hook(
            lambda *_, low=low, high=high: clock.spend(low * 1e-3, high * 1e-3)
        )
    found, notes = measure.latency(dense, other, data(), exported=False, clock=clock)
    assert found is not None
    assert notes == []
    return found


def page(latency: dict) -> tuple[list, str]:
    run = {
        "name": "n",
        "model": "m",
        "dataset": "d",
        "bytes": {"dense": 400, "file": 100, "ratio": 4.0},
        "latency": latency,
    }
    return words.verdict(run), report.render(run)


@pytest.mark.parametrize("seed", range(6))
def test_the_same_operations_never_get_a_verdict_on_speed(seed: int) -> None:
    # the noise of each time favours one side by up to a half
    favoured = [(1.0, 1.4), (1.2, 2.0)]
    latency = timed(net(), net(), tuple(favoured if seed % 2 else favoured[::-1]), seed)
    assert latency["same_operations"]
    assert latency["ratio"] is latency["interval"] is None
    assert latency["dense_ms"] == latency["compressed_ms"] > 1
    verdict, text = page(latency)
    assert [told for told, _ in verdict] == ["Accuracy was not measured."]
    assert not re.search(r"faster|slower|speed-up|× the time|It (also )?runs", text, re.I)
    assert "The same operations as before, so no speed is compared." in text


def test_other_operations_get_a_ratio_with_its_interval() -> None:
    latency = timed(net(8), net(2), ((3.0, 3.3), (1.0, 1.1)), 0)
    low, high = latency["interval"]
    assert low <= latency["ratio"] <= high
    assert low >= 3.0 / 1.1
    assert high <= 3.3
    assert latency["pairs"] == 200
    assert any("faster (95 %" in told for told, _ in page(latency)[0])
    latency = timed(net(2), net(8), ((1.0, 1.1), (3.0, 3.3)), 0)
    assert any("It runs slower: " in told for told, _ in page(latency)[0])
    latency = timed(net(8), net(2), ((1.0, 2.0), (1.0, 2.0)), 0)
    assert latency["interval"][0] < 1 < latency["interval"][1]
    verdict, text = page(latency)
    assert len(verdict) == 1
    assert "No difference that these timings can show" in text


def test_timing_is_bounded_and_few_pairs_give_no_interval() -> None:
    latency = timed(net(8), net(2), ((1000, 1001), (1000, 1001)), 0)
    assert latency["pairs"] <= 3  # five seconds of two seconds each
    assert latency["interval"] is None
    assert "No verdict on speed" in page(latency)[1]


def test_what_makes_operations_the_same() -> None:
    same = same_operations
    pruned = net()
    with torch.no_grad():
        pruned[1].weight.zero_()
    assert same(net(), pruned)
    assert not same(net(), net(7))
    assert not same(net(), net().double())
    assert not same(net(), nn.Sequential(*net(), nn.ReLU()))
    assert not same(nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh()))
    # tensors of the same shapes, another stride
    assert not same(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3, stride=2))


def test_pairs_change_their_order_and_the_first_is_not_counted() -> None:
    clock, order = MadeUp(), []
    costs = itertools.chain([100.0, 100.0], itertools.repeat(1.0))

    def run(name: str) -> None:
        order.append(name)
        clock.now += next(costs)

    threads = torch.get_num_threads()
    found = paired(lambda: run("a"), lambda: run("b"), pairs=6, seconds=1e9, clock=clock)
    assert "".join(order) == "baabbaabbaabba"[: len(order)]
    assert (found.first, found.second, found.ratio, found.pairs) == (1.0, 1.0, 1.0, 6)
    assert found.interval == (1.0, 1.0)
    assert torch.get_num_threads() == threads
    with pytest.raises(ArgumentError, match="pairs=0"):
        paired(print, print, pairs=0, seconds=1)


def test_the_median_interval_by_hand() -> None:
    assert median_interval(range(5)) is None
    assert median_interval(range(6)) == (0, 5)  # 1 - 2/64 = .969
    assert median_interval(range(8)) == (0, 7)  # one in: 1 - 2 * 9/256 = .930, not enough
    assert median_interval(range(9)) == (1, 7)  # 1 - 2 * 10/512 = .961
    assert median_interval(range(100)) == (39, 60)  # the table's 40th and 61st
    low, high = median_interval(range(5000))
    assert 2420 < low < 2440
    assert high == 4999 - low


def test_a_smaller_network_is_timed_in_onnxruntime_too() -> None:
    pytest.importorskip("onnxscript")
    found, notes = measure.latency(net(8), net(2), data(), exported=True)
    assert notes == []
    assert found is not None
    assert [row["engine"] for row in found["rows"]] == ["torch eager", "onnxruntime"]
    assert found["engine"] == "onnxruntime"
    assert found["ratio"] == found["rows"][1]["ratio"]
    assert set(found["rows"][1]) >= {"batch", "threads", "before_ms", "after_ms", "interval"}


class Branch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = net(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > -1 else x


def test_an_export_that_fails_leaves_torch_and_a_note() -> None:
    pytest.importorskip("onnxscript")
    found, notes = measure.latency(Branch(8), Branch(2), data(), exported=True)
    assert found is not None
    assert found["engine"] == "torch eager"
    (note,) = notes
    assert note.startswith("latency in onnxruntime was not measured: Branch cannot be exported")
    counted, notes = measure.operations(net(8), net(2), data())
    assert counted is not None
    assert counted["before"]["macs"] == 8 * 4 + 3 * 8
    assert notes == []
