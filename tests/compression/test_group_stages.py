"""Stages that speak of groups: whole groups pruned by any score, or trained to zero."""

from pathlib import Path

import pytest
import torch
from torch import nn

import gossamer
from gossamer import datasets, nets
from gossamer.compression import coverage, fresh
from gossamer.compression.floor import Rounds
from gossamer.compression.groups import _shifts, multiplications
from gossamer.compression.stages.group_lasso import GroupLassoStage
from gossamer.compression.stages.prune import Prune
from gossamer.compression.state import State
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.prune.scores import SCORES
from gossamer.structure import latency
from stages import Killed, Stop, job, mistaken, unfit

FAST = {"epochs": 1, "lr": 0.1}


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Identity(),
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 10),
    )


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    net = small()
    data = datasets.load("digits", subset=400)
    gossamer.train(net, data, gossamer.TrainConfig(epochs=1, lr=0.1, batch_size=16))
    return net


def rows(masks: Masks, name: str) -> int:
    return int(masks[name].flatten(1).any(1).sum())


@pytest.mark.parametrize("method", SCORES)
def test_whole_filters_by_every_score(method: str, trained: nn.Module, tmp_path: Path) -> None:
    stage = {"prune": {"method": method, "groups": "filter", "density": 0.5, "retrain": FAST}}
    state, recorded, _ = job([stage], trained, tmp_path).stages()
    assert (rows(state.masks, "1.weight"), rows(state.masks, "3.weight")) == (4, 6)
    dead = ~state.masks["1.weight"].flatten(1).any(1)
    assert torch.equal(dead, ~state.masks["1.bias"])
    weight = names.parameters(state.model)["1.weight"]
    assert not weight[dead].any()
    assert not names.parameters(state.model)["1.bias"][dead].any()
    assert weight[~dead].flatten(1).any(1).all()
    assert recorded[0]["score"] > 0.3


def test_costs_scopes_multiples_and_rounds(trained: nn.Module, tmp_path: Path) -> None:
    groups = {"kind": "filter", "cost": "flop", "multiple": 4, "normalise": True}
    stage = {"prune": {"groups": groups, "density": 0.6, "scope": "global", "rounds": 2}}
    state, _, _ = job([stage], trained, tmp_path).stages()
    kept = [rows(state.masks, n) for n in ("1.weight", "3.weight")]
    assert all(n % 4 == 0 for n in kept)
    assert kept[0] * 9 * 36 + kept[1] * 72 * 16 <= 0.6 * (8 * 9 * 36 + 12 * 72 * 16)


def test_later_rounds_keep_within_earlier_ones_and_by_layer(
    trained: nn.Module, tmp_path: Path
) -> None:
    given = [
        {"prune": {"groups": "filter", "density": {"3": 0.5}}},
        {"prune": {"groups": "channel", "density": 0.5, "exclude": ["1"]}},
        {"prune": {"groups": "shape", "density": 0.25, "include": ["3"], "method": "random"}},
        {"share": {"bits": 3}},
    ]
    state, _, _ = job(given, trained, tmp_path).stages()
    mask = state.masks["3.weight"]
    assert rows(state.masks, "3.weight") == 6
    assert int(mask.flatten(1).any(0).sum()) == 18
    assert int(mask.any(0).flatten(1).any(1).sum()) <= 4  # of the channels left
    assert "1.weight" not in state.masks or state.masks["1.weight"].all()


def test_two_of_four_and_blocks(trained: nn.Module, tmp_path: Path) -> None:
    given = [{"prune": {"groups": "2:4", "include": ["3", "7"], "retrain": FAST}}]
    state, recorded, _ = job(given, trained, tmp_path / "a").stages()
    assert set(state.masks) == {"3.weight", "7.weight"}
    assert state.masks.density == 0.5
    runs = state.masks["3.weight"].movedim(1, -1).reshape(-1, 4)
    assert (runs.sum(1) == 2).all()
    assert recorded[0]["score"] > 0.3
    blocks = [{"prune": {"groups": {"kind": "block-1x4", "norm": "mean"}, "density": 0.25}}]
    state, _, _ = job(blocks, trained, tmp_path / "b").stages()
    runs = state.masks["7.weight"].reshape(-1, 4)
    assert (runs.all(1) | ~runs.any(1)).all()


def test_a_run_by_groups_resumes_to_the_same_bits(trained: nn.Module, tmp_path: Path) -> None:
    stage = {"prune": {"groups": "filter", "density": 0.5, "retrain": FAST}}
    whole, _, _ = job([stage], trained, tmp_path / "a").stages()
    with pytest.raises(Stop):
        job([stage], trained, tmp_path / "b", Killed(1)).stages()
    again, _, _ = job([stage], trained, tmp_path / "b").stages()
    assert fresh.digest(whole.model.state_dict()) == fresh.digest(again.model.state_dict())


def test_units_have_a_strength_by_layer() -> None:
    net = nets.build("lstm-lm", classes=7, embedding=4, hidden=(3, 2))
    stage = GroupLassoStage(
        groups={"unit": {"rnn.0": 0.1}},
        consumers={"rnn.0": "rnn.1", "rnn.1": "output"},
        train={"epochs": 1},  # type: ignore[arg-type]
    )
    stage.check(net)
    ((family, strength),) = stage._families(net, "unit")
    assert (family.layer, strength, len(family)) == ("rnn.0_l0", 0.1, 3)
    assert stage.covered(net) == {
        "rnn.0.weight_ih_l0", "rnn.0.weight_hh_l0", "rnn.1.weight_ih_l0",
    }  # fmt: skip


LASSO = {
    "group_lasso": {
        "groups": {"filter": 0.02, "shape": {"3": 0.2}},
        "form": "proximal",
        "train": {"epochs": 3, "lr": 0.1},
        "finetune": {"epochs": 1, "lr": 0.05, "weight_decay": 0.001},
    }
}


def test_groups_are_trained_to_zero_and_stay_there(trained: nn.Module, tmp_path: Path) -> None:
    state, recorded, _ = job([LASSO, {"share": {"bits": 4}}], trained, tmp_path / "a").stages()
    notes = recorded[0]["group_lasso"]
    assert [(g["kind"], g["layer"], g["groups"]) for g in notes["groups"]] == [
        ("filter", "1", 8), ("filter", "3", 12), ("shape", "3", 72),
    ]  # fmt: skip
    shapes = notes["groups"][2]
    assert 0 < shapes["left"] < 72
    weight = names.parameters(state.model)["3.weight"].detach()
    assert int(weight.flatten(1).any(0).sum()) <= shapes["left"]
    (row,) = (x for x in notes["layers"] if x["name"] == "3.weight")
    assert row["columns"][0] == 72
    assert row["multiplications"][0] == 12 * 72 * 16
    assert row["multiplications"][1] == row["rows"][1] * row["columns"][1] * 16
    assert not weight[~state.masks["3.weight"]].any()
    assert {"lasso", "finetune"} <= set(notes)
    with pytest.raises(Stop):
        job([LASSO], trained, tmp_path / "b", Killed(3)).stages()
    again, _, _ = job([LASSO], trained, tmp_path / "b").stages()
    once, _, _ = job([LASSO], trained, tmp_path / "c").stages()
    assert fresh.digest(again.model.state_dict()) == fresh.digest(once.model.state_dict())


def test_a_lasso_that_empties_a_layer_is_refused(trained: nn.Module, tmp_path: Path) -> None:
    train = {"epochs": 1, "lr": 0.1, "schedule": "cosine"}
    stage = {"group_lasso": {"groups": {"row": 50.0}, "form": "proximal", "train": train}}
    with pytest.raises(ArgumentError, match=r"every group of 7\.weight became zero"):
        job([stage], trained, tmp_path).stages()


def test_coupled_groups_go_in_rounds_as_far_as_the_floor_allows(
    trained: nn.Module, tmp_path: Path
) -> None:
    lasso = {
        "groups": {"coupled": 8.0},
        "relative": True,
        "rounds": 3,
        "growth": 8.0,
        "form": "proximal",
        "train": {"epochs": 1, "lr": 0.1},
        "finetune": {"epochs": 1, "lr": 0.05},
    }
    state, (row, shrunk), _ = job([{"group_lasso": lasso}, "shrink"], trained, tmp_path).stages()
    assert row["rolled_back"]["round"] < 3  # so strong that the last round leaves nothing
    groups = row["group_lasso"]["groups"]
    assert {g["kind"] for g in groups} == {"channel"}
    assert 0 < sum(g["left"] for g in groups) < sum(g["groups"] for g in groups)
    assert shrunk["shrink"]["parameters"][1] < shrunk["shrink"]["parameters"][0]
    left = [g["left"] for g in groups]
    assert [len(names.parameters(state.model)[f"{g['layer']}.weight"]) for g in groups] == left


def test_a_relative_strength_of_1_takes_a_mean_group_to_zero(tmp_path: Path) -> None:
    state, _, _ = job([], small(), tmp_path).stages()
    train = {"epochs": 3, "lr": 0.2, "batch_size": 7}
    for form, momentum in (("proximal", 0.9), ("sub-gradient", 0.5)):
        stage = GroupLassoStage(
            groups={"filter": 1.0}, form=form, relative=True, train=train | {"momentum": momentum}  # type: ignore[arg-type]
        )  # fmt: skip
        ((family, _), *_) = stage._families(state.model, "filter")
        weights = names.parameters(state.model)
        steps = 3 * -(-len(state.data.train) // 7)
        # the mean of half a cosine is half of its height
        path = 0.1 * steps / (1 if form == "proximal" else 0.5)
        unit = stage._unit(family, weights, state)
        assert unit * path == pytest.approx(float(family.norms(weights).mean()), rel=0.01)


def test_what_groups_cover(trained: nn.Module) -> None:
    found = coverage.of_stage(trained, Prune(groups="filter", density=0.5))  # type: ignore[arg-type]
    assert found is not None
    assert found["covered"] == 72 + 864


def test_multiplications_by_hand(tmp_path: Path) -> None:
    state, _, _ = job([], nets.build("resnet-8", in_shape=(1, 8, 8)), tmp_path).stages()
    found = multiplications(state)
    assert found["conv1.weight"] == 64.0  # as often as the map has places
    assert found["layer3.0.conv2.weight"] == 4.0
    assert found["linear.weight"] == 1.0
    assert set(found) == set(names.weights(state.model))


def test_mistakes_in_settings_are_named() -> None:
    mistaken("prune: {groups: filters, density: 0.5}", ["line 3", "did you mean 'filter'"])
    mistaken("prune: {groups: 2:4}", ["line 3", "write N:M in quotes"])
    mistaken("prune: {groups: '2:4', density: 0.5}", ["say themselves how much stays"])
    mistaken("prune: {groups: filter}", ["give either density"])
    mistaken("prune: {groups: filter, density: auto}", ["of single weights"])
    mistaken("prune: {groups: {kind: filter, cost: time}, density: 0.5}", ["cost", "flop"])
    timed = "kind: coupled, cost: latency"
    mistaken("prune: {groups: {kind: row, cost: latency}, density: 0.5}", ["coupled ones, not row"])
    mistaken("prune: {groups: {kind: row, milliseconds: 1}}", ["add it"])
    mistaken(f"prune: {{groups: {{{timed}}}, density: 0.5}}", ["give scope: global"])
    mistaken(
        f"prune: {{groups: {{{timed}, milliseconds: 1}}, density: 0.5, scope: global}}",
        ["leave density out"],
    )
    mistaken(f"prune: {{groups: {{{timed}}}, scope: global}}", ["give either density"])
    train = "train: {epochs: 1}"
    mistaken(f"group_lasso: {{groups: {{row: -1}}, {train}}}", ["groups.row", "-1", "equal to 0"])
    mistaken(f"group_lasso: {{groups: {{rows: 1}}, {train}}}", ["did you mean 'row'"])
    mistaken(f"group_lasso: {{groups: {{'2:4': 1}}, {train}}}", ["take prune for it"])
    mistaken(f"group_lasso: {{groups: {{}}, {train}}}", ["name a kind"])


def test_layers_without_such_groups_are_named_before_any_work(trained: nn.Module) -> None:
    unfit(
        "prune: {groups: filter, density: 0.5, include: ['7']}",
        r"7\.weight has no groups 'filter': it is of Linear",
        trained,
    )
    unfit(
        "group_lasso: {groups: {shape: {'7': 1}}, train: {epochs: 1}}",
        r"7\.weight has no groups 'shape'",
        trained,
    )
    unfit(
        "group_lasso: {groups: {row: {'type:Conv*': 1}}, train: {epochs: 1}}",
        "has 4 dimensions",
        trained,
    )
    unfit(
        "group_lasso: {groups: {row: {'type:RNN': 1}}, train: {epochs: 1}}",
        "no layer has such groups at a strength above 0",
        trained,
    )
    unfit("prune: {groups: head, density: 0.5}", "no layer has groups 'head'", trained)
    unfit(
        "prune: {groups: {kind: unit, consumers: {a: b}}, density: 0.5}",
        "consumers names 'a'",
        nets.build("lstm-lm", classes=7, embedding=4, hidden=(3, 2)),
    )


@pytest.mark.parametrize("name", ["conv-2", "resnet-8"])
def test_coupled_groups_are_pruned_through_the_network_and_taken_out(
    name: str, tmp_path: Path
) -> None:
    data = datasets.load("digits", subset=256)
    net = nets.build(name, seed=0, in_shape=(1, 8, 8))
    stages = [{"prune": {"groups": "coupled", "density": 0.5}}, "shrink"]
    done = gossamer.compress(net, data, recipe=stages, out=tmp_path / "run", max_drop=1)
    row = next(r for r in done.run["stages"] if "shrink" in r)["shrink"]
    assert row["parameters"][1] < 0.6 * row["parameters"][0]
    macs = done.run["macs"]
    assert macs["after"]["macs"] < 0.6 * macs["before"]["macs"]
    assert done.dense_bytes == sum(t.numel() * t.element_size() for t in net.state_dict().values())
    again = gossamer.load(done.file, nets.build(name, seed=1, in_shape=(1, 8, 8)))
    x = data.test.batch(slice(0, 8))[0]
    torch.testing.assert_close(again.eval()(x), done.model.eval()(x))


def test_residual_blocks_go_whole(tmp_path: Path) -> None:
    """Of the three last layers of a block the one whose weights are smallest, with its block."""
    data = datasets.load("digits", subset=256)
    net = nets.build("resnet-20", seed=0, in_shape=(1, 8, 8))
    with torch.no_grad():
        net.layer2[1].conv2.weight.mul_(1e-3)
    depth = {"groups": "depth", "include": ["layer2.1.conv2", "layer3.[12].conv2"]}
    stages = [{"prune": {**depth, "scope": "global", "density": 0.7}}, "shrink"]
    done = gossamer.compress(net, data, recipe=stages, out=tmp_path / "run", max_drop=1)
    assert not any(isinstance(m, nn.Conv2d) for m in done.model.layer2[1].modules())
    convs = sum(isinstance(m, nn.Conv2d) for m in done.model.modules())
    assert convs == sum(isinstance(m, nn.Conv2d) for m in net.modules()) - 2
    again = gossamer.load(done.file, nets.build("resnet-20", seed=1, in_shape=(1, 8, 8)))
    x = data.test.batch(slice(0, 8))[0]
    torch.testing.assert_close(again.eval()(x), done.model.eval()(x))


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_is_left_of_a_block_that_goes(trained: bool, tmp_path: Path) -> None:
    """Nor of its batch-norm, so that a plan of the network adds no zeros."""
    data = datasets.load("digits", subset=256)
    net = nets.build("resnet-20", seed=0, in_shape=(1, 8, 8))
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.bias.fill_(0.3)
                m.running_mean.fill_(0.2)
    depth = {"groups": "depth", "include": ["layer1.1.conv2"], "density": 0.1}
    stages = [{"prune": {**depth, **({"retrain": FAST} if trained else {})}}, "shrink"]
    done = gossamer.compress(net, data, recipe=stages, out=tmp_path / "run", max_drop=1)
    left = dict(done.model.layer1[1].named_buffers())["bn2.value"]
    assert left.shape == (16,)
    assert not left.any()
    x = data.test.batch(slice(0, 4))[0]
    plan = gossamer.compile(done.model.eval(), x, engine="numpy")
    assert [n.op for n in plan.graph.nodes].count("conv") == 17
    assert {n.op for n in plan.graph.nodes}.isdisjoint({"fill", "binary"})
    torch.testing.assert_close(plan(x), done.model(x), rtol=1e-4, atol=1e-5)


def test_the_norm_behind_a_bias_gives_nothing_either(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        net[0].bias.fill_(0.7)
        net[1].bias.fill_(0.3)
    state, _, _ = job([{"prune": {"density": 0.5}}], small(), tmp_path).stages()
    state.model = net
    weight = {"0.weight": torch.zeros(4, 1, 3, 3, dtype=torch.bool)}
    masks = Masks(weight) | _shifts(state, Masks(weight))
    with torch.no_grad():
        net[0].weight.zero_()
        net[1].bias.mul_(masks["1.bias"])
    assert net.eval()(torch.randn(2, 1, 8, 8)).abs().max() < 1e-6


def _counted(whole: nn.Module, smaller: nn.Module, example: object) -> tuple[float, float]:
    """A clock by which a network takes a millisecond for 1,000 parameters."""
    counts = [sum(p.numel() for p in m.parameters()) for m in (whole, smaller)]
    return counts[0] / 1000, counts[0] / counts[1]


@pytest.mark.parametrize("budget", [{"density": 0.5}, {"milliseconds": 1.5}])
def test_coupled_groups_under_a_budget_of_milliseconds(
    budget: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "milliseconds", _counted)
    net = small()
    whole = sum(p.numel() for p in net.parameters()) / 1000
    groups = {"kind": "coupled", "cost": "latency", "normalise": True}
    stage = {"groups": groups, "scope": "global", "rounds": 2, "retrain": FAST}
    if "density" in budget:
        stage |= budget
    else:
        groups |= budget
    most = budget.get("milliseconds", whole / 2)
    for times in range(2):  # what was measured is not measured again
        state, rows, _ = job([{"prune": stage}, "shrink"], net, tmp_path).stages()
        assert rows[0]["milliseconds"][0] == whole
        left = sum(p.numel() for p in state.model.parameters()) / 1000
        assert 0.75 * most < left <= most, times


def test_the_milliseconds_told_are_those_of_the_round_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "milliseconds", _counted)
    kept = iter([True, False])
    monkeypatch.setattr(State, "keeps_floor", lambda _: next(kept))
    groups = {"kind": "coupled", "cost": "latency"}
    stage = {"groups": groups, "scope": "global", "density": 0.5, "rounds": 2}
    state, rows, _ = job([{"prune": stage}, "shrink"], small(), tmp_path / "a").stages()
    assert rows[0]["rolled_back"]["round"] == 1
    left = sum(p.numel() for p in state.model.parameters()) / 1000
    assert rows[0]["milliseconds"][1] == pytest.approx(left)
    # killed at the end of the stage, it tells of what was measured before
    given = [{"prune": {**stage, "rounds": 1}}]
    with monkeypatch.context() as m:
        m.setattr(Rounds, "back", _stop)
        with pytest.raises(Stop):
            job(given, small(), tmp_path / "b").stages()
    _, rows, _ = job(given, small(), tmp_path / "b").stages()
    assert rows[0]["milliseconds"][1] < rows[0]["milliseconds"][0]


def _stop(_: Rounds) -> None:
    raise Stop


def test_a_budget_of_milliseconds_below_the_floor_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "milliseconds", _counted)
    groups = {"kind": "coupled", "cost": "latency", "milliseconds": 0.001}
    stage = {"prune": {"groups": groups, "scope": "global"}}
    with pytest.raises(ArgumentError, match=r"below .* that the floor keeps"):
        job([stage], nets.build("conv-2", in_shape=(1, 8, 8)), tmp_path).stages()


def test_zero_weights_take_as_long_as_others() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net[0].weight[:4] = 0
        net[2].weight[:, :4] = 0
    cost = latency.Latency(net, torch.randn(3, 4), clock=_counted)
    assert cost.whole == cost(Masks({"0.weight": torch.ones(8, 4, dtype=torch.bool)}))
    keep = torch.arange(8) < 5
    masks = Masks({"0.weight": keep[:, None].expand(8, 4), "2.weight": keep.expand(2, 8)})
    assert cost(masks) == pytest.approx((5 * 4 + 5 + 2 * 5 + 2) / 1000)
    assert not net[0].weight[:4].any()


def test_milliseconds_are_of_both_networks() -> None:
    net = nn.Linear(4, 4).train()
    ms, ratio = latency.milliseconds(net, net, torch.randn(1, 4))
    assert ms > 0
    assert ratio > 0
    assert net.training
