"""Networks in engines: what is compared, what is said of it, and what cannot be."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import gossamer
from gossamer import cli
from gossamer.core.errors import ArgumentError
from gossamer.runtime import engines
from gossamer.runtime.bench import Bench, bench
from gossamer.runtime.engines import ENGINES, Call, Engine, Subject


class MadeUp:
    """A clock that is moved by what runs, and by nothing else."""

    def __init__(self) -> None:
        self.now, self.random = 0.0, random.Random(0)

    def __call__(self) -> float:
        return self.now

    def spend(self, low: float, high: float) -> None:
        self.now += self.random.uniform(low, high)


CLOCK = MadeUp()


class Slow(nn.Sequential):
    """A network whose pass takes so many made-up milliseconds."""

    def __init__(self, width: int, low: float, high: float) -> None:
        super().__init__(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        self.span = low * 1e-3, high * 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CLOCK.spend(*self.span)
        return super().forward(x)


def subject(name: str, *of: float, width: int = 8) -> Subject:
    torch.manual_seed(0)
    return Subject(name, Slow(width, *of), torch.ones(2, 4), file_bytes=321)


def measured(*subjects: Subject, **options: object) -> Bench:
    given = {"engines": ["torch"], "rounds": 50, "seconds": 1e9, **options}
    return bench(subjects, clock=CLOCK, **given)


def test_ratios_are_against_the_dense_one_in_the_same_run() -> None:
    threads = torch.get_num_threads()
    found = measured(
        subject("dense", 3.0, 3.3),
        subject("half", 1.0, 1.1, width=4),
        subject("wide", 6.0, 6.6, width=16),
        subject("masked", 2.0, 2.2),
        subject("alike", 2.65, 3.65, width=7),
        batches=(1, 5),
        threads=(2, 1),
    )
    assert torch.get_num_threads() == threads
    assert len(found.timings) == 5 * 2 * 2
    dense, half, wide, masked, alike = found.timings[:5]
    assert (dense.ratio, dense.verdict) == (None, "dense")
    low, high = half.interval
    assert 3.0 / 1.1 <= low <= half.ratio <= high <= 3.3
    assert (half.verdict, half.rounds) == ("faster", 50)
    assert half.dense_ms == dense.ms
    assert half.least_ms <= half.ms
    assert wide.verdict == "slower"
    assert (masked.ratio, masked.verdict) == (None, "same operations")
    assert alike.verdict == "no difference shown"
    told = found.verdicts()
    assert len(told) == 4 * 4
    assert "Faster in torch" in told[0]
    assert any(t.startswith("wide") and "No gain that these timings show" in t for t in told)
    assert any(t.startswith("masked") and "the same operations as the dense" in t for t in told)
    assert found.sizes["half"] == {"file": 321, "float32 tensors": 4 * (4 * 4 + 4 + 4 * 3 + 3)}
    assert found.macs["half"] == {"macs": 28, "nonzero": 28, "live": 28}
    few = measured(subject("dense", 3, 3), subject("half", 1, 1, width=4), rounds=5)
    assert few.timings[1].verdict == "too few rounds"
    assert "Too few rounds for a verdict" in few.table()
    table = found.table()
    assert found.processor in table
    assert "faster" in table
    assert json.loads(json.dumps(found.as_dict()))["timings"][1]["verdict"] == "faster"


def test_an_engine_of_another_package_and_one_that_computes_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ENGINES, "_entries", dict(ENGINES))

    def wrong(one: Subject, batch: object, threads: int) -> Call:
        return Call(lambda: one.flat(*batch)[0] + 1, lambda out: [out])

    def twice(one: Subject, batch: object, threads: int) -> Call:
        return Call(lambda: (one.flat(*batch), one.flat(*batch))[0], list)

    ENGINES.register("wrong", Engine(wrong))
    ENGINES.register("twice", Engine(twice, size=lambda one: 7))
    found = measured(subject("dense", 1, 1), engines=["torch", "wrong", "twice"])
    assert [t.engine for t in found.timings] == ["torch", "twice"]
    assert found.timings[1].ms == pytest.approx(2)
    assert found.sizes["dense"]["twice"] == 7
    assert any("not in wrong: it gives something else" in note for note in found.notes)
    with pytest.raises(ArgumentError, match="no engine takes a network: dense is not in wrong"):
        measured(subject("dense", 1, 1), engines=["wrong"])


def test_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject("dense", 1, 1)
    for options, match in (
        ({"engines": ["onnx-runtime"]}, "did you mean 'onnxruntime'"),
        ({"batches": [0]}, r"batches=\[0\]"),
        ({"threads": []}, r"threads=\[\]"),
    ):
        with pytest.raises(ArgumentError, match=match):
            measured(one, **options)
    with pytest.raises(ArgumentError, match="each by another name"):
        measured(one, one)
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"pip install 'gossamer\[onnx\]'"):
        measured(one, engines=["onnxruntime-int8"])
    assert "openvino is not installed" in measured(one, engines=None).notes


def test_onnxruntime_takes_both_forms() -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    found = bench([Subject("net", net, x)], engines=["onnxruntime", "onnxruntime-int8"], rounds=1)
    assert [t.engine for t in found.timings] == ["onnxruntime", "onnxruntime-int8"]
    assert set(found.sizes["net"]) == {"float32 tensors", "onnxruntime", "onnxruntime-int8"}
    assert any(note.startswith("net in int8: relative") for note in found.notes)


def test_plans_are_an_engine_in_which_zeros_count() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)) for _ in range(2)]
    with torch.no_grad():
        nets[1][0].weight.mul_(torch.rand(32, 16) < 0.1)
    x = torch.randn(4, 16)
    found = bench(
        [Subject("dense", nets[0], x), Subject("sparse", nets[1], x)],
        engines=["torch", "gossamer"],
        rounds=6,
    )
    verdicts = {(t.network, t.engine): t.ratio for t in found.timings}
    assert verdicts["sparse", "torch"] is None
    assert verdicts["sparse", "gossamer"] is not None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gossamer.pack.pack(gossamer.nets.build("mlp-64-16-10", seed=0), tmp_path / "net.gsm").close()
    (tmp_path / "run.json").write_text('{"model": "mlp-64-16-10", "dataset": "digits"}')
    options = ["--engine", "torch", "--rounds", "6", "--plot", str(tmp_path / "a.svg")]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", str(tmp_path / "net.gsm"), "mlp-64-8-10", *options])
    said = capsys.readouterr().out
    assert "net.gsm, batch 1, 1 thread" in said
    assert "does the same operations as the dense one" in said
    assert "<svg" in (tmp_path / "a.svg").read_text()
    options = ["--engine", "torch", "--shape", "1,8,8", "--batch", "1,3", "--json"]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "mlp-64-8-10", "--against", "mlp-64-16-10", "--rounds", "1", *options])
    rows = json.loads(capsys.readouterr().out)["timings"]
    assert [(r["network"], r["batch"]) for r in rows[:3:2]] == [
        ("mlp-64-16-10", 1),
        ("mlp-64-16-10", 3),
    ]
    for arguments, match in (
        (["lenet-5", "--batch", "x"], "--batch 'x' holds no whole numbers"),
        (["lenet-5"], "holds no tensor"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["bench", *arguments, "--engine", "torch"])
        assert match in capsys.readouterr().err
