"""Training in several processes: shares of a batch, and torchrun's restart to the same bits.

The file is what torchrun starts, too: two processes train unbroken, then again until one is
killed, and after the restart go on with what was saved.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gossamer.core.errors import ArgumentError
from gossamer.datasets import Dataset, Split
from gossamer.distribute import Processes, by_name
from gossamer.training import TrainConfig, train
from gossamer.training.workers import share
from launched import TWO, run

CONFIG = TrainConfig(epochs=2, batch_size=24, lr=0.05, optimizer="adam")
KILL_AT = 7  # of 12 steps


def jitter(x, generator):
    return x + 0.05 * torch.randn(x.shape, generator=generator)


def data(augment=jitter):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 3
    x = torch.randn(200, 20, generator=g) + 2 * F.one_hot(y, 20)
    splits = [Split(x[a:b], y[a:b]) for a, b in ((0, 131), (131, 170), (170, 200))]
    return Dataset("blobs", *splits, 3, augment=augment)


def net(dropout=0.3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(dropout), nn.Linear(40, 3)
    )


def plain_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 3))


def killed_in_loss(active):
    step = 0

    def loss(outputs, targets):
        nonlocal step
        step += 1
        if active and step > KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(outputs, targets)

    return loss


def work(folder):
    torch.set_num_threads(1)
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with Processes.launched(None, timeout=600) as plain:
        model = plain_net()
        train(model, data(None), CONFIG, workers=plain)
        if plain.rank == 0:
            torch.save(model.state_dict(), folder / "float.pt")
        for name, dies in (("unbroken", False), ("killed", life == 0)):
            workers = Processes(by_name("sq4"), threshold=100, seed=3, timeout=600)
            model = net()
            history = train(
                model,
                data(),
                CONFIG,
                workers=workers,
                loss=killed_in_loss(dies and workers.rank == 1),
                checkpoint=folder / f"{name}.checkpoint.pt",
                checkpoint_every=0.0,
                metrics=folder / f"{name}.jsonl",
            )
            workers.close()
            torch.save(model.state_dict(), folder / f"{name}-{workers.rank}.pt")
            if workers.rank == 0:
                (folder / f"{name}.json").write_text(json.dumps([life, history.epochs]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    run(*TWO, "--max-restarts=1", __file__, folder)
    return folder


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_restarted_by_torchrun_to_the_same_bits(folder):
    states = {
        f"{name}-{rank}": torch.load(folder / f"{name}-{rank}.pt")
        for name in ("unbroken", "killed")
        for rank in (0, 1)
    }
    first = states.pop("unbroken-0")
    assert all(same(first, state) for state in states.values())
    life, rows = json.loads((folder / "killed.json").read_text())
    assert life == 1
    _, expected = json.loads((folder / "unbroken.json").read_text())
    for row in (*rows, *expected):
        del row["seconds"]
    assert rows == expected
    assert len((folder / "killed.jsonl").read_text().splitlines()) == CONFIG.epochs


def test_float_gradients_train_as_one_process_does(folder, one_thread):
    model = plain_net()
    train(model, data(None), CONFIG)
    found = torch.load(folder / "float.pt")
    for name, tensor in model.state_dict().items():
        assert torch.allclose(found[name], tensor, atol=1e-4), name


@pytest.mark.parametrize("count", [1, 2, 5, 24])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_average_to_the_batch(count, size):
    x, y = torch.randn(count, 20), torch.randint(3, (count,))
    model = plain_net()
    F.cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for rank in range(size):
        mine, targets, weight = share(x, y, rank, size)
        (F.cross_entropy(model(mine), targets) * weight / size).backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-6)


class Alone:
    """Workers without any others."""

    def __init__(self, size, rank=0):
        self.rank, self.size, self.about = rank, size, "nothing"

    def wrap(self, model):
        return model

    def settle(self, model):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_another_number_of_processes_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    train(net(), data(), CONFIG, workers=Alone(2), checkpoint=path)
    with pytest.raises(ArgumentError, match=r"workers.size was 2, now it is 3.*start 2 processes"):
        train(net(), data(), CONFIG, workers=Alone(3), checkpoint=path)
    with pytest.raises(ArgumentError, match=r"workers\.size was 2, now it is None"):
        train(net(), data(), CONFIG, checkpoint=path)
    train(net(), data(), CONFIG, workers=Alone(2), checkpoint=path)


def test_only_the_first_process_writes(tmp_path):
    told = []
    train(
        net(),
        data(),
        CONFIG,
        workers=Alone(2, rank=1),
        checkpoint=tmp_path / "c.pt",
        metrics=tmp_path / "m.jsonl",
        progress=told.append,
    )
    assert not list(tmp_path.iterdir())
    assert not told


def test_launched_names_what_is_missing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ArgumentError, match="RANK, MASTER_ADDR, MASTER_PORT not; start with"),
        Processes.launched(None),
    ):
        pass


def test_command_line_refuses_processes_without_an_exchange(monkeypatch, tmp_path, capsys):
    from gossamer.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = [
        "train",
        "-m",
        "lenet-300-100",
        "-d",
        "digits",
        "--out",
        str(tmp_path / "x.safetensors"),
    ]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "add --exchange terngrad" in capsys.readouterr().err


if __name__ == "__main__":
    work(Path(sys.argv[1]))
