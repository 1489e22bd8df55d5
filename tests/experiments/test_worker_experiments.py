"""Worker experiments: their pieces by hand, N processes against one, quick runs."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from gossamer import datasets, experiments, nets
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.datasets import Dataset, Split
from gossamer.distribute import TernGrad
from gossamer.distribute.exchange.average import exchange
from gossamer.experiments.loss_aware import laq_gradients, laq_workers
from gossamer.experiments.shared.panels import draw
from gossamer.experiments.terngrad import terngrad


def _data() -> Dataset:
    return datasets.load("digits")


def _sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


SETUP = terngrad.Setup("mlp", 32, 12, _sgd, 0.5, None)


def _process(rank: int, workers: int, folder: str) -> None:
    """One rank of the same training, written plainly."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", workers)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=workers, timeout=timedelta(seconds=600)
    )
    data, model = _data(), nets.build(SETUP.net, seed=3, in_shape=(1, 8, 8))
    optimizer = _sgd(model)
    for step in range(SETUP.steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / SETUP.steps) ** 0.5
        index = terngrad.parts(3, step, len(data.train), SETUP.batch, workers)[rank]
        optimizer.zero_grad()
        inputs, targets = data.train.batch(index)
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        exchange(model, TernGrad(), step=step, seed=3, **terngrad.EXCHANGE)
        optimizer.step()
    torch.save(names.snapshot(model), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_thread")
def test_two_processes_train_to_the_same_bits(tmp_path: Path) -> None:
    spawn(_process, (2, str(tmp_path)), nprocs=2)
    model, losses = terngrad.train_workers(SETUP, 2, 3, _data(), None)
    assert len(losses) == 1
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, value in names.snapshot(model).items():
            assert torch.equal(value, found[name]), (rank, name)


def test_a_killed_training_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = terngrad.Setup("mlp", 16, 502, _sgd, 0.5, None)
    whole, losses = terngrad.train_workers(setup, 2, 0, _data(), None)
    path, seen = tmp_path / "run.pt", 0
    real = terngrad.gradients

    def dies(*given: object) -> object:
        nonlocal seen
        seen += 1
        if seen > 2 * 501:
            raise KeyboardInterrupt
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(terngrad, "gradients", dies)
    with pytest.raises(KeyboardInterrupt):
        terngrad.train_workers(setup, 2, 0, _data(), path)
    monkeypatch.setattr(terngrad, "gradients", real)
    again, same = terngrad.train_workers(setup, 2, 0, _data(), path)
    assert same == losses
    for name, value in names.snapshot(whole).items():
        assert torch.equal(value, names.snapshot(again)[name])


def test_parts_cover_each_pass_once() -> None:
    seen = torch.cat([i for t in range(5) for i in terngrad.parts(0, t, 103, 20, 4)])
    assert seen.numel() == 100
    assert seen.unique().numel() == 100
    again = torch.cat(terngrad.parts(0, 5, 103, 20, 4))
    assert not torch.equal(again, seen[:20])
    # the same examples, however many share them
    assert torch.equal(again, torch.cat(terngrad.parts(0, 5, 103, 20, 1)))


def test_crops_are_windows_of_the_image() -> None:
    image = torch.arange(36.0).view(1, 1, 6, 6).repeat(40, 1, 1, 1)
    out = terngrad._cropped(image, 4, torch.Generator().manual_seed(0))
    assert out.shape == (40, 1, 4, 4)
    windows = image[:1].unfold(2, 4, 1).unfold(3, 4, 1).reshape(9, 4, 4)
    both = torch.cat([windows, windows.flip(2)])
    found = [(o == both).all(-1).all(-1).nonzero() for o in out[:, 0]]
    assert all(len(f) for f in found)
    assert len({int(f[0]) for f in found}) > 6
    middle = terngrad._central(Split(image, torch.zeros(40).long()), 4)
    assert torch.equal(middle.stored[0, 0], image[0, 0, 1:5, 1:5])


def test_best_loss_is_brute_force() -> None:
    target = torch.rand(9, generator=torch.Generator().manual_seed(0)) - 0.5
    alphas = torch.linspace(0, 0.5, 5001, dtype=torch.float64)
    off = target.sign().double() * alphas[:, None] - target.double()
    least = float(off.square().sum(1).min()) / 12 + 0.04
    assert laq_gradients.best_loss(target) == pytest.approx(least, rel=1e-5)


def test_a_descent_is_the_same_again_and_reaches_its_threshold() -> None:
    first, second = (laq_gradients.run(32, "SQ2", 1, 60) for _ in range(2))
    assert first == second
    assert 1 < first["iterations"] < 60
    assert first["best"] < first["final"]
    assert laq_gradients.run(32, "SQ2", 1, 2)["iterations"] == math.inf


def test_cells_count_their_bits() -> None:
    data = _data()
    wide = Split(torch.nn.functional.pad(data.train.inputs, (10,) * 4), data.train.targets)
    mnist_like = Dataset("digits", wide, wide, wide, 10)
    row = laq_workers.train_cell(("LAQ3", "SQ3, c=3", 2, 4), 0.003, 0, mnist_like, 8)
    # planes of 78,400 and 1,000 weights end on 64: sixteenths of a percent more
    assert row["bits_a_gradient"] == pytest.approx(3, rel=1e-3)
    assert 0 < row["final_loss"] < 5


def test_draw(tmp_path: Path) -> None:
    path = draw({"a": {"b": {2: [1.0, 2.0], 4: [3.0]}}}, tmp_path / "x.svg", xlabel="", ylabel="")
    assert path.stat().st_size > 1000
    with pytest.raises(ArgumentError, match="panels is empty"):
        draw({"a": {}}, tmp_path / "y.svg", xlabel="", ylabel="")


def _quick(name: str, folder: Path, seeds: int = 1) -> list[dict[str, object]]:
    path = experiments.run(
        name, out=folder, work=folder / "w", seeds=seeds, quick=True, workers=1, say=lambda _: None
    )
    claims: list[dict[str, object]] = json.loads(path.read_text())["claims"]
    return claims


def test_linear_dimension_quickly(tmp_path: Path) -> None:
    claims = _quick("laq-linear-dimension", tmp_path)
    assert {c["id"] for c in claims} == {"loss-aware.5"}
    slower = next(c for c in claims if "SQ2 over FP" in str(c["what"]))
    assert slower["holds"]


@pytest.mark.parametrize(
    "name", ["laq-gradient-bits", "laq-workers", "terngrad-lenet-workers", "terngrad-cifarnet"]
)
@pytest.mark.slow
def test_the_others_quickly(name: str, tmp_path: Path) -> None:
    assert all("what" in c for c in _quick(name, tmp_path))


def test_processes_quickly(tmp_path: Path) -> None:
    claims = _quick("laq-processes", tmp_path)
    assert {c["id"] for c in claims} == {"loss-aware.6"}
    assert all(c["holds"] for c in claims)
