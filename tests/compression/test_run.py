import copy
import json
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer import compression, datasets, nets
from gossamer.compression import eight_bits, folder, fresh, inputs, measure
from gossamer.compression.progress import Lines
from gossamer.core import names
from gossamer.core.errors import ArgumentError, RecipeError
from gossamer.core.masks import Masks
from gossamer.datasets import Dataset, Split
from gossamer.pack import unpack
from gossamer.training import evaluate
from killed import run_until

FAST = {"epochs": 2, "lr": 0.05}
SMALL: dict[str, Any] = {
    "name": "small",
    "model": "mlp-64-24-10",
    "dataset": "digits",
    "stages": [
        {"train": {"epochs": 6, "lr": 0.1}},
        {"sensitivity": {"densities": [0.5, 0.1]}},
        {"prune": {"density": {"fc1": 0.3, "fc2": 0.5}, "rounds": 2, "retrain": FAST}},
        {"share": {"bits": 4, "finetune": {"epochs": 1, "lr": 1e-4}}},
        {"quantize_biases": {"bits": 6}},
    ],
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> compression.Result:
    plan = gossamer.recipe.load(SMALL)
    return compression.run(plan, None, None, tmp_path_factory.mktemp("run") / "a", command="test")


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    data = datasets.load("digits")
    net = nets.build("mlp-64-24-10", seed=0)
    gossamer.train(net, data, gossamer.TrainConfig(epochs=6, lr=0.1))
    return net


def stages(*given: dict[str, Any]) -> dict[str, Any]:
    measured: dict[str, Any] = {"evaluate": {"latency": False}}
    # Settings for speed, not for accuracy: the floor has tests of its own.
    return {"name": "t", "max_drop": 1, "stages": [*given, {"pack": {}}, measured]}


def test_the_file_is_small_and_nothing_in_it_differs(done: compression.Result) -> None:
    assert done.file.stat().st_size == done.bytes
    assert done.dense_bytes == 4 * (64 * 24 + 24 + 24 * 10 + 10)
    assert done.ratio > 8
    assert done.accuracy_before > 0.85
    assert done.accuracy_after > 0.8
    back = unpack(done.file)
    for name, value in done.model.state_dict().items():
        assert torch.equal(back[name], value)
    weights = names.weights(done.model)
    assert {n: int((w != 0).sum()) for n, w in weights.items()} == {
        "fc1.weight": round(0.3 * 64 * 24),
        "fc2.weight": 120,
    }
    assert all(len(torch.unique(w)) <= 16 for w in weights.values())
    biases = [p for n, p in done.model.named_parameters() if n not in weights]
    assert all(len(torch.unique(b)) <= 64 for b in biases)


def test_run_json_holds_what_the_report_needs(done: compression.Result) -> None:
    run = json.loads((done.out / "run.json").read_text())
    assert run == json.loads(json.dumps(done.run))
    assert run["name"] == "small"
    assert run["command"] == "test"
    assert run["model"] == "mlp-64-24-10"
    assert run["dataset"] == "digits"
    assert [s["stage"] for s in run["stages"]] == [
        "1-train",
        "2-sensitivity",
        "3-prune",
        "4-share",
        "5-quantize_biases",
        "6-pack",
    ]
    assert run["stages"][-1]["bytes"] == done.bytes == run["bytes"]["file"]
    assert run["stages"][0]["density"] == 1.0
    assert sum(run["bytes"]["parts"].values()) == done.bytes
    assert run["bytes"]["reloaded"] == {
        "fresh_process": True,
        "identical": True,
        "evaluated_in": "a fresh process",
        "built": "mlp-64-24-10",
        "same_outputs": True,
        "notes": [],
        "not_proved": None,
    }
    after = run["evaluation"]["after"]
    assert after["low"] < after["accuracy"] == done.accuracy_after < after["high"]
    assert {c["stage"] for c in run["curves"]} == {"1-train", "3-prune-1", "3-prune-2", "4-share"}
    assert set(run["sensitivity"]) == {"fc1.weight", "fc2.weight"}
    assert run["mask_image"]["shape"] == [8, 8]
    assert run["latency"]["batch"] == 1
    assert run["latency"]["same_operations"]
    assert run["latency"]["ratio"] is None
    assert [row["engine"] for row in run["latency"]["rows"]] == ["torch eager"]
    assert run["macs"]["before"]["nonzero"] == run["macs"]["before"]["macs"]
    assert run["macs"]["after"]["live"] <= run["macs"]["after"]["macs"]
    paper = {x["name"]: x["paper"] for x in run["layers"] if x["paper"]}
    assert paper["fc2.weight"]["kept_percent"] == pytest.approx(50)
    assert "<html" in done.report.read_text()


def test_started_again_it_does_nothing_anew(
    done: compression.Result, trained: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {p.name: p.stat().st_mtime_ns for p in done.out.glob("*.pt")}
    assert sorted(kept) == ["reference.pt", *(f"stage-{i}.pt" for i in range(6))]
    job = _job(SMALL, trained, done.out)  # another network: the run's own is loaded in its place
    job.progress = Lines()
    state, rows, before = job.stages()
    assert rows == done.run["stages"][:-1]
    assert before == done.run["evaluation"]["before"]
    assert fresh.digest(state.model.state_dict()) == fresh.digest(done.model.state_dict())
    assert {p.name: p.stat().st_mtime_ns for p in done.out.glob("*.pt")} == kept
    assert capsys.readouterr().err.count("done before") == 5


def test_another_recipe_in_the_same_directory_is_refused_by_its_difference(
    done: compression.Result,
) -> None:
    plan = gossamer.recipe.load(SMALL, ["stages.3.bits=5"])
    with pytest.raises(ArgumentError, match=r"recipe\.stages\.3\.bits was 4, now it is 5.*restart"):
        compression.run(plan, None, None, done.out)
    with pytest.raises(ArgumentError, match=r"model was \"mlp-64-24-10\", now it is"):
        compression.run(gossamer.recipe.load(SMALL), "mlp-64-20-10", None, done.out)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArgumentError, match="not empty"):
        compression.run(gossamer.recipe.load(SMALL), None, None, tmp_path, restart=True)
    assert (tmp_path / "thesis.tex").exists()


def test_restart_begins_anew(tmp_path: Path) -> None:
    folder.begin(tmp_path, {"recipe": 1}, False)
    (tmp_path / "stage-1.pt").write_bytes(b"of the older run")
    folder.begin(tmp_path, {"recipe": 1}, False)
    assert (tmp_path / "stage-1.pt").exists()
    folder.begin(tmp_path, {"recipe": 2}, True)
    assert {p.name for p in tmp_path.iterdir()} == {folder.KEY, "metrics"}
    with pytest.raises(ArgumentError, match="recipe was 2, now it is 1"):
        folder.begin(tmp_path, {"recipe": 1}, False)


@pytest.mark.usefixtures("one_thread")
def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    long = {"epochs": 6, "lr": 0.05}
    given = {
        **SMALL,
        "seed": 5,
        "stages": [
            {"train": long},
            {"prune": {"density": 0.3, "rounds": 2, "dropout": 0.2, "retrain": long}},
            {"share": {"bits": 4, "finetune": long}},
            {"evaluate": {"latency": False}},
        ],
    }
    unbroken = compression.run(gossamer.recipe.load(given), None, None, tmp_path / "whole")
    out = tmp_path / "killed"
    context = multiprocessing.get_context("forkserver")  # the library is imported once
    context.set_forkserver_preload(["gossamer.compression.run"])
    # Inside the first training, inside the second round of pruning, between two stages, and
    # before the file is packed.
    kills = [["1-train", 7], ["2-prune-2", 3], ["stage 3/3", 0], ["pack", 0]]
    for kill in [*kills, None]:
        run = context.Process(target=run_until, args=(kill, given, out))
        run.start()
        run.join()
        assert run.exitcode == (0 if kill is None else -signal.SIGKILL), kill
        assert (out / "run.json").exists() == (kill is None)
    assert (out / "model.gsm").read_bytes() == unbroken.file.read_bytes()
    told = json.loads((out / "run.json").read_text())
    assert told["curves"] == unbroken.run["curves"]
    lines = (out / "metrics" / "1-train.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 7))


def test_a_model_in_memory_is_left_as_it_was(tmp_path: Path, trained: nn.Module) -> None:
    before = fresh.digest(trained.state_dict())
    result = gossamer.compress(
        trained, "digits", recipe=stages({"prune": {"density": 0.2}}), out=tmp_path / "r"
    )
    assert fresh.digest(trained.state_dict()) == before
    assert result.run["evaluation"]["before"]["accuracy"] == pytest.approx(
        gossamer.evaluate(trained, datasets.load("digits").test).accuracy
    )
    assert result.run["bytes"]["reloaded"]["evaluated_in"] == "a fresh process"
    assert Masks.of(names.weights(result.model)).density == pytest.approx(0.2, abs=1e-3)


def test_a_class_that_no_other_process_can_import_is_evaluated_here(tmp_path: Path) -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randn(40, 4, generator=generator), torch.arange(40) % 3)
    result = gossamer.compress(
        Local(), Dataset("own", split, split, split, 3), recipe="lossless", out=tmp_path / "r"
    )
    assert result.run["bytes"]["reloaded"]["evaluated_in"] == "this process"
    assert result.accuracy_after == result.accuracy_before


@pytest.mark.parametrize(
    "stage",
    [
        {"prune": {"quality": {"fc1": 1.0}}},
        {"prune": {"density": "auto", "max_drop": 0.05}},
        {"prune": {"density": 0.3, "scope": "global", "rounds": 3, "schedule": "cubic"}},
        {"prune": {"density": 0.5, "method": "obd"}},
        {"prune": {"density": 0.5, "method": "random", "retrain": {**FAST, "distill": 0.5}}},
        {"share": {"bits": {"fc1": 3}, "init": "forgy"}},
        {"ecsq": {"lam": 0.05}},
        {"rate_aware": {"step": 0.3, "retrain": FAST}},
        {"absorb_batchnorm": {}},
    ],
    ids=lambda s: f"{next(iter(s))}-{'-'.join(map(str, next(iter(s.values())).values()))}"[:40],
)
def test_every_kind_of_stage(stage: dict[str, Any], tmp_path: Path, trained: nn.Module) -> None:
    job = _job(stages(stage), trained, tmp_path / "r")
    before = fresh.digest(trained.state_dict())
    job.begin(False)
    state, rows, reference = job.stages()
    assert len(rows) == 1
    assert reference["accuracy"] > 0.8
    kind, settings = next(iter(stage.items()))
    if kind == "absorb_batchnorm":  # none in this network
        assert fresh.digest(state.model.state_dict()) == before
        return
    weights = names.weights(state.model)
    if isinstance(settings.get("density"), float):
        assert measure.density(state.model) == pytest.approx(settings["density"], abs=1e-3)
        assert state.masks.density == pytest.approx(settings["density"], abs=1e-3)
    elif kind == "prune":
        assert 0 < measure.density(state.model) < 1
    else:
        assert len(torch.unique(weights["fc1.weight"])) < 200
    if kind == "share":  # a layer that no pattern names is left alone
        assert len(torch.unique(weights["fc2.weight"])) == 240


def _job(recipe: dict[str, Any], model: nn.Module, out: Path) -> Any:
    from copy import deepcopy

    from gossamer.compression.job import Job
    from gossamer.compression.progress import Reporter
    from gossamer.training.tasks import Classification

    plan, data = gossamer.recipe.load(recipe), datasets.load("digits")
    aim = Classification()
    return Job(plan, deepcopy(model), data, aim, out, {"recipe": recipe}, None, Reporter())


def test_dead_units_are_removed_and_reported(tmp_path: Path, trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model.get_parameter("fc1.weight")[3] = 0  # unit 3 of fc1 receives nothing
    job = _job(stages({"prune": {"density": 0.5}}, {"remove_dead": {}}), model, tmp_path / "r")
    job.begin(False)
    state, rows, _ = job.stages()
    assert rows[1]["dead_units"]["without_inputs"]["fc1"] >= 1
    assert not state.model.get_parameter("fc2.weight")[:, 3].any()
    assert rows[1]["score"] == pytest.approx(rows[0]["score"], abs=1e-6)
    assert rows[1]["density"] <= rows[0]["density"]


def test_training_after_pruning_keeps_the_zeros(tmp_path: Path, trained: nn.Module) -> None:
    job = _job(
        stages({"prune": {"density": 0.2}}, {"train": {**FAST, "optimizer": "adam"}}),
        trained,
        tmp_path / "r",
    )
    job.begin(False)
    _, rows, _ = job.stages()
    assert rows[1]["density"] == rows[0]["density"] == pytest.approx(0.2, abs=1e-3)


def test_what_cannot_work_is_refused_before_any_work(tmp_path: Path, trained: nn.Module) -> None:
    out = tmp_path / "r"
    with pytest.raises(RecipeError, match=r"stages\.0\.density\.fc9.*fc1\.weight"):
        gossamer.compress(
            trained, "digits", recipe=stages({"prune": {"density": {"fc9": 0.1}}}), out=out
        )
    with pytest.raises(RecipeError, match="'mlp' is not trained"):
        gossamer.compress("mlp", "digits", recipe="prune", out=out)
    with pytest.raises(ArgumentError, match="names no dataset"):
        compression.run(gossamer.recipe.load("prune"), trained, None, out)
    digits = datasets.load("digits")
    empty = Dataset("odd", digits.train, digits.test.take(slice(0, 0)), digits.test, 10)
    with pytest.raises(ArgumentError, match="no validation examples"):
        gossamer.compress(trained, empty, recipe="prune", out=out)
    assert not out.exists()


def test_weights_from_every_kind_of_file(tmp_path: Path, trained: nn.Module) -> None:
    from gossamer.pack import pack

    state = trained.state_dict()
    torch.save(state, tmp_path / "a.pt")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "b.pth")
    inputs.save_safetensors(trained, tmp_path / "c.safetensors")
    pack(trained, tmp_path / "d.gsm").close()
    data = datasets.load("digits")
    for name in ("a.pt", "b.pth", "c.safetensors", "d.gsm"):
        net = inputs.network("mlp-64-24-10", data, weights=tmp_path / name)
        assert fresh.digest(net.state_dict()) == fresh.digest(state)
        assert fresh.digest(inputs.read_state(tmp_path / name)) == fresh.digest(state)
    with pytest.raises(ArgumentError, match="does not fit"):
        inputs.network("mlp-64-20-10", data, weights=tmp_path / "a.pt")
    del state["fc2.bias"]
    torch.save(state, tmp_path / "e.pt")
    with pytest.raises(ArgumentError, match=r"missing 'fc2\.bias'"):
        inputs.network("mlp-64-24-10", data, weights=tmp_path / "e.pt")
    torch.save({"epoch": 3}, tmp_path / "f.pt")
    with pytest.raises(ArgumentError, match="'epoch' is of type int"):
        inputs.read_state(tmp_path / "f.pt")


def test_tied_weights_go_into_safetensors_once_and_come_back(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    inputs.save_safetensors(net, tmp_path / "t.safetensors")
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other[1].weight = other[0].weight
    inputs.load_weights(other, tmp_path / "t.safetensors")
    assert torch.equal(other[1].weight, net[0].weight)


def test_the_first_difference_is_found_where_it_is() -> None:
    old = {"a": [1, {"b": 2}], "c": None}
    assert folder._difference(old, {"a": [1, {"b": 2}], "c": None}) == ""
    assert folder._difference(old, {"a": [1, {"b": 3}]}) == "a.1.b was 2, now it is 3"
    assert folder._difference(old, {"a": [1], "c": None}).startswith("a was")
    assert folder._difference(old, {**old, "d": 1}) == "d was null, now it is 1"


def test_plans_are_timed_where_that_is_asked() -> None:
    """Both networks compiled, whatever zeros cost elsewhere."""
    data = datasets.load("digits", subset=20)
    dense, sparse = nets.build("mlp-64-16-10", seed=0), nets.build("mlp-64-16-10", seed=0)
    with torch.no_grad():
        names.weights(sparse)["fc1.weight"].mul_(0)
    found, told = measure.latency(dense, sparse, data, exported=False, planned=True)
    assert found is not None
    assert [row["engine"] for row in found["rows"]] == ["torch eager", "gossamer plan"]
    assert found["engine"] == "gossamer plan"
    assert not found["same_operations"]
    assert found["rows"][0]["ratio"] is None
    assert found["ratio"] > 0
    assert told == []


def test_a_plan_of_eight_bits_is_timed_against_the_dense_network_in_eight_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eight_bits, "installed", lambda name: False)
    data = datasets.load("digits", subset=40)
    dense, sparse = nets.build("mlp-64-16-10", seed=0), nets.build("mlp-64-16-10", seed=0)
    found, told = measure.latency(dense, sparse, data, exported=False, planned="int8")
    assert told == []
    assert found is not None
    assert found["engine"].startswith("gossamer-int8 before, after ")
    assert not found["same_operations"]
    assert found["ratio"] > 0
    scored = found["eight_bits"]
    assert scored["of"] == len(data.test)
    assert scored["score"] == pytest.approx(evaluate(dense, data.test).score, abs=0.05)


def test_what_has_no_eight_bits_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bits, "installed", lambda name: False)
    data = datasets.load("digits", subset=40)
    plain = nn.Sequential(nn.Flatten(), nn.Softmax(-1))
    found, told = measure.latency(plain, plain, data, exported=False, planned="int8")
    assert found is not None
    assert "eight_bits" not in found
    assert len(told) == 1
    assert told[0].startswith("latency of the plans was not measured: ")
