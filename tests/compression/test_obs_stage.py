"""The stage obs: post-training compression from inputs alone."""

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer import datasets, nets
from gossamer.compression.progress import Lines, Reporter
from gossamer.compression.stages.obs import _next
from gossamer.core import names
from gossamer.training import TrainConfig, evaluate, train
from stages import Stop, job, mistaken, unfit

DATA = datasets.load("digits")


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, groups=2),
            nn.ReLU(), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip
        train(net, DATA, TrainConfig(epochs=8, lr=0.1))
    return net


def after(
    settings: dict[str, Any], net: nn.Module, out: Path, *before: Any, progress: Any = None
) -> Any:
    stages = [*before, {"obs": {"calibration": 128, **settings}}]
    state, rows, _ = job(stages, net, out, progress).stages()
    return state, rows[-1]


def loss(net: nn.Module) -> float:
    return evaluate(net, DATA.validation).loss


def test_pruning_costs_less_than_by_magnitude(trained: nn.Module, tmp_path: Path) -> None:
    state, row = after({"density": 0.4}, trained, tmp_path / "a")
    other, _, _ = job([{"prune": {"density": 0.4}}], trained, tmp_path / "b").stages()
    for name, w in names.weights(state.model).items():
        wanted = int(0.4 * w.numel() + 0.5)
        assert abs(int(torch.count_nonzero(w)) - wanted) <= 2  # by group of a convolution
        assert torch.equal(state.masks[name], w != 0)
    assert loss(state.model) < loss(other.model)
    assert all(layer["seen"] for layer in row["obs"]["layers"])


@pytest.mark.parametrize("group", ["channel", "tensor", 16])
def test_rounding_costs_less_than_to_nearest(
    trained: nn.Module, tmp_path: Path, group: Any
) -> None:
    state, _ = after({"bits": 3, "group": group}, trained, tmp_path / "a")
    plain = copy.deepcopy(trained)
    with torch.no_grad():
        for name, w in names.weights(state.model).items():
            most = {"channel": 7, "tensor": 7, 16: 7 * 36}[group]
            assert all(len(r.unique()) <= most for r in (w if group != "tensor" else [w]))
            own = names.parameters(plain)[name]
            step = own.abs().max() / 3
            own.copy_((own / step).round() * step)
    assert loss(state.model) < loss(plain)
    assert state.fixed == set(names.weights(trained))


def test_a_rate_makes_a_small_file_without_any_training(trained: nn.Module, tmp_path: Path) -> None:
    before = evaluate(trained, DATA.test).accuracy
    sizes, accuracies = [], []
    for i, rate in enumerate((0.01, 0.1)):
        state, row = after({"rate": rate}, trained, tmp_path / str(i))
        sizes.append(row["bytes"])
        accuracies.append(evaluate(state.model, DATA.test).accuracy)
        for w in names.weights(state.model).values():
            kept = w.detach()[w != 0].abs()
            gaps = kept.unique().double().diff(prepend=kept.new_zeros(1).double())
            codes = kept.unique().double() / float(gaps.min())  # of the grid's step
            torch.testing.assert_close(codes, codes.round(), rtol=1e-4, atol=0)
    assert sizes[0] > sizes[1]
    assert sizes[0] < 4 * sum(p.numel() for p in trained.parameters()) / 5
    assert accuracies[0] > before - 0.02


def test_what_was_pruned_stays_pruned(trained: nn.Module, tmp_path: Path) -> None:
    state, _ = after({"bits": 4}, trained, tmp_path, {"prune": {"density": 0.5}})
    for name, w in names.weights(state.model).items():
        assert int(torch.count_nonzero(w)) <= int(0.5 * w.numel() + 0.5)
        assert not (w[~state.masks[name]]).any()


def test_layers_by_pattern_and_what_is_left(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(1, 2, 2, stride=2)
            self.lstm = nn.LSTM(32, 8, batch_first=True)
            self.out = nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = self.up(x).movedim(1, 3).flatten(2)
            out: torch.Tensor = self.out(self.lstm(rows)[0][:, -1])
            return out

    torch.manual_seed(0)
    net = Net()
    state, row = after({"bits": {"lstm.*": 4, "up": 8}, "calibration": 64}, net, tmp_path)
    seen = {r["name"]: r["seen"] for r in row["obs"]["layers"]}
    assert seen == {"up.weight": True, "lstm.weight_ih_l0": True, "lstm.weight_hh_l0": True}
    assert [(r["name"], r["kind"]) for r in row["obs"]["outside"]] == [("out.weight", "Linear")]
    assert "does not name it" in row["obs"]["outside"][0]["note"]
    assert torch.equal(state.model.out.weight, net.out.weight)
    for w in (state.model.lstm.weight_ih_l0, state.model.lstm.weight_hh_l0):
        assert all(len(r.unique()) <= 15 for r in w)
    assert not torch.equal(state.model.up.weight, net.up.weight)


class Words(nn.Module):
    """A table, a matrix without a module of its own, one that nothing is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 8)
        self.mix = nn.Parameter(torch.randn(8, 12) / 3)
        self.places = nn.Parameter(torch.randn(64, 8))
        self.pair, self.out = nn.Bilinear(12, 12, 10), nn.Linear(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = (self.table(x.flatten(1).round().clamp(0, 16).long()) + self.places).mean(1)
        mixed = found @ self.mix
        return self.out(self.pair(mixed, mixed))


def test_tables_where_the_recipe_says_so_and_every_matrix_is_told_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, said = Words(), io.StringIO()
    state, row = after({"bits": 4}, net, tmp_path / "a", progress=Lines(said))
    layers = {r["name"]: r for r in row["obs"]["layers"]}
    assert [*layers] == ["mix", "out.weight", "pair.weight"]
    assert layers["mix"]["seen"]
    assert not layers["pair.weight"]["seen"]
    outside = {r["name"]: r["note"] for r in row["obs"]["outside"]}
    assert "embeddings: true" in outside["table.weight"]
    assert "nothing is multiplied" in outside["places"]
    told = said.getvalue()
    for part in ("pair.weight: its products were not seen", "table.weight: left", "places: left"):
        assert part in told
    assert torch.equal(state.model.table.weight, net.table.weight)
    state, row = after({"bits": 4, "embeddings": True}, net, tmp_path / "b")
    assert row["obs"]["layers"][0]["name"] == "table.weight"
    assert all(len(r.unique()) <= 15 for r in state.model.table.weight)
    assert "table.weight" in state.fixed
    state, row = after({"bits": 4, "exclude": ["mix", "pair"]}, net, tmp_path / "c")
    assert [r["name"] for r in row["obs"]["layers"]] == ["out.weight"]


def test_a_network_of_no_known_layer_is_treated(tmp_path: Path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(64, 9) / 8), nn.Parameter(torch.randn(9, 10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x.flatten(1) @ self.a) @ self.b

    state, row = after({"bits": 3}, Bare(), tmp_path)
    assert [r["name"] for r in row["obs"]["layers"]] == ["a", "b"]
    assert all(len(c.unique()) <= 7 for c in state.model.a.T)  # by output


def test_killed_inside_the_stage_it_goes_on_to_the_same_bits(
    trained: nn.Module, tmp_path: Path
) -> None:
    class Stopping(Reporter):
        def count(self, name: str, done: int, total: int, item: str = "") -> None:
            if done == 2:
                raise Stop

    whole, rows = after({"bits": 3}, trained, tmp_path / "a")
    with pytest.raises(Stop):
        after({"bits": 3}, trained, tmp_path / "b", progress=Stopping())
    assert len(list((tmp_path / "b").glob("1-*.train.pt"))) == 2
    again, more = after({"bits": 3}, trained, tmp_path / "b")
    assert not list((tmp_path / "b").glob("*.train.pt"))
    assert more["obs"] == rows["obs"]
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resumed_it_gives_the_same_bits(trained: nn.Module, tmp_path: Path) -> None:
    first, _ = after({"rate": 0.05}, trained, tmp_path / "a")
    again, _ = after({"rate": 0.05}, trained, tmp_path / "b")
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    restored, _ = after({"rate": 0.05}, trained, tmp_path / "a")  # from the stage's own file
    for a, b in zip(first.model.parameters(), restored.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_rate_is_the_highest_that_keeps_the_floor(trained: nn.Module, tmp_path: Path) -> None:
    def ran(rate: Any, name: str) -> Any:
        stages = [{"obs": {"rate": rate, "calibration": 64}}]
        recipe = {"name": "r", "max_drop": 0.02, "stages": stages}
        return gossamer.compress(trained, "digits", recipe=recipe, out=tmp_path / name)

    found = ran("auto", "a")
    rate = found.run["stages"][0]["obs"]["rate"]
    assert found.run["floor"]["kept"]
    same = ran(rate, "b")
    assert same.bytes == found.bytes
    with pytest.warns(UserWarning, match="FLOOR NOT KEPT"):
        ran(2 * rate, "c")


@pytest.mark.parametrize("highest", range(-21, 11))
@pytest.mark.parametrize("growth", [0.5, 1.0, 2.0, None])
def test_the_search_for_a_rate_is_short_and_exact(highest: int, growth: float | None) -> None:
    def lost(power: int) -> float:
        if growth is None:  # a score that says nothing beside yes and no: better than before, NaN
            return -1.0 if power <= highest else math.inf
        return 2 ** (growth * (power - highest - 0.5))

    found: dict[int, float] = {}
    while (power := _next(found)) is not None:
        assert power not in found
        found[power] = lost(power)
    assert len(found) <= (5 if growth == 1 else 11)
    assert max((p for p, lost in found.items() if lost <= 1), default=-21) == highest
    assert min(found) >= -20  # none lower is tried where none keeps the floor
    assert max(found) <= 10


def test_mistakes() -> None:
    mistaken("obs: {}", ["give density, bits or rate"])
    mistaken("obs: {bits: 4, rate: 0.1}", ["give either bits", "or rate"])
    mistaken("obs: {density: 0.4, sparsity: '2:4'}", ["keeps half"])
    mistaken("obs: {bits: 1}", ["bits"])
    mistaken("obs: {bits: 17}", ["bits"])
    mistaken("obs: {bits: 4, group: 4}", ["group"])
    mistaken("obs: {density: 0.5, sparsity: '3:4'}", ["2:4"])
    unfit("obs: {bits: {nothing: 4}}", "'nothing' matches nothing", nets.build("mlp-64-20-10"))
