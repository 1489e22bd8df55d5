import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer import datasets, nets
from gossamer.core import names
from gossamer.core.errors import ArgumentError, FormatError, GossamerError
from gossamer.core.masks import EmptyLayerWarning, Masks, shuffled, zero_outside_
from gossamer.core.method import Masked, Snapshot
from gossamer.prune import lottery
from gossamer.prune.tickets import Tickets, load_tickets, save_tickets
from gossamer.training import Progress, TrainConfig, train

DIGITS = datasets.load("digits")
CONFIG = TrainConfig(2, batch_size=100, lr=2e-3, optimizer="adam")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10)
    )


def search(folder: Path, **options: Any) -> tuple[nn.Module, Tickets]:
    model = small()
    run = options.pop("train", None) or lottery.trainer(DIGITS, CONFIG, evaluate_every_steps=5)
    given = {"rounds": 3, "rates": 0.4, "output": "4", **options}
    return model, lottery.search(model, run, folder=folder, **given)


# Pure pieces


def test_rates_by_pattern_with_the_output_at_half() -> None:
    pool = ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    found = lottery.layer_rates(pool, {"*": 0.2, "conv1": 0.1}, output="fc2")
    assert list(found.values()) == [0.1, 0.2, 0.2, 0.1]
    assert lottery.layer_rates(pool, {"fc*": 0.2}, output=None) == {
        "fc1.weight": 0.2,
        "fc2.weight": 0.2,
    }
    for bad in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ArgumentError, match=r"outside \(0, 1\)"):
            lottery.layer_rates(pool, bad, output=None)
        with pytest.raises(ArgumentError, match=r"outside \(0, 1\)"):
            lottery.ladder({"w": bad}, 1)
    with pytest.raises(ArgumentError, match="'ip9' matches nothing"):
        lottery.layer_rates(pool, 0.2, output="ip9")


def test_the_published_ladder() -> None:
    published = [100, 80.0, 64.1, 51.3, 41.1, 32.9, 26.3, 21.1, 16.9, 13.5]
    published += [10.8, 8.7, 7.0, 5.6, 4.5, 3.6, 2.9]
    weights = names.weights(nets.build("lenet-300-100", seed=0))
    rates = lottery.layer_rates(weights, 0.2, output="ip3")
    masks = Masks({n: torch.ones_like(w) != 0 for n, w in weights.items()})
    for densities, expected in zip(lottery.ladder(rates, 16), published, strict=True):
        masks = lottery.next_masks(weights, masks, densities, "layer")
        assert abs(100 * masks.density - expected) <= 0.05


def test_next_masks_by_hand() -> None:
    weights = {"a": torch.tensor([5.0, -4.0, 0.1, 9.0]), "b": torch.tensor([1.0, -2.0])}
    masks = Masks({"a": torch.tensor([True, True, True, False]), "b": torch.ones(2) > 0})
    found = lottery.next_masks(weights, masks, {"a": 0.5, "b": 0.5}, "layer")
    assert found["a"].tolist() == [True, True, False, False]
    assert found["b"].tolist() == [False, True]
    found = lottery.next_masks(weights, masks, {"a": 0.5, "b": 0.5}, "global")
    assert found["a"].tolist() == [True, True, False, False]
    assert found["b"].tolist() == [False, True]


def test_next_masks_refuses_and_warns() -> None:
    weights = {"a": torch.ones(4)}
    masks = Masks({"a": torch.ones(4) > 0})
    for bad in (0.0, 1.1, float("nan")):
        with pytest.raises(ArgumentError, match=r"outside \(0, 1\]"):
            lottery.next_masks(weights, masks, {"a": bad}, "layer")
    with pytest.raises(ArgumentError, match=r"shape \(3,\)"):
        lottery.next_masks(weights, Masks({"a": torch.ones(3) > 0}), {"a": 0.5}, "layer")
    with pytest.raises(ArgumentError, match="densities name 'b'"):
        lottery.next_masks(weights, masks, {"b": 0.5}, "layer")
    with pytest.warns(EmptyLayerWarning, match="'a' keeps none"):
        lottery.next_masks(weights, masks, {"a": 0.1}, "layer")


def test_rewinding_gives_every_bit_back_and_exact_zeros() -> None:
    model = small()
    theta = names.snapshot(model)
    train(model, DIGITS, CONFIG)
    assert not torch.equal(model[2].running_mean, theta["2.running_mean"])
    masks = Masks({"1.weight": theta["1.weight"] > 0})
    lottery.rewind_(model, masks, theta)
    for name, tensor in names.tensors(model).items():
        if name != "1.weight":
            assert torch.equal(tensor, theta[name])
    w = model[1].weight.detach()
    assert torch.equal(w[masks["1.weight"]], theta["1.weight"][masks["1.weight"]])
    assert (w.view(torch.int32)[~masks["1.weight"]] == 0).all()  # +0, not -0


def test_rewinding_checks_before_it_writes() -> None:
    model, other = small(), nn.Linear(2, 2)
    before = names.snapshot(model)
    for masks, theta, match in [
        (Masks(), names.snapshot(other), "theta does not fit"),
        (Masks({"1.weight": torch.ones(2) > 0}), {n: t + 1 for n, t in before.items()}, "shape"),
    ]:
        with pytest.raises(ArgumentError, match=match):
            lottery.rewind_(model, masks, theta)
        assert all(torch.equal(t, before[n]) for n, t in names.tensors(model).items())


def test_reinit_draws_anew_under_the_same_mask() -> None:
    model = small()
    before = names.snapshot(model)
    masks = Masks({"1.weight": before["1.weight"] > 0})
    g = torch.Generator().manual_seed(7)
    lottery.reinit_(model, masks, lambda m: nets.glorot_(m, g))
    assert torch.equal(model[1].weight != 0, masks["1.weight"])
    assert not torch.equal(model[4].weight, before["4.weight"])
    with pytest.raises(ArgumentError, match="shape"):
        lottery.reinit_(model, Masks({"1.weight": torch.ones(2) > 0}), nets.glorot_)


@settings(max_examples=40)
@given(st.integers(1, 300), st.floats(0.0, 1), st.integers(0, 5))
def test_shuffling_keeps_exact_counts(size: int, density: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    made = Masks(
        {n: torch.rand(s, generator=g) < density for n, s in {"a": (size,), "b": (2, size)}.items()}
    )
    again = shuffled(made, g)
    assert {n: int(m.sum()) for n, m in again.items()} == {n: int(m.sum()) for n, m in made.items()}
    assert again["b"].shape == (2, size)


def test_shuffling_moves_weights() -> None:
    g = torch.Generator().manual_seed(0)
    mask = Masks({"w": torch.arange(1000).view(10, 100) < 300})
    assert float((shuffled(mask, g)["w"] & mask["w"]).sum()) == pytest.approx(90, abs=30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zero_outside_makes_plus_zero_of_everything(dtype: torch.dtype) -> None:
    w = torch.tensor([[-1.0, float("nan")], [float("-inf"), -3.0]], dtype=dtype)
    mask = torch.tensor([[False, False], [False, True]])
    turned = w.clone().t()
    zero_outside_(mask, w)
    assert w.tolist() == [[0, 0], [0, -3]]
    assert torch.signbit(w).tolist() == [[False, False], [False, True]]
    zero_outside_(mask.t(), turned)  # not contiguous
    assert torch.equal(turned, w.t())


# The one small file


def nested(rounds: int) -> list[Masks]:
    scores = {"a": torch.rand(40, 30), "b": torch.rand(50)}
    made = [Masks({n: s >= 0 for n, s in scores.items()})]
    for r in range(rounds):
        made.append(Masks({n: s >= 1 - 0.8 ** (r + 1) for n, s in scores.items()}))
    return made


@pytest.mark.parametrize("rounds", [0, 1, 12, 300])
def test_the_file_gives_every_rounds_masks_back(tmp_path: Path, rounds: int) -> None:
    masks = nested(rounds)
    size = save_tickets(tmp_path / "t.gsm", Tickets(masks, [{"round": 0}], {"x": 1}))
    found = load_tickets(tmp_path / "t.gsm")
    assert size == (tmp_path / "t.gsm").stat().st_size
    assert len(found.masks) == len(masks)
    for a, b in zip(found.masks, masks, strict=True):
        assert set(a) == set(b)
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert (found.rows, found.settings) == ([{"round": 0}], {"x": 1})
    if rounds == 12:  # 1250 weights: under what 12 bitmaps take
        assert size < 12 * 1250 / 8 / 2


def test_the_file_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    a, b = Masks({"w": torch.tensor([True, True])}), Masks({"w": torch.tensor([True, False])})
    path = tmp_path / "t.gsm"
    for masks, match in [
        ([], "empty"),
        ([a, b, a], "round 2 is not within round 1"),
        ([b], "the first must keep all"),
        ([a, Masks({"x": a["w"]})], "other tensors"),
        ([a, Masks({"w": torch.ones(3) > 0})], "shape"),
    ]:
        with pytest.raises(ArgumentError, match=match):
            save_tickets(path, Tickets(masks))
    assert not path.exists()
    from gossamer.pack import pack

    pack({"w": torch.zeros(2)}, path).close()
    with pytest.raises(FormatError, match="no tickets file"):
        load_tickets(path)
    about = {"gossamer_tickets": 1, "rounds": 1, "rows": []}
    pack({"w": torch.tensor([0, 2], dtype=torch.uint8)}, path, metadata=about).close()
    with pytest.raises(FormatError, match="outside 0 to 1"):
        load_tickets(path)


# The search


def test_rounds_start_from_theta_and_end_masked(tmp_path: Path) -> None:
    theta = names.snapshot(small())
    seen: list[int] = []

    def watched(model: nn.Module, round: lottery.Round) -> dict[str, Any]:
        for name, tensor in names.tensors(model).items():
            mask = round.masks.get(name, torch.ones_like(tensor) != 0)
            assert torch.equal(tensor[mask], theta[name][mask])
            assert (tensor[~mask] == 0).all()
        seen.append(round.number)
        figures = lottery.trainer(DIGITS, CONFIG, evaluate_every_steps=5)(model, round)
        for name, mask in round.masks.items():
            assert (names.parameters(model)[name][~mask] == 0).all()
            assert (names.parameters(model)[name][mask] != theta[name][mask]).any()
        return figures

    told: list[tuple[int, int]] = []
    _, found = search(tmp_path, train=watched, progress=lambda a, b, row: told.append((a, b)))
    assert seen == [0, 1, 2, 3]
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    for r, masks in enumerate(found.masks):
        assert int(masks["1.weight"].sum()) == int(1280 * 0.6**r + 0.5)
        assert int(masks["4.weight"].sum()) == int(200 * 0.8**r + 0.5)
        assert found.rows[r]["density"] == masks.density
        assert {"early_stop", "early_accuracy", "accuracy"} <= set(found.rows[r])
    kept = load_tickets(tmp_path / "tickets.gsm")
    assert kept.rows == found.rows
    assert all(torch.equal(a["1.weight"], b["1.weight"]) for a, b in zip(
        kept.masks, found.masks, strict=True))  # fmt: skip


def test_early_stop_figures_are_those_of_the_weights_then(tmp_path: Path) -> None:
    # At the last evaluation of a short run on few steps the loss still falls: the early stop is
    # the run of exactly so many steps.
    model = small()
    run = lottery.trainer(DIGITS, CONFIG, evaluate_every_steps=5)
    figures = run(model, lottery.Round(0, Masks(), (), tmp_path / "a.pt"))
    again = small()
    losses: dict[int, float] = {}
    states: dict[int, dict[str, torch.Tensor]] = {}

    def keep(p: Progress) -> None:
        if p.row is not None and p.row["event"] == "step":
            losses[p.row["step"]] = p.row["validation_loss"]
            states[p.row["step"]] = names.snapshot(again)

    train(again, DIGITS, CONFIG, evaluate_every_steps=5, evaluate_every=2, progress=keep)
    best = min(losses, key=lambda s: losses[s])
    assert figures["early_stop"] == best
    assert all(torch.equal(t, names.tensors(again)[n]) for n, t in names.tensors(model).items())
    from gossamer.training import evaluate

    lottery.rewind_(again, Masks(), states[best])
    assert figures["early_accuracy"] == evaluate(again, DIGITS.test).accuracy
    assert figures["accuracy"] == evaluate(model, DIGITS.test).accuracy


def test_one_shot_keeps_the_counts_of_as_many_rounds(tmp_path: Path) -> None:
    _, iterative = search(tmp_path / "a")
    _, at_once = search(tmp_path / "b", one_shot=True)
    assert len(at_once.masks) == len(at_once.rows) == 2
    assert at_once.masks[1].densities() == iterative.masks[3].densities()
    assert not torch.equal(at_once.masks[1]["1.weight"], iterative.masks[3]["1.weight"])


def test_global_scope_has_one_budget(tmp_path: Path) -> None:
    _, found = search(tmp_path, scope="global", output=None)
    assert found.masks[2].kept == int(1480 * 0.6**2 + 0.5)
    assert len(set(found.masks[2].densities().values())) == 2
    with pytest.raises(ArgumentError, match="one rate"):
        search(tmp_path / "b", scope="global")


def test_late_rewinding_takes_the_weights_at_step_k_bit_for_bit(tmp_path: Path) -> None:
    # the dense run of 7 steps: two epochs' run stopped there by a method
    class Stop(Exception):
        pass

    class Until(Snapshot):
        def after_step(self) -> None:
            super().after_step()
            if self.taken:
                raise Stop

    short, until = small(), Until(7)
    with pytest.raises(Stop):
        train(short, DIGITS, CONFIG, methods=[until])
    starts: list[dict[str, torch.Tensor]] = []

    def noted(model: nn.Module, round: lottery.Round) -> dict[str, Any]:
        starts.append(names.snapshot(model))
        return lottery.trainer(DIGITS, CONFIG, evaluate_every_steps=5)(model, round)

    _, found = search(tmp_path, rewind_step=7, train=noted)
    theta = until.taken
    assert all(torch.equal(starts[0][n], t) for n, t in names.snapshot(small()).items())
    for start, masks in zip(starts[1:], found.masks[1:], strict=True):
        for name, tensor in theta.items():
            mask = masks.get(name, torch.ones_like(tensor) != 0)
            assert torch.equal(start[name][mask], tensor[mask])
            assert (start[name][~mask] == 0).all()
    with pytest.raises(GossamerError, match="never reached"):
        search(tmp_path / "b", rewind_step=10_000)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[nn.Module, Tickets]]:
    return search(tmp_path_factory.mktemp("whole"), rewind_step=3)


@pytest.mark.parametrize("kills", [(2, 30), (14, 15), (45, 80)])
def test_a_killed_search_resumes_at_its_round_and_step(
    tmp_path: Path, unbroken: tuple[nn.Module, Tickets], kills: tuple[int, int]
) -> None:
    # An exception in after_step leaves the disk as a kill at that step does; checkpoints are
    # written every step, so that the resumed run does not begin its round again.
    done = 0
    stepped: list[tuple[int, int]] = []

    class Killer(Snapshot):
        def __init__(self, number: int) -> None:
            super().__init__(None)
            self.number = number

        def after_step(self) -> None:
            nonlocal done
            super().after_step()
            done += 1
            stepped.append((self.number, self.steps))
            if done in kills:
                raise Killed

    def run(model: nn.Module, round: lottery.Round) -> dict[str, Any]:
        inner = lottery.trainer(DIGITS, CONFIG, evaluate_every_steps=5, checkpoint_every=0.0)
        more = lottery.Round(
            round.number, round.masks, (*round.methods, Killer(round.number)), round.checkpoint
        )
        return inner(model, more)

    for _ in kills:
        with pytest.raises(Killed):
            search(tmp_path, rewind_step=3, train=run)
    model, found = search(tmp_path, rewind_step=3, train=run)
    whole, expected = unbroken
    assert found.rows == expected.rows
    for a, b in zip(found.masks, expected.masks, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    for name, tensor in names.tensors(model).items():
        assert torch.equal(tensor, names.tensors(whole)[name])
    # every step once, but for the one that was killed before it was saved
    assert len(stepped) - len(set(stepped)) <= len(kills)


def test_a_finished_search_takes_more_rounds(tmp_path: Path) -> None:
    search(tmp_path / "a", rounds=1)
    _, longer = search(tmp_path / "a", rounds=3)
    _, whole = search(tmp_path / "b", rounds=3)
    assert longer.rows == whole.rows
    trained: list[int] = []

    def count(model: nn.Module, round: lottery.Round) -> dict[str, Any]:
        trained.append(round.number)
        return lottery.trainer(DIGITS, CONFIG, evaluate_every_steps=5)(model, round)

    model, again = search(tmp_path / "b", rounds=3, train=count)
    assert trained == [3]  # loads the last ticket
    assert again.rows == whole.rows
    assert torch.equal(model[1].weight != 0, whole.masks[3]["1.weight"])


def test_another_search_in_the_folder_is_refused(tmp_path: Path) -> None:
    search(tmp_path, rounds=1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for options in ({"rates": 0.3}, {"rewind_step": 1}, {"one_shot": True}):
        with pytest.raises(ArgumentError, match="holds another search"):
            search(tmp_path, **{"rounds": 1, **options})
    run = lottery.trainer(DIGITS, CONFIG, evaluate_every_steps=5)
    other = copy.deepcopy(small())
    nets.glorot_(other)
    with pytest.raises(ArgumentError, match="other initial weights"):
        lottery.search(other, run, rounds=1, rates=0.4, output="4", folder=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rates": 0.0}, r"outside \(0, 1\)"),
        ({"rates": {"9": 0.1}}, "matches nothing"),
        ({"rounds": 0}, "rounds=0"),
        ({"rewind_step": -1}, "rewind_step=-1"),
        ({"scope": "net"}, "'net' is not one of"),
        ({"include": "nothing"}, "matches nothing"),
    ],
)
def test_bad_searches_are_named_and_leave_nothing(
    tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    with warnings.catch_warnings(), pytest.raises(ArgumentError, match=match):
        search(tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_masked_snapshot_order_sees_masked_weights() -> None:
    model = small()
    masks = Masks({"1.weight": model[1].weight.detach() > 0})
    taken = Snapshot(2)
    train(model, DIGITS, CONFIG, methods=[Masked(masks), taken])
    assert (taken.taken["1.weight"][~masks["1.weight"]] == 0).all()
    assert taken.steps == 2 * -(-len(DIGITS.train) // 100)
    with pytest.raises(ArgumentError, match="at=0"):
        Snapshot(0).attach(model)
