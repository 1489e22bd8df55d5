"""Stages that change a network's modules: activations, fixed point, factors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer import datasets, nets
from gossamer.compression import fresh, records
from gossamer.core import names
from gossamer.core.errors import ArgumentError, FormatError
from stages import Killed, Stop, job, mistaken, unfit

FAST = {"epochs": 1, "lr": 0.02, "batch_size": 128}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    net = nets.build("mlp-64-48-24-10", seed=0)
    gossamer.train(net, datasets.load("digits"), gossamer.TrainConfig(epochs=5, lr=0.1))
    return net


class Functional(nn.Module):
    """Batch-norm, a residual add, and ReLUs that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(96, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x) + x), 2)
        return self.fc(x.flatten(1))


@pytest.fixture(scope="module")
def convolutional() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Functional()
    gossamer.train(net, datasets.load("digits"), gossamer.TrainConfig(epochs=4, lr=0.05))
    return net


def reloaded(result: gossamer.Result, empty: nn.Module) -> nn.Module:
    """The file in an untrained network of the same class, and that it answers the same."""
    net = gossamer.load(result.file, empty).eval()
    x = datasets.load("digits").test.batch(slice(0, 64))[0]
    with torch.no_grad():
        assert torch.equal(net(x), result.model.eval()(x))
    return net


def test_activations_are_the_same_in_a_fresh_process(tmp_path: Path, trained: nn.Module) -> None:
    settings = {"bits": 2, "alpha": "learned", "exclude": ["relu2"], "train": FAST}
    given = [
        {"prune": {"density": 0.5}},
        {"activations": settings},
        {"quantize": {"method": "twn"}},
    ]
    recipe = {"name": "t", "max_drop": 1, "stages": [*given, {"evaluate": {"latency": False}}]}
    result = gossamer.compress(trained, "digits", recipe=recipe, out=tmp_path / "r")
    assert result.run["bytes"]["reloaded"]["evaluated_in"] == "a fresh process"
    net = reloaded(result, nets.build("mlp-64-48-24-10", seed=9))
    assert isinstance(net.get_submodule("relu1"), gossamer.QuantizedReLU)
    assert type(net.get_submodule("relu2")) is nn.ReLU
    step = float(net.state_dict()["relu1.alpha"])
    (notes,) = (s["activations"] for s in result.run["stages"] if "activations" in s)
    ((name, start, alpha),) = (x.values() for x in notes["layers"])
    assert (name, alpha) == ("relu1", pytest.approx(abs(step)))
    assert start != alpha
    with pytest.raises(ArgumentError, match=r"changed \(activations\)"):
        gossamer.compress(
            "mlp-64-48-24-10",
            "digits",
            recipe={**recipe, "weights": str(result.file)},
            out=tmp_path / "again",
        )
    weights = names.weights(net)
    assert float((weights["fc1.weight"] != 0).float().mean()) == pytest.approx(0.5, abs=1e-3)
    assert len(weights["fc2.weight"].unique()) == 3
    assert "Quantized activations" in result.report.read_text()


def test_alpha_by_data_by_formula_and_by_hand(tmp_path: Path, trained: nn.Module) -> None:
    found = {}
    for alpha in ("lloyd", "half-gaussian", 0.25):
        settings = {"bits": 2, "alpha": alpha}
        state, rows, _ = job([{"activations": settings}], trained, tmp_path / str(alpha)).stages()
        found[alpha] = [x["alpha"] for x in rows[0]["activations"]["layers"]]
        assert [float(m.alpha) for m in state.model.modules() if hasattr(m, "alpha")] == found[
            alpha
        ]
    assert found["half-gaussian"] == pytest.approx([0.49] * 2, abs=5e-3)  # the published one
    assert found[0.25] == [0.25, 0.25]
    assert found["lloyd"][0] != found["lloyd"][1]


def test_called_relus_and_a_file_of_one_s_own_class(
    tmp_path: Path, convolutional: nn.Module
) -> None:
    recipe = {
        "name": "t",
        "max_drop": 1,
        "stages": [{"activations": {"bits": 4, "train": FAST}}, {"evaluate": {"latency": True}}],
    }
    result = gossamer.compress(convolutional, "digits", recipe=recipe, out=tmp_path / "r")
    assert result.run["latency"]["batch"] == 1
    assert result.accuracy_after > 0.8
    net = reloaded(result, Functional())
    assert sum(isinstance(m, gossamer.QuantizedReLU) for m in net.modules()) == 2


def test_fixed_point_is_on_grids_and_on_integers_the_same(
    tmp_path: Path, convolutional: nn.Module
) -> None:
    stage = {
        "bits": {"*": 8, "type:Linear": 5},
        "calibration": 100,
        "compare": True,
    }
    given = [{"prune": {"density": 0.5}}, {"fixed_point": stage}]
    recipe = {"name": "t", "max_drop": 1, "stages": [*given, {"evaluate": {"latency": True}}]}
    result = gossamer.compress(convolutional, "digits", recipe=recipe, out=tmp_path / "r")
    timing = result.run["latency"]  # torch emulates it: only an export has a speed
    assert timing is None or [r["engine"] for r in timing["rows"]] == ["onnxruntime"]
    assert result.run["macs"] is None
    integer = result.run["integer"]
    assert integer["identical"]
    assert integer["correct"] == result.after.correct
    (notes,) = (s["fixed_point"] for s in result.run["stages"] if "fixed_point" in s)
    lengths = {x["name"]: x for x in notes["layers"]}
    assert [lengths[n]["bits"] for n in ("conv1", "conv2", "fc")] == [8, 8, 5]
    values = gossamer.unpack(result.file)
    assert "bn1.weight" not in values
    for name, row in lengths.items():
        codes = values[f"{name}.weight"].double() * 2.0 ** row["weight"]
        assert torch.equal(codes, codes.round())
        assert codes.abs().max() <= 2 ** (row["bits"] - 1)
        assert (codes == 0).float().mean() >= 0.499
    assert len({row["weight"] for row in lengths.values()}) > 1
    found = {x["name"]: x for x in result.run["layers"]}["fc.weight"]
    assert 8 * found["bytes"] <= 5 * 960 + 100
    reloaded(result, Functional())
    page = result.report.read_text()
    assert "same bit for bit" in page
    assert [row["bits"] for row in notes["compare"]] == [16, 8, 6, 4]
    assert notes["compare"][0]["dynamic"] >= notes["float_score"] - 0.02
    assert "Dynamic against static" in page


def test_static_lengths_are_one_for_all(tmp_path: Path, convolutional: nn.Module) -> None:
    stage = {"bits": 6, "mode": "static", "calibration": 64, "calibrate_on": "validation"}
    state, rows, _ = job([{"fixed_point": stage}], convolutional, tmp_path).stages()
    notes = rows[0]["fixed_point"]
    assert len({row["weight"] for row in notes["layers"]}) == 1
    assert {row["output"] for row in notes["layers"]} == {notes["input_length"]}
    assert notes["integer"]["identical"]
    assert "compare" not in notes
    again, _, _ = job([{"fixed_point": stage}], convolutional, tmp_path).stages()
    x = datasets.load("digits").test.batch(slice(0, 64))[0]
    assert torch.equal(again.model(x), state.model(x))


def test_factors_are_made_again_and_train(tmp_path: Path, trained: nn.Module) -> None:
    stages: list[dict[str, Any]] = [
        {"svd": {"rank": {"*": 12}, "train": FAST}},
        {"quantize": {"method": "lsq", "bits": 4, "include": ["fc1"], "train": FAST}},
        {"activations": {"bits": 4}},
        {"evaluate": {"latency": False}},
    ]
    recipe = {"name": "t", "max_drop": 1, "stages": stages}
    result = gossamer.compress(trained, "digits", recipe=recipe, out=tmp_path / "r")
    net = reloaded(result, nets.build("mlp-64-48-24-10", seed=9))
    shapes = {n: tuple(p.shape) for n, p in names.weights(net).items()}
    assert shapes == {
        "fc1.0.weight": (12, 64),
        "fc1.1.weight": (48, 12),
        "fc2.0.weight": (12, 48),
        "fc2.1.weight": (24, 12),
        "fc3.weight": (10, 24),  # would not get smaller
    }
    assert len(names.weights(net)["fc1.1.weight"].unique()) <= 16
    assert "Factors" in result.report.read_text()
    whole = {"name": "t", "stages": [{"svd": {"energy": 1.0}}]}
    with pytest.raises(ArgumentError, match="no linear layer gets smaller"):
        gossamer.compress(trained, "digits", recipe=whole, out=tmp_path / "whole")


def test_energy_keeps_its_part(tmp_path: Path, trained: nn.Module) -> None:
    state, rows, _ = job([{"svd": {"energy": 0.8, "include": ["fc1"]}}], trained, tmp_path).stages()
    (row,) = rows[0]["svd"]["layers"]
    dense = trained.get_parameter("fc1.weight").detach().double()
    squares = torch.linalg.svdvals(dense).square()
    kept = squares.cumsum(0) / squares.sum()
    assert kept[row["rank"] - 1] >= 0.8 > kept[row["rank"] - 2]
    product = (state.model.fc1[1].weight @ state.model.fc1[0].weight).detach()
    error = (product - dense).square().sum() / squares.sum()
    assert float(error) == pytest.approx(1 - float(kept[row["rank"] - 1]), abs=1e-4)


def test_changed_networks_resume_to_the_same_bits(tmp_path: Path, trained: nn.Module) -> None:
    given: list[dict[str, Any]] = [
        {"svd": {"rank": 10, "train": FAST}},
        {"activations": {"bits": 3, "alpha": "learned", "train": FAST}},
        {"quantize": {"method": "ttq", "ends": True, "train": FAST}},
    ]
    whole, rows, _ = job(given, trained, tmp_path / "whole").stages()
    for after in (1, 3):
        with pytest.raises(Stop):
            job(given, trained, tmp_path / "broken", Killed(after)).stages()
    again, rows_again, _ = job(given, trained, tmp_path / "broken").stages()
    assert fresh.digest(again.model.state_dict()) == fresh.digest(whole.model.state_dict())
    assert again.structure == whole.structure
    assert [r["score"] for r in rows_again] == [r["score"] for r in rows]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("activations: {bits: 9}", ["line 3", "stages.0.bits: 9", "less than or equal to 8"]),
        ("activations: {bits: 2, alpha: loyd}", ["'loyd' is not one of lloyd", "mean 'lloyd'"]),
        ("activations: {bits: 2, alpha: -1}", ["stages.0.alpha: -1", "greater than 0"]),
        ("activations: {bits: 2, estimator: clip}", ["'clip'", "identity, relu, clipped"]),
        ("fixed_point: {bits: 17}", ["stages.0.bits: 17", "less than or equal to 16"]),
        ("fixed_point: {calibrate_on: test}", ["'test' is not one of train, validation"]),
        ("fixed_point\n  - train: {epochs: 1}", ["line 3", "train after fixed_point"]),
        ("svd: {rank: 3, energy: 0.5}", ["either rank or energy"]),
        (
            "svd: {rank: 3}\n  - prune: {method: movement, density: 0.5}",
            ["line 4", "prune after svd"],
        ),
    ],
)
def test_mistakes_of_changing_stages(text: str, parts: list[str]) -> None:
    mistaken(text, parts)


def test_activations_that_are_not_there_are_told_before_any_work(trained: nn.Module) -> None:
    for text, told in (
        ("activations: {bits: 2, include: [relu9]}", "relu9"),
        ("fixed_point: {bits: {fc9: 3}}", "bits.fc9"),
        ("svd: {rank: {fc9: 3}}", "rank.fc9"),
    ):
        unfit(text, told, trained)


def test_what_has_no_rule_in_fixed_point_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Sigmoid(), nn.Linear(16, 10))
    made = job([{"fixed_point": {}}], net, tmp_path)
    before = fresh.digest(made.model.state_dict())
    with pytest.raises(ArgumentError, match="Sigmoid"):
        made.stages()
    assert fresh.digest(made.model.state_dict()) == before


@pytest.mark.parametrize(
    "record",
    [
        [{"kind": "activations", "bits": 99}],
        [{"kind": "magic"}],
        [{"kind": "low-rank", "ranks": {"fc1": 0}}],
        {"kind": "low-rank"},
        [{"kind": "fixed-point", "bits": 8, "data": {"x": 1 << 40}, "layers": {}, "shape": [1]}],
    ],
)
def test_damaged_records_of_changes_are_refused(record: Any, trained: nn.Module) -> None:
    with pytest.raises(FormatError, match="structure is damaged"):
        records.parse(record)


def test_changes_that_do_not_fit_the_network_are_refused(
    tmp_path: Path, convolutional: nn.Module
) -> None:
    low = records.LowRank(ranks={"fc9": 3})
    with pytest.raises(ArgumentError, match="no layer 'fc9'"):
        records.rebuild(nets.build("mlp-64-48-24-10"), [low])
    with pytest.raises(ArgumentError, match="'conv1' is Conv2d"):
        records.rebuild(Functional(), [records.LowRank(ranks={"conv1": 3})])
    state, _, _ = job([{"fixed_point": {}}], convolutional, tmp_path).stages()
    with pytest.raises(ArgumentError, match="not the one that was put on grids"):
        records.rebuild(nets.build("mlp-64-48-24-10"), state.structure)
