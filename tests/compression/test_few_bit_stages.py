"""Stages that leave few bits, alone and composed with the others."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer import datasets, nets
from gossamer.compression import fresh
from gossamer.core import names
from gossamer.core.errors import ArgumentError, RecipeError
from gossamer.core.quantizer import Trajectory, on_kept
from stages import Killed, Stop, job, mistaken, unfit

FAST = {"epochs": 2, "lr": 0.02}
ONE = {"epochs": 1, "lr": 0.02, "batch_size": 256}
ADAM = {"epochs": 2, "lr": 0.002, "optimizer": "adam"}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    net = nets.build("mlp-64-48-24-10", seed=0)
    gossamer.train(net, datasets.load("digits"), gossamer.TrainConfig(epochs=5, lr=0.1))
    return net


METHODS: list[tuple[dict[str, Any], int]] = [
    ({"method": "ttq", "train": FAST}, 3),
    ({"method": "ttq", "density": 0.5, "start": "ones", "train": FAST}, 3),
    ({"method": "ttq", "lr_factor": 0.01, "train": FAST}, 3),
    ({"method": "twn", "train": FAST}, 3),
    ({"method": "fixed", "bits": 4, "train": FAST}, 16),
    ({"method": "bwn", "train": FAST}, 2),
    ({"method": "binary-connect", "stochastic": True, "train": FAST}, 2),
    ({"method": "dorefa", "bits": 2, "train": FAST}, 4),
    ({"method": "lsq", "bits": 3, "train": FAST}, 8),
    ({"method": "lab", "train": ADAM}, 2),
    ({"method": "lat", "beta": 0.9, "train": FAST}, 3),
    ({"method": "lat", "exact": False, "train": ADAM}, 3),
    ({"method": "laq", "bits": 3, "levels": "logarithmic", "clip": 1, "train": ADAM}, 7),
    ({"method": "uniform", "bits": 4}, 16),
    ({"method": "lab"}, 2),
]
NAMES = [" ".join(map(str, (m["method"], *list(m)[1:-1]))) for m, _ in METHODS]


@pytest.mark.parametrize(("settings", "most"), METHODS, ids=NAMES)
@pytest.mark.parametrize("pruned", [False, True])
def test_every_method_leaves_few_values_and_what_is_pruned_at_zero(
    settings: dict[str, Any], most: int, pruned: bool, tmp_path: Path, trained: nn.Module
) -> None:
    given = [{"prune": {"density": 0.4}}] if pruned else []
    state, rows, _ = job([*given, {"quantize": settings}], trained, tmp_path).stages()
    weights = names.weights(state.model)
    inner = weights["fc2.weight"].detach()
    kept = inner[state.masks["fc2.weight"]] if pruned else inner
    assert 2 <= len(kept.unique()) <= most
    if pruned:
        assert not inner[~state.masks["fc2.weight"]].any()
    # the two ends stay float
    assert len(weights["fc1.weight"].unique()) > 500
    assert len(weights["fc3.weight"].unique()) > 50
    notes = rows[-1]["quantize"]
    assert [x["name"] for x in notes["layers"]] == ["fc2.weight"]
    assert notes["layers"][0]["values"] == len(inner.unique())
    assert notes["layers"][0]["density"] == pytest.approx(float((inner != 0).float().mean()))
    if "train" in settings:
        assert notes["final"]["epoch"] == 2
        assert notes["best"]["score"] >= notes["final"]["score"]
        path = notes["trajectory"]
        assert path[0]["step"] == 0
        assert path[-1]["high"]["fc2.weight"] == pytest.approx(float(inner.max()), rel=1e-3)
        assert rows[-1]["score"] > (0.3 if "stochastic" in settings else 0.7)
    assert state.fixed == {"fc2.weight"}


def test_ternary_and_m_bits_pack_to_their_size_after_pruning(
    tmp_path: Path, trained: nn.Module
) -> None:
    stages = [
        {"prune": {"density": 0.3, "include": ["fc3"]}},
        {"quantize": {"method": "ttq", "include": ["fc1"], "train": FAST}},
        {"quantize": {"method": "lsq", "bits": {"fc2": 3, "fc3": 4}, "ends": True, "train": FAST}},
        {"quantize_biases": {"bits": 6}},
        {"evaluate": {"latency": False}},
    ]
    recipe = {"name": "t", "max_drop": 1, "stages": stages}
    result = gossamer.compress(trained, "digits", recipe=recipe, out=tmp_path / "r")
    found = {x["name"]: x for x in result.run["layers"]}
    book = 8 * 12  # bits of a code book and its frame
    assert found["fc1.weight"]["distinct"] == 3
    assert 8 * found["fc1.weight"]["bytes"] <= 1.6 * 64 * 48 + book
    assert found["fc2.weight"]["distinct"] <= 8
    assert 8 * found["fc2.weight"]["bytes"] <= 3 * 48 * 24 + 2 * book
    assert found["fc3.weight"]["distinct"] <= 16
    assert found["fc3.weight"]["kept"] <= round(0.3 * 240)
    assert result.run["bytes"]["reloaded"]["identical"]
    assert result.accuracy_after > 0.8
    page = result.report.read_text().replace("<wbr>", "")
    for told in ("Few-bit weights", "2-quantize: ttq", "3-quantize: lsq", "Bits in the file"):
        assert told in page
    assert "the file holds the final one" in page


def test_later_trainings_hold_the_values(tmp_path: Path, trained: nn.Module) -> None:
    given = [{"quantize": {"method": "bwn"}}, {"train": {**FAST, "weight_decay": 0.01}}]
    state, _, _ = job(given, trained, tmp_path).stages()
    inner = names.parameters(state.model)["fc2.weight"]
    assert len(inner.unique()) == 2
    assert inner.requires_grad
    before = names.parameters(trained)["fc1.weight"]
    assert not torch.equal(names.parameters(state.model)["fc1.weight"], before)
    # unless a stage acts on them
    given = [{"quantize": {"method": "bwn"}}, {"quantize": {"method": "twn", "train": FAST}}]
    again, _, _ = job(given, trained, tmp_path / "again").stages()
    assert len(names.parameters(again.model)["fc2.weight"].unique()) == 3


@pytest.mark.parametrize("method", ["ttq", "lsq"])
def test_killed_and_started_again_it_ends_with_the_same_bits(
    method: str, tmp_path: Path, trained: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    # save after every batch, not every 20 seconds
    monkeypatch.setattr("gossamer.training.run.time.monotonic", iter(range(0, 10**9, 30)).__next__)
    settings = {"method": method, "train": {**ONE, "distill": {"weight": 0.5, "teacher": "start"}}}
    if method == "lsq":
        settings["bits"] = {"fc2": 3, "fc3": 4}
        settings["ends"] = True
    given = [{"prune": {"density": 0.5}}, {"quantize": settings}, {"train": ONE}]
    whole, rows, _ = job(given, trained, tmp_path / "whole").stages()
    for after in (1, 4, 2):
        with pytest.raises(Stop):
            job(given, trained, tmp_path / "broken", Killed(after)).stages()
    again, rows_again, _ = job(given, trained, tmp_path / "broken").stages()
    assert fresh.digest(again.model.state_dict()) == fresh.digest(whole.model.state_dict())
    assert rows_again[1]["quantize"] == rows[1]["quantize"]
    assert again.fixed == whole.fixed


def test_an_outlier_is_told_with_the_sparsity_it_causes(tmp_path: Path, trained: nn.Module) -> None:
    net = copy.deepcopy(trained)
    with torch.no_grad():
        net.get_parameter("fc2.weight")[0, 0] = 1000.0
    _, rows, _ = job([{"quantize": {"method": "ttq", "train": FAST}}], net, tmp_path).stages()
    (told,) = rows[0]["quantize"]["warnings"]
    assert "fc2.weight" in told
    assert "99.9 % zeros" in told


def test_a_layer_of_zeros_is_refused_and_nothing_is_changed(
    tmp_path: Path, trained: nn.Module
) -> None:
    net = copy.deepcopy(trained)
    with torch.no_grad():
        net.get_parameter("fc2.weight").zero_()
    made = job([{"quantize": {"method": "ttq", "train": FAST}}], net, tmp_path)
    before = fresh.digest(made.model.state_dict())
    with pytest.raises(ArgumentError, match=r"fc2.weight is all zeros.*exclude"):
        made.stages()
    assert fresh.digest(made.model.state_dict()) == before


def test_distillation_learns_from_the_teacher_that_is_named(
    tmp_path: Path, trained: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = nets.build("mlp-64-48-24-10", seed=5)
    with gossamer.pack.pack(other, tmp_path / "teacher.gsm"):
        pass
    ends = {}
    for which in ("before", "start", str(tmp_path / "teacher.gsm")):
        distill = {"weight": 1.0, "temperature": 2, "teacher": which}
        given = [
            {"prune": {"density": 0.3}},
            {"quantize": {"method": "twn", "train": {**ONE, "distill": distill}}},
        ]
        state, _, _ = job(given, trained, tmp_path / str(len(ends))).stages()
        assert fresh.digest(state.teacher("before").state_dict()) == fresh.digest(
            trained.state_dict()
        )
        ends[which] = fresh.digest(state.model.state_dict())
    assert len(set(ends.values())) == 3
    asked: dict[str, Any] = {}
    with monkeypatch.context() as m:  # a pretrained network by its name, in the data's shape
        m.setattr(nets, "build", lambda name, **given: asked.update(given, name=name) or other)
        assert state.teacher("resnet-56") is other
    assert (asked["name"], asked["pretrained"], asked["classes"]) == ("resnet-56", True, 10)
    with pytest.raises(ArgumentError, match="nothing has been compressed yet"):
        job([{"train": {**FAST, "distill": 0.5}}], trained, tmp_path / "none").stages()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("quantize: {method: ttqq}", ["line 3", "'ttqq' is not one of ttq, twn", "mean 'ttq'"]),
        ("quantize: {}", ["stages.0.method: missing"]),
        ("quantize: {method: lsq}", ["line 3", "lsq needs bits, 2 to 8"]),
        ("quantize: {method: lsq, bits: 1}", ["bits 1 is outside 2 to 8, of lsq"]),
        ("quantize: {method: dorefa, bits: {fc1: 9}}", ["bits 9 is outside 1 to 8"]),
        ("quantize: {method: laq, bits: 6, levels: logarithmic, beta: 0}", ["outside 2 to 5"]),
        ("quantize: {method: twn, bits: 2}", ["bits is an axis of dorefa, lsq", "takes none"]),
        ("quantize: {method: bwn, threshold: 0.1}", ["axis of ttq; bwn takes per_filter"]),
        ("quantize: {method: ttq, threshold: 1}", ["stages.0.threshold", "less than 1"]),
        ("quantize: {method: ttq, threshold: 0.1, density: 0.5}", ["not both"]),
        ("quantize: {method: lab, train: {epochs: 1}}", ["second moment", "adam", "beta"]),
        ("quantize: {method: ttq, lr_factor: 0}", ["lr_factor: 0", "greater than 0"]),
        ("quantize: {method: lat, scales: 3}", ["3 is not one of 1, 2"]),
        ("quantize: {method: ttq, train: {epochs: 1, lrr: 2}}", ["train.lrr", "mean 'lr'"]),
        (
            "quantize:\n      method: ttq\n      train: {epochs: 1, distill: {temperatur: 3}}",
            ["line 5", "train.distill.temperatur", "mean 'temperature'"],
        ),
        ("train: {epochs: 1, distill: 2}", ["line 3", "distill: 2", "less than or equal to 1"]),
        ("train: {epochs: 1, distill: {temperature: 0}}", ["distill.temperature", "greater"]),
        ("quantize: {method: twn}\n  - rewind", ["line 4", "rewind after quantize"]),
        (
            "share: {bits: 3}\n  - quantize: {method: ttq, train: {epochs: 1}}",
            ["line 4", "quantize after share would train the shared values apart"],
        ),
    ],
)
def test_mistakes_are_told_at_their_key(text: str, parts: list[str]) -> None:
    mistaken(text, parts)


def test_mistakes_that_the_network_shows_are_told_before_any_work(trained: nn.Module) -> None:
    for text, told in (
        ("quantize: {method: ttq, include: [fc9]}", "fc9"),
        ("quantize: {method: lsq, bits: {fc9: 3}}", "bits.fc9"),
        ("quantize: {method: ttq, exclude: [fc2]}", "ends: true"),
    ):
        unfit(text, told, trained)


def test_filters_with_holes_have_no_scale_each(tmp_path: Path, trained: nn.Module) -> None:
    given = [
        {"prune": {"density": 0.5}},
        {"quantize": {"method": "bwn", "per_filter": True, "train": FAST}},
    ]
    with pytest.raises(ArgumentError, match=r"fc2.weight is pruned"):
        job(given, trained, tmp_path).stages()


def test_projection_of_the_kept_weights_alone() -> None:
    def centred(weight: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert weight.tolist() == [1.0, -3.0]
        assert d.tolist() == [10.0, 30.0]
        return weight * d, None

    w, d = torch.tensor([[1.0, 0.0], [0.0, -3.0]]), torch.tensor([[10.0, 20.0], [5.0, 30.0]])
    value, slope = on_kept(centred)(w, d)
    assert value.tolist() == [[10.0, 0.0], [0.0, -90.0]]
    assert slope is None
    with pytest.raises(ArgumentError, match="every=0"):
        Trajectory([], every=0)


@pytest.mark.parametrize("importance", ["fisher", "hessian"])
def test_shared_values_go_where_the_loss_feels_them(
    importance: str, tmp_path: Path, trained: nn.Module
) -> None:
    def lost(**settings: Any) -> float:
        stages = [{"share": {"bits": 2, "init": "optimal", **settings}}]
        made = job(stages, trained, tmp_path / f"{len(settings)}")
        state, _, _ = made.stages()
        return gossamer.evaluate(state.model, datasets.load("digits").train).loss

    assert lost(importance=importance) < lost()


def test_an_importance_by_labels_needs_labels(tmp_path: Path, trained: nn.Module) -> None:
    data = datasets.load("digits").train.inputs
    by_labels = [{"share": {"bits": 4, "importance": "hessian"}}]
    with pytest.raises(RecipeError, match="fisher does without"):
        gossamer.compress(trained, data, recipe=by_labels, out=tmp_path / "h")
    without = [{"ecsq": {"lam": 0.01, "importance": "fisher"}}]
    gossamer.compress(trained, data, recipe=without, out=tmp_path / "f", max_drop=1)
    assert (tmp_path / "f" / "model.gsm").stat().st_size < 10_000
