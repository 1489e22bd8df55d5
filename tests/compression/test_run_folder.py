"""The run directory: one process at a time, recoverable at every step, of one data set."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer import datasets
from gossamer.compression import folder
from gossamer.core.errors import ArgumentError
from gossamer.datasets import Dataset, Split, contents

OLD, NEW = {"recipe": "old"}, {"recipe": "new"}

HOLD = """
import sys, threading
from pathlib import Path
from gossamer.compression import folder
with folder.held(Path(sys.argv[1])):
    print("held", flush=True)
    threading.Event().wait()
"""


class Kill(BaseException):
    """What a process that is killed does not outlive."""


def test_two_in_one_directory_are_refused_and_a_dead_owner_is_not(tmp_path: Path) -> None:
    out = tmp_path / "run"
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(ArgumentError, match=f"in use by process {owner.pid}"), folder.held(out):
            pass
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
    assert (out / folder.LOCK).exists()  # what the dead one left
    with folder.held(out):
        with pytest.raises(ArgumentError, match=f"process {os.getpid()}"), folder.held(out):
            pass
        folder.begin(out, OLD, False)
    assert not (out / folder.LOCK).exists()
    with folder.held(out):
        assert folder.look(out, OLD, False)


def test_a_directory_that_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with pytest.raises(Kill), folder.held(tmp_path / "a" / "b"):
        raise Kill
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "mine").mkdir()
    with folder.held(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").exists()


def test_a_lock_is_no_link_to_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / folder.LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"), folder.held(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def older(out: Path) -> None:
    """A run that is half done."""
    folder.begin(out, OLD, False)
    for name in ("recipe.yaml", "stage-0.pt", "stage-1.pt", "2-prune-1.train.pt", "model.gsm"):
        (out / name).write_text("old")
    (out / "metrics" / "1-train.jsonl").write_text("old")
    (out / "3-tickets.search").mkdir()
    (out / "3-tickets.search" / "round.pt").write_text("old")


def steps(monkeypatch: pytest.MonkeyPatch, stop: int) -> list[str]:
    """Every change of the directory is a step; the process dies before step number ``stop``."""
    done: list[str] = []

    def counted(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any, **options: Any) -> Any:
            if len(done) == stop:
                raise Kill
            done.append(what)
            return real(*given, **options)

        return step

    monkeypatch.setattr(folder, "write_text", counted("write", folder.write_text))
    monkeypatch.setattr(folder.shutil, "rmtree", counted("folder", shutil.rmtree))
    monkeypatch.setattr(Path, "unlink", counted("file", Path.unlink))
    monkeypatch.setattr(Path, "mkdir", counted("mkdir", Path.mkdir))
    return done


@pytest.mark.parametrize("again", [True, False], ids=["restarted", "gone on with"])
def test_a_restart_killed_at_any_step_is_recovered(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, ended = 0, False
    while not ended:
        out = tmp_path / f"{stop}"
        older(out)
        with monkeypatch.context() as patched:
            steps(patched, stop)
            try:
                folder.begin(out, NEW, True)
                ended = True
            except Kill:
                pass
        marker = json.loads((out / folder.KEY).read_text())
        if not again and marker == OLD:
            # Nothing was thrown away yet: the older run is whole.
            assert folder.look(out, OLD, False)
            assert (out / "stage-1.pt").read_text() == "old"
            with pytest.raises(ArgumentError, match="recipe was"):
                folder.begin(out, NEW, False)
        else:
            folder.begin(out, NEW, again)
            assert {p.name for p in out.iterdir()} == {folder.KEY, "metrics"}
            assert not any((out / "metrics").iterdir())
            assert json.loads((out / folder.KEY).read_text()) == NEW
        stop += 1
    assert stop > 8  # marker, each file and folder, marker, metrics


def test_a_run_without_its_marker_is_cleared_only_when_told_to(tmp_path: Path) -> None:
    older(tmp_path)
    (tmp_path / folder.KEY).unlink()
    with pytest.raises(ArgumentError, match="looks like a run without its marker: --restart"):
        folder.begin(tmp_path, NEW, False)
    folder.begin(tmp_path, NEW, True)
    assert {p.name for p in tmp_path.iterdir()} == {folder.KEY, "metrics"}
    # one file that is no run's, or none that only a run writes: left alone
    for name in ("thesis.tex", "model.gsm"):
        other = tmp_path / name.replace(".", "-")
        other.mkdir()
        (other / name).write_text("years of work")
        if name == "thesis.tex":
            (other / "stage-1.pt").write_text("old")
        with pytest.raises(ArgumentError, match="holds no run"):
            folder.begin(other, NEW, True)
        assert (other / name).read_text() == "years of work"


def test_what_a_kill_left_half_written_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / (folder.KEY + ".tmp")).write_text("{")
    folder.begin(tmp_path, NEW, False)
    assert not (tmp_path / (folder.KEY + ".tmp")).exists()
    (tmp_path / folder.KEY).write_text("{")
    with pytest.raises(ArgumentError, match=r"damaged.*--restart"):
        folder.begin(tmp_path, NEW, False)
    folder.begin(tmp_path, NEW, True)
    assert folder.look(tmp_path, NEW, False)


def test_the_key_covers_every_byte_of_the_data() -> None:
    data = datasets.load("digits")
    key = contents.identity(data)
    assert key == contents.identity(copy.deepcopy(data))
    assert json.loads(json.dumps(key))["name"] == "digits"
    flipped = copy.deepcopy(data)
    flipped.train.stored[-1, ..., -1] += 1
    told = folder._difference(key, contents.identity(flipped))
    assert told.startswith("train.inputs was ")
    relabelled = copy.deepcopy(data)
    relabelled.test.targets[-1] = (relabelled.test.targets[-1] + 1) % 10
    assert folder._difference(key, contents.identity(relabelled)).startswith("test.targets was ")


def test_normalisation_and_type_are_of_the_key() -> None:
    pixels = torch.arange(2 * 3 * 4, dtype=torch.uint8).reshape(2, 3, 2, 2)

    def made(mean: float, order: slice = slice(None)) -> dict[str, Any]:
        split = Split(pixels, torch.tensor([0, 1]), mean=[mean] * 3, std=[0.5] * 3)
        return contents.identity(Dataset("d", split, split, split, 2))

    assert folder._difference(made(0.5), made(0.25)).startswith("train.mean")
    same = pixels.float()
    a, b = Split(same, torch.tensor([0, 1])), Split(same.reshape(2, 12), torch.tensor([0, 1]))
    assert contents.digest(a.stored) != contents.digest(b.stored)  # shape
    assert contents.digest(same) != contents.digest(same.int())  # type
    assert contents.digest(same.half()) != contents.digest(same)
    # in pieces as at once
    assert contents.digest(same.bfloat16()) == contents.digest(same.bfloat16().clone())


def test_a_training_is_not_resumed_with_other_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), datasets.load("digits")
    config = gossamer.TrainConfig(epochs=1, lr=0.1)
    gossamer.train(net, data, config, checkpoint=tmp_path / "c.pt")
    gossamer.train(net, data, config, checkpoint=tmp_path / "c.pt")
    other = copy.deepcopy(data)
    other.train.stored.copy_(data.train.stored.flip(-1))
    with pytest.raises(ArgumentError, match=r"of another run: dataset\.contents was"):
        gossamer.train(net, other, config, checkpoint=tmp_path / "c.pt")


def test_a_folder_is_not_resumed_with_other_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), datasets.load("digits")
    recipe = {
        "name": "x",
        "stages": [{"prune": {"density": 1.0}}, {"evaluate": {"latency": False}}],
    }
    gossamer.compress(net, data, recipe=recipe, out=tmp_path / "r")
    other = copy.deepcopy(data)
    other.train.stored.copy_(data.train.stored.flip(-1))
    with pytest.raises(ArgumentError, match=r"dataset\.train\.inputs was .*--restart"):
        gossamer.compress(net, other, recipe=recipe, out=tmp_path / "r")
