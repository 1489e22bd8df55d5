"""The floor of a run, how much of a network its stages cover, and its number of threads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer import compression, datasets, nets
from gossamer.cli.program import main
from gossamer.compression import coverage, floor, measure, threads
from gossamer.compression.progress import Lines, Reporter
from gossamer.compression.stages.prune import Prune
from gossamer.compression.stages.quantize import Quantize
from gossamer.compression.stages.share import Share
from gossamer.compression.stages.train import Train
from gossamer.core.errors import ArgumentError, RecipeError
from gossamer.core.masks import Masks
from gossamer.report import promises
from gossamer.training import evaluate

ROUNDS: dict[str, Any] = {"density": 0.05, "rounds": 4, "schedule": "linear"}
MEASURED: dict[str, Any] = {"evaluate": {"latency": False}}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    net = nets.build("mlp-64-24-10", seed=0)
    gossamer.train(net, datasets.load("digits"), gossamer.TrainConfig(epochs=6, lr=0.1))
    return net


def recipe(max_drop: float, *stages: dict[str, Any]) -> dict[str, Any]:
    return {"name": "t", "max_drop": max_drop, "stages": [*stages, MEASURED]}


def test_by_hand() -> None:
    assert floor.verdict(0.88, 0.875, 0.005)["kept"]  # exactly half a point, in floats
    assert not floor.verdict(0.88, 0.8749, 0.005)["kept"]
    assert floor.verdict(0.2, 0.9, 0.0)["kept"]
    assert gossamer.recipe.load("prune").max_drop == 0.005
    with pytest.raises(RecipeError, match=r"max_drop: 2.0: should be less than or equal to 1"):
        gossamer.recipe.load("prune", ["max_drop=2.0"])


def test_rounds_go_back_to_the_last_that_kept_the_floor(trained: nn.Module, tmp_path: Path) -> None:
    data, drop = datasets.load("digits"), 0.1
    whole = evaluate(trained, data.validation).accuracy
    # The oracle: each number of rounds is a run of its own, without a floor.
    accuracies, densities = [], []
    for part in (0.7625, 0.525, 0.2875, 0.05):  # 1 to 0.05 in four equal steps
        net = gossamer.compress(
            trained,
            data,
            recipe=recipe(1, {"prune": {"density": part}}),
            out=tmp_path / f"{part}",
        ).model
        accuracies.append(evaluate(net, data.validation).accuracy)
        densities.append(measure.density(net))
    kept = [a >= whole - drop for a in accuracies]
    assert kept[0]
    assert not kept[-1]
    last = max(i for i, good in enumerate(kept) if good)
    result = gossamer.compress(
        trained, data, recipe=recipe(drop, {"prune": ROUNDS}), out=tmp_path / "r"
    )
    assert result.problems == []
    row = result.run["stages"][0]
    assert row["rolled_back"]["round"] == last + 1
    assert row["rolled_back"]["rounds"] == 4
    assert row["rolled_back"]["asked"] == pytest.approx(densities[-1])
    assert row["density"] == row["rolled_back"]["density"] == pytest.approx(densities[last])
    assert row["score"] == pytest.approx(accuracies[last])
    assert result.run["floor"]["kept"]
    assert f"went back to round {last + 1} of 4" in result.report.read_text()


def test_rounds_in_the_middle_may_fall_below(trained: nn.Module, tmp_path: Path) -> None:
    kept = iter([True, False, True])  # after each round

    class State:
        floor, model, masks = (0.85, 0.05), trained, Masks()

        def keeps_floor(self) -> bool:
            return next(kept)

    rounds = floor.Rounds(State(), 3)  # type: ignore[arg-type]
    for number in (1, 2, 3):
        rounds.ended(number)
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    rounds.back()
    assert all(torch.equal(before[n], t) for n, t in trained.state_dict().items())


def test_below_the_floor_everyone_is_told(
    trained: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match=r"FLOOR NOT KEPT: .* points of at most 0\.50 lost"):
        result = gossamer.compress(
            trained, "digits", recipe=recipe(1, {"prune": {"density": 0.05}}), out=tmp_path / "a",
            max_drop=0.005,
        )  # fmt: skip
    assert not result.run["floor"]["kept"]
    assert measure.density(result.model) == pytest.approx(0.05, abs=1e-3)  # none to go back to
    assert "Floor not kept" in result.report.read_text() or "FLOOR NOT" in result.report.read_text()
    compression.inputs.save_safetensors(trained, tmp_path / "w.safetensors")
    (tmp_path / "r.yaml").write_text(
        "name: t\nstages:\n  - prune: {density: 0.05}\n  - evaluate: {latency: false}\n"
    )
    given = ["compress", "-m", "mlp-64-24-10", "-d", "digits", "-r", str(tmp_path / "r.yaml")]
    given += ["--weights", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "b")]
    with pytest.raises(SystemExit) as ended:
        main([*given, "--threads", str(torch.get_num_threads())])
    assert ended.value.code == 3
    assert "FLOOR NOT KEPT" in capsys.readouterr().err
    run = json.loads((tmp_path / "b" / "run.json").read_text())
    assert run["problems"][0].startswith("FLOOR NOT KEPT")
    assert run["coverage"]["covered"] == 64 * 24 + 24 * 10


class Conv1D(nn.Module):
    """As GPT-2 has it: no linear layer."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(a, b)), nn.Parameter(torch.ones(b))


def test_a_stage_says_how_much_of_the_network_it_covers() -> None:
    net = nn.Sequential(nn.Embedding(10, 4), Conv1D(4, 6), Conv1D(6, 4), nn.Linear(4, 2))
    found = coverage.of_stage(net, Prune(density=0.5))
    assert found == {
        "parameters": 40 + 24 + 6 + 24 + 4 + 8 + 2,
        "covered": 8,
        "outside": {"Conv1D": [2, 48], "Embedding": [1, 40], "biases, norms": [3, 12]},
    }
    assert promises.covers(found) == (
        "covers 7.4 % of the parameters; 92.6 % are outside: 2 Conv1D, 1 Embedding, 3 biases, norms"
    )
    # layers that a mapping does not name are left as they are, and the ends of a quantization
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    some = coverage.of_stage(net, Share(bits={"0": 3}))
    assert some is not None
    assert (some["covered"], some["outside"]["Linear"]) == (16, [2, 32])
    some = coverage.of_stage(net, Quantize(method="twn"))
    assert some is not None
    assert some["covered"] == 16
    assert coverage.of_stage(net, Train(epochs=1)) is None
    plan = gossamer.recipe.load(
        {"name": "t", "stages": [{"share": {"bits": {"0": 3}}}, {"ecsq": {"lam": {"2": 0.1}}}]}
    )
    both = coverage.of_recipe(net, plan)
    assert both is not None
    assert both["covered"] == 32


def test_multiply_adds_by_hand() -> None:
    data = datasets.load("digits")
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    assert threads.multiply_adds(net, data) == 64 * 4 * 9 + 2560
    assert threads.multiply_adds(nn.Linear(3, 3), data) == 0  # cannot take the data


def test_threads_that_cannot_hurt(monkeypatch: pytest.MonkeyPatch) -> None:
    data, net = datasets.load("digits"), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(threads.os, "getloadavg", lambda: (3.2, 0.0, 0.0))
    assert threads.chosen(net, data) == 1  # small
    monkeypatch.setattr(threads, "SMALL", 100)
    assert threads.chosen(net, data) == 5  # 8 cores, 3 busy
    monkeypatch.setattr(threads.os, "getloadavg", lambda: (40.0, 0.0, 0.0))
    assert threads.chosen(net, data) == 1
    assert threads.settled("auto", None, net, data, Reporter()) == 1
    assert threads.settled(3, None, net, data, Reporter()) == 3
    assert threads.settled(None, None, net, data, Reporter()) == 8
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert not threads.asked_for()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads.asked_for()


def test_a_run_goes_on_with_the_threads_it_began_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, net = datasets.load("digits"), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert threads.settled(None, 2, net, data, Lines()) == 2
    assert threads.settled("auto", 2, net, data, Reporter()) == 2
    assert threads.settled(2, 2, net, data, Reporter()) == 2
    assert "torch threads: 2, as the run began" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match=r"threads=4, but the run began with 2.*--restart"):
        threads.settled(4, 2, net, data, Reporter())
