"""The door of a run: what does not fit is refused by name, before any work."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gossamer
from gossamer import Dataset, Split, datasets
from gossamer.cli import main
from gossamer.compression import door, inputs
from gossamer.core.errors import ArgumentError, DatasetError
from gossamer.training import TrainConfig, evaluate, train
from gossamer.training.tasks import Classification

X, Y = torch.rand(12, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def split(x: Any = X, y: Any = Y, **options: Any) -> Split:
    return Split(x, y, **options)


def data(classes: Any = 3, **splits: Any) -> Dataset:
    parts = {"train": split(), "validation": split(), "test": split(), **splits}
    return Dataset("d", **parts, classes=classes)


def everywhere(x: Any = X, y: Any = Y, classes: int = 3, **options: Any) -> Dataset:
    parts = dict.fromkeys(("train", "validation", "test"), split(x, y, **options))
    return data(classes, **parts)


def net(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, outputs))


def with_nan() -> torch.Tensor:
    bad = X.clone()
    bad[7, 0, 1, 1] = float("nan")
    return bad


UNSOUND = {
    "NaN": (data(test=split(with_nan())), r"test: inputs hold NaN or infinity.*example 7"),
    "infinity": (data(train=split(X / 0)), r"train: inputs hold NaN or infinity.*example 0"),
    "float64": (everywhere(X.double()), r"float64; use float32 \(\.float\(\)\)"),
    "lengths": (data(test=split(X, Y[:11])), r"test: 12 inputs but 11 targets"),
    "beyond the classes": (everywhere(y=Y + 5), r"targets reach from 5 to 7, but classes=3"),
    "below zero": (everywhere(y=Y - 1), r"from -1 to 1"),
    "float labels": (everywhere(y=Y.float()), r"do not fit targets \(2,\) float32.*\(\.long\(\)\)"),
    "int32 labels": (everywhere(y=Y.int()), r"targets are torch.int32; use torch.int64"),
    "lists": (everywhere(X.tolist(), Y.tolist()), r"inputs is of type list; .*torch\.tensor"),
    "arrays": (everywhere(X.numpy()), r"inputs is of type ndarray; .*torch\.from_numpy"),
    "sparse": (everywhere(X.flatten(1).to_sparse()), r"sparse_coo; .*to_dense"),
    "scalar": (everywhere(torch.tensor(1.0)), r"inputs is a scalar"),
    "no test": (data(test=split(X[:0], Y[:0])), r"has no test examples"),
    "no validation": (data(validation=split(X[:0], Y[:0])), r"has no validation examples"),
    "no training": (data(train=split(X[:0], Y[:0])), r"has no train examples"),
    "a loader": (data(train=DataLoader(TensorDataset(X, Y))), r"train is of type DataLoader"),
    "a tensor": (data(test=X), r"test is of type Tensor; give gossamer\.Split"),
    "a pair": (data(test=(X, Y)), r"test is of type tuple"),
    "shapes": (data(test=split(X.flatten(1))), r"shape \(4,\), those of train have \(1, 2, 2\)"),
    "classes": (data(classes=2.5), r"classes=2\.5"),
    "no classes": (data(classes=0), r"classes=0"),
    "pixels": (everywhere((255 * X).byte()), r"uint8; .*mean and std"),
    "flat pixels": (
        everywhere((255 * X).byte().flatten(1), mean=[0.5], std=[1.0]), r"images \(N, C, H, W\)"
    ),
    "channels": (
        everywhere((255 * X).byte(), mean=[0.5, 0.5], std=[1.0, 1.0]), r"2 means .* 1 channels"
    ),
    "deviation": (everywhere((255 * X).byte(), mean=[0.5], std=[0.0]), r"deviations above 0"),
    "tokens": (everywhere(torch.full((12, 4), -1), Y), r"token ids, and one is -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_data_are_refused_before_any_work(case: str, tmp_path: Path) -> None:
    unsound, message = UNSOUND[case]
    with pytest.raises((DatasetError, ArgumentError), match=message):
        gossamer.compress(net(), unsound, recipe="lossless", out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("case", ["NaN", "lengths", "lists", "a loader", "classes"])
def test_training_refuses_them_too(case: str) -> None:
    unsound, message = UNSOUND[case]
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(DatasetError, match=message):
        train(model, unsound, TrainConfig(epochs=1))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_token_ids_stay_within_the_vocabulary() -> None:
    tokens = Split(torch.arange(12).reshape(3, 4), torch.arange(12).reshape(3, 4))
    text = Dataset("t", tokens, tokens, tokens, 12, vocabulary=tuple("abcdefghijk"))
    with pytest.raises(DatasetError, match="token id 11 is beyond the vocabulary of 11 words"):
        datasets.check(text)


def test_training_needs_labels_or_a_network_to_learn_from() -> None:
    with pytest.raises(DatasetError, match="nothing to train on; give targets"):
        train(net(), everywhere(y=None), TrainConfig(epochs=1))


@pytest.mark.parametrize("given", [[1], 3, ["text"], {"a": 1}])
def test_what_is_no_dataset_is_refused(given: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"; (give|name) "):
        gossamer.compress(net(), given, recipe="lossless", out=tmp_path / "r")
    with pytest.raises(ArgumentError, match=r"model is of type OrderedDict.*nn\.Module"):
        gossamer.compress(net().state_dict(), data(), recipe="lossless", out=tmp_path / "r")


class Several(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x.flatten(1), x


MISFITS = {
    "inputs": (nn.Sequential(nn.Flatten(), nn.Linear(5, 3)), r"cannot take .*\(1, 2, 2\) each"),
    "half": (net().half(), r"its weights are torch\.float16, so give network\.float\(\)"),
    "double": (net().double(), r"weights are torch\.float64"),
    "head": (net(2), r"2 outputs, but the targets of dataset 'd' reach 2; give it 3 outputs"),
    "outputs": (Several(), r"no one tensor of logits; .*read="),
    "columns": (nn.Linear(2, 3), r"shape \(2, 1, 2, 3\) do not fit targets of shape \(2,\)"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_network_that_does_not_fit_is_refused_before_any_work(case: str, tmp_path: Path) -> None:
    model, message = MISFITS[case]
    with pytest.raises(ArgumentError, match=message):
        gossamer.compress(model, data(), recipe="lossless", out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_the_trial_leaves_no_trace() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), net()).train()
    model[0].eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    door.check_fit(model, data(), Classification())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [False, True, True]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_the_largest_token_is_tried() -> None:
    ids = torch.zeros(6, 4, dtype=torch.int64)
    high = ids.clone()
    high[4, 1] = 9
    parts = [Split(high, ids), Split(ids, ids), Split(ids, ids)]
    text = Dataset("t", *parts, classes=10)
    door.check_fit(nn.Embedding(10, 10), text, Classification())
    with pytest.raises(ArgumentError, match=r"cannot take .* index out of range"):
        door.check_fit(nn.Embedding(9, 10), text, Classification())


def test_columns_of_targets_are_not_counted_against_each_other() -> None:
    with pytest.raises(ArgumentError, match=r"outputs of shape \(12, 3\).*\(12, 1\)"):
        evaluate(net(), split(y=Y[:, None]))
    with pytest.raises(DatasetError, match="split is of type Dataset"):
        evaluate(net(), data())


def test_nothing_of_the_data_is_copied_to_look_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = torch.isfinite

    def counted(values: torch.Tensor) -> torch.Tensor:
        seen.append(values.numel())
        return real(values)

    monkeypatch.setattr(torch, "isfinite", counted)
    x = torch.zeros(5000, 1024)
    datasets.check(everywhere(x, torch.zeros(5000, dtype=torch.int64)))
    assert sum(seen) == 3 * x.numel()
    assert max(seen) <= 1 << 20


USERS = """
import torch
from gossamer import Dataset, Split

def gpu():
    raise RuntimeError("Found no NVIDIA driver on your system. Please check")

def broken():
    return {}["weights"]

def nolabels():
    x = torch.randn(9, 1, 8, 8)
    return Dataset("d", *[Split(x, None)] * 3, classes=10)

def narrow():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(63, 10))

def state():
    return torch.nn.Linear(2, 2).state_dict()
"""


@pytest.fixture(scope="session")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the functions above, of one path: a module's name is taken once a process."""
    folder = tmp_path_factory.mktemp("door")
    (folder / "door_users.py").write_text(USERS)
    return folder


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["-m", "door_users.py:gpu", "-d", "digits"], "no usable GPU here"),
        (
            ["-m", "door_users.py:broken", "-d", "digits"],
            "door_users.py, line 9: KeyError: 'weights'",
        ),
        (
            ["-m", "mlp", "-d", "door_users.py:broken", "--set", "pretrained=true"],
            "line 9: KeyError",
        ),
        (["-m", "door_users.py:state", "-d", "digits"], "returned OrderedDict, not an nn.Module"),
        (["-m", "door_users.py:state", "-d", "door_users.py:nolabels"], "returned OrderedDict"),
        (["-m", "door_users.py:state", "-d", "door_users.py:state"], "cannot be parted into train"),
    ],
)
def test_mistakes_are_one_sentence_without_a_traceback(
    options: list[str],
    told: str,
    users: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(users)
    with pytest.raises(SystemExit) as end:
        main(["compress", *options, "-r", "lossless", "--out", "r"])
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1
    assert not Path("r").exists()


def test_a_full_disk_is_one_sentence_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(inputs, "read_state", full)
    with pytest.raises(SystemExit) as end:
        main(["pack", str(tmp_path / "w.pt"), str(tmp_path / "w.gsm")])
    assert end.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("error: the disk is full (")
    assert "free some space and give the same command again" in told


@pytest.mark.parametrize("command", ["evaluate", "sensitivity", "train"])
def test_every_command_tries_the_network_first(
    command: str,
    users: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(users)
    more = ["--out", str(tmp_path / "w.safetensors")] if command == "train" else []
    with pytest.raises(SystemExit) as end:
        main([command, "-m", "door_users.py:narrow", "-d", "digits", *more])
    assert end.value.code == 1
    assert "cannot take the inputs of dataset 'digits', (1, 8, 8) each" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
