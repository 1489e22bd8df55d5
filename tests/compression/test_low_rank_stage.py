"""The stage low_rank: ranks, records, files, and a run that is killed inside it."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer import datasets
from gossamer.compression import records
from gossamer.compression.stages import low_rank
from gossamer.compression.stages.low_rank import LowRank
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack import pack_bytes
from gossamer.structure import ladders
from stages import Killed, Stop, job, mistaken

tensorly = importlib.util.find_spec("tensorly") is not None
FEW = {"images": 64, "positions": 4}


class Small(nn.Module):
    """What the user's own class might be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.fc1 = nn.Linear(12 * 16, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = nn.functional.max_pool2d(self.depth(torch.relu(self.conv2(x))), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Small()
    gossamer.train(net, datasets.load("digits"), gossamer.TrainConfig(epochs=3, lr=0.05))
    return net


def ran(settings: dict[str, Any], net: nn.Module, out: Path) -> tuple[Any, dict[str, Any]]:
    state, rows, _ = job([{"low_rank": FEW | settings}], net, out).stages()
    return state, rows[0]["low_rank"]


@pytest.mark.parametrize("kind", ["nonlinear", "linear", "spatial", "svd"])
def test_a_budget_is_met_and_said(kind: str, tmp_path: Path, trained: nn.Module) -> None:
    state, notes = ran({"kind": kind, "speedup": 2.0}, trained, tmp_path)
    before, after = notes["macs"]
    assert 0.4 * before < after <= before / 2
    assert (
        notes["left"]["depth"] == "it has 12 groups" or "without groups" in notes["left"]["depth"]
    )
    made = sum(p.numel() for m in state.model.modules() if hasattr(m, "weight")
               for p in m.parameters(recurse=False)) - 16  # fmt: skip
    assert notes["parameters"][1] == made
    for row in notes["layers"]:
        assert row["macs"][1] < row["macs"][0]
        assert 0 < row["energy"] <= 1
        assert len(row["ms"]) == 2
        assert isinstance(state.model.get_submodule(row["name"]), nn.Sequential)
    (record,) = state.structure
    again = records.rebuild(copy.deepcopy(trained), records.parse([record.model_dump(mode="json")]))
    again.load_state_dict(state.model.state_dict())
    x = datasets.load("digits").test.batch(slice(0, 32))[0]
    with torch.no_grad():
        assert torch.equal(again.eval()(x), state.model.eval()(x))


@pytest.mark.parametrize("budget", ["bytes", "latency"])
def test_other_budgets(
    budget: str, tmp_path: Path, trained: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    # by time nothing is sure but what a clock says; here it says a tenth of a millisecond a rank
    monkeypatch.setattr(
        ladders,
        "milliseconds",
        lambda layer, found: ([0.1 * (i + 1) for i in range(len(found.ranks))], 2.0),
    )
    _, rows, _ = job(
        [{"low_rank": FEW | {"speedup": 2.0, "budget": budget}}], trained, tmp_path
    ).stages()
    notes = rows[0]["low_rank"]
    if budget == "latency":
        whole = 2.0 * 4  # four layers
        left = [n for n in ("conv1", "conv2", "fc1", "fc2") if n in notes["left"]]
        spent = 2.0 * len(left) + 0.1 * sum(r["ranks"][-1] for r in notes["layers"])
        assert spent <= whole / 2 + 1e-9
    if budget == "bytes":
        before, after = notes["parameters"]
        assert after <= before / 2


def test_milliseconds_of_the_whole_network(
    tmp_path: Path, trained: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a clock by which each of four layers takes 2 ms, a tenth a rank in factors, the rest 3 ms
    monkeypatch.setattr(
        ladders,
        "milliseconds",
        lambda layer, found: ([0.1 * r[-1] for r in found.ranks], 2.0),
    )
    monkeypatch.setattr(low_rank, "whole_milliseconds", lambda model, one: 11.0)
    way = {"milliseconds": 6.0, "budget": "latency", "multiple": 4}
    _, notes = ran(way, trained, tmp_path)
    assert notes["layers"]
    assert all(r["ranks"][-1] % 4 == 0 for r in notes["layers"])
    left = [n for n in ("conv1", "conv2", "fc1", "fc2") if n in notes["left"]]
    spent = 3.0 + 2.0 * len(left) + 0.1 * sum(r["ranks"][-1] for r in notes["layers"])
    assert spent <= 6.0 + 1e-9
    _, notes = ran({"energy": 0.5, "multiple": 16}, trained, tmp_path / "few")
    assert notes["left"]["conv2"] == "it has no rank that is a multiple of 16"
    with pytest.raises(ArgumentError, match=r"budget=2 is below 4\.6"):
        ran({**way, "milliseconds": 2.0}, trained, tmp_path / "floor")


def test_ranks_and_energies_by_layer(tmp_path: Path, trained: nn.Module) -> None:
    _, notes = ran({"rank": {"conv2": 3, "fc1": 5}}, trained, tmp_path / "rank")
    assert {r["name"]: r["ranks"] for r in notes["layers"]} == {"conv2": [3], "fc1": [5]}
    assert notes["layers"][0]["response"] == "relu"
    _, notes = ran({"energy": 0.9, "include": ["conv2*", "fc1*"]}, trained, tmp_path / "energy")
    for row in notes["layers"]:
        assert row["energy"] >= 0.9
    with pytest.raises(ArgumentError, match="no layer costs less"):
        ran({"rank": 32, "include": ["fc1*"]}, trained, tmp_path / "none")
    with pytest.raises(ArgumentError, match=r"budget=.* is below"):
        ran({"speedup": 1000.0}, trained, tmp_path / "floor")


@pytest.mark.skipif(not tensorly, reason="tensorly is not installed")
@pytest.mark.parametrize(("kind", "given"), [("tucker", {"speedup": 1.5}), ("cp", {"rank": 6})])
def test_kinds_of_tensorly(
    kind: str, given: dict[str, Any], tmp_path: Path, trained: nn.Module
) -> None:
    state, notes = ran({"kind": kind, **given}, trained, tmp_path)
    assert notes["left"]["fc1"] == f"kind {kind} is of convolutions"
    assert {r["form"] for r in notes["layers"]} == {kind}
    (record,) = state.structure
    again = records.rebuild(copy.deepcopy(trained), [record])
    again.load_state_dict(state.model.state_dict())


def test_a_file_loads_into_the_user_s_class(tmp_path: Path, trained: nn.Module) -> None:
    stages = [
        {"low_rank": FEW | {"kind": "spatial", "speedup": 2.0}},
        {"prune": {"density": 0.6, "include": ["fc*"]}},
    ]
    state, _, _ = job(stages, trained, tmp_path).stages()
    file = pack_bytes(state.model, metadata=records.metadata(state.structure))
    net = gossamer.load(file, Small()).eval()
    assert isinstance(net.conv2, nn.Sequential)
    x = datasets.load("digits").test.batch(slice(0, 64))[0]
    with torch.no_grad():
        assert torch.equal(net(x), state.model.eval()(x))
    assert "conv2.1.weight" in gossamer.unpack(file)


def test_killed_inside_and_resumed_it_gives_the_same_bits(
    tmp_path: Path, trained: nn.Module
) -> None:
    stage = {"low_rank": FEW | {"speedup": 2.0, "train": {"epochs": 2, "lr": 0.01}}}
    state, _, _ = job([stage], trained, tmp_path / "whole").stages()
    with pytest.raises(Stop):
        job([stage], trained, tmp_path / "cut", Killed(1)).stages()
    again, _, _ = job([stage], trained, tmp_path / "cut").stages()
    mine, other = state.model.state_dict(), again.model.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[n], other[n]) for n in mine)


def test_mistakes() -> None:
    mistaken("low_rank", ["one of speedup"])
    mistaken("low_rank: {speedup: 2, rank: 3}", ["one of speedup"])
    mistaken("low_rank: {speedup: 1}", ["greater than 1"])
    mistaken("low_rank: {speedup: 2, kind: other}", ["nonlinear"])
    mistaken("low_rank: {speedup: 2, kind: cp}", ["give rank"])
    mistaken("low_rank: {speedup: 2, budget: time}", ["flops"])


def record(layers: Any) -> dict[str, Any]:
    return {"kind": "low-rank-conv", "layers": layers}


@pytest.mark.parametrize(
    ("layers", "error"),
    [
        ({"conv2": ["channel", [10**9], True]}, "rank 1000000000 is outside 1 to 12"),
        ({"conv2": ["spatial", [24, 13], True]}, "rank 13 is outside"),
        ({"conv2": ["tucker", [3], True]}, "with 1 ranks"),
        ({"conv2": ["cp", [2**30], True]}, "outside 1 to 72"),
        ({"fc1": ["tucker", [3, 3], True]}, "of convolutions"),
        ({"depth": ["channel", [3], True]}, "'depth' is Conv2d"),
        ({"bn1": ["channel", [3], True]}, "'bn1' is BatchNorm2d"),
        ({"": ["channel", [3], True]}, "no layer ''"),
        ({"re:.*": ["channel", [3], True]}, "no layer 're:"),
    ],
)
def test_a_hostile_record_leaves_the_network(layers: Any, error: str) -> None:
    net = Small()
    modules = list(net.modules())
    with pytest.raises(ArgumentError, match=error):
        gossamer.load(pack_bytes(net, metadata={"structure": [record(layers)]}), net)
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))


@pytest.mark.parametrize(
    "layers",
    [
        {},
        {"conv2": ["channel", [], True]},
        {"conv2": ["channel", [1, 2, 3], True]},
        {"conv2": ["channel", [0], True]},
        {"conv2": ["channel", [2**31], True]},
        {"conv2": ["other", [1], True]},
        {"conv2": ["channel", [1]]},
        [],
    ],
)
def test_a_damaged_record(layers: Any) -> None:
    with pytest.raises(FormatError, match="damaged"):
        records.parse([record(layers)])


def test_its_facts() -> None:
    stage = LowRank(rank=2)
    assert stage.rebuilds
    assert not stage.retrains
    assert stage.covered(Small()) == {
        "conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight",
    }  # fmt: skip
