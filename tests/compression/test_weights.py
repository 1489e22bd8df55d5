"""Weight files as people have them: the tensors are found, or it is said what is there."""

from __future__ import annotations

import gzip
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gossamer import datasets
from gossamer.cli import main
from gossamer.compression import inputs
from gossamer.compression.weights import fitted
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.pack import pack


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


STATE = net().state_dict()
OTHER = net(1).state_dict()
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}

FOUND = {
    "plain": STATE,
    "an epoch beside": {"model_state_dict": STATE, "epoch": 3},
    "an optimizer beside": {"model": STATE, "optimizer": OPTIMIZER, "epoch": 3},
    "state_dict": {"state_dict": STATE, "best_acc1": torch.tensor(0.9), "arch": "resnet"},
    "one within another": {"model": {"state_dict": STATE, "config": {"depth": 1}}},
    "a name of one's own": {"generator": STATE, "step": 7},
    "an average beside": {"model": STATE, "ema": OTHER},
    "DataParallel": prefixed(STATE, "module."),
    "compiled": prefixed(STATE, "_orig_mod."),
    "compiled and wrapped": {"model": prefixed(STATE, "module._orig_mod.")},
    "Lightning": {
        "state_dict": prefixed(STATE, "model."),
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.4.0",
        "optimizer_states": [OPTIMIZER],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.1},
    },
    "Lightning with a loss": {
        "state_dict": {**prefixed(STATE, "net."), "criterion.weight": torch.ones(10)}
    },
}


@pytest.mark.parametrize("case", FOUND)
def test_the_tensors_are_found(case: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(FOUND[case], path)
    model = inputs.load_weights(net(2), path)
    assert all(torch.equal(STATE[n], t) for n, t in model.state_dict().items())


def test_the_old_format_and_safetensors_under_any_name(tmp_path: Path) -> None:
    torch.save({"model": STATE}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    save_file(dict(STATE), tmp_path / "new.pt")
    for name in ("old.bin", "new.pt"):
        model = inputs.load_weights(net(2), tmp_path / name)
        assert all(torch.equal(STATE[n], t) for n, t in model.state_dict().items())


def test_a_key_chooses(tmp_path: Path) -> None:
    path = tmp_path / "gan.pt"
    torch.save({"generator": STATE, "critic": OTHER, "a.b": {"c": OTHER}, "epoch": 1}, path)
    with pytest.raises(ArgumentError, match=r"several .*: generator, critic; .*--key generator"):
        inputs.read_state(path)
    assert torch.equal(inputs.read_state(path, "critic")["1.bias"], OTHER["1.bias"])
    assert torch.equal(inputs.read_state(path, "a.b.c")["1.bias"], OTHER["1.bias"])
    with pytest.raises(ArgumentError, match=r"no key 'critics'; there is 'generator' is of type"):
        inputs.read_state(path, "critics")
    with pytest.raises(ArgumentError, match=r"'epoch' is of type int, no mapping"):
        inputs.read_state(path, "epoch")
    torch.save({"model": STATE, "state_dict": OTHER}, tmp_path / "two.pt")
    with pytest.raises(ArgumentError, match=r"several .*: model, state_dict"):
        inputs.read_state(tmp_path / "two.pt")
    torch.save({"epoch": 3, "history": [1, 2]}, tmp_path / "none.pt")
    with pytest.raises(ArgumentError, match=r"'epoch' is of type int, 'history' .* list; .*--key"):
        inputs.read_state(tmp_path / "none.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ArgumentError, match="holds list, not a mapping of tensors"):
        inputs.read_state(tmp_path / "list.pt")


def test_prefixes_are_taken_off_only_where_a_wrapper_put_them() -> None:
    a = torch.zeros(1)
    own = ["module.weight", "weight"]
    assert set(fitted({"module.weight": a, "weight": a}, own)) == set(own)
    assert list(fitted({"module.module.weight": a}, ["module.weight"])) == ["module.weight"]
    # part of a file is the network only if it is all of it
    mixed = {"model.a": a, "loss.b": a}
    assert fitted(mixed, ["a", "c"]) == mixed
    assert fitted({"encoder.a": a}, ["a"]) == {"encoder.a": a}


def test_names_that_do_not_fit_are_told(tmp_path: Path) -> None:
    torch.save(prefixed(STATE, "encoder."), tmp_path / "w.pt")
    with pytest.raises(ArgumentError, match=r"missing '1\.weight'.*unknown 'encoder"):
        inputs.load_weights(net(), tmp_path / "w.pt")


class Scripted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good files of other kinds, and of broken ones."""
    folder = tmp_path_factory.mktemp("foreign")
    constants = {"archive/data.pkl": b"", "archive/constants.pkl": b"", "archive/code/m.py": b""}
    zips: dict[str, dict[str, bytes]] = {
        "script.pt": constants,
        "program.pt2": {"archive_format": b"pt2", "models/model.json": b"{}"},
        "data.zip": {"cat.jpg": b"", "dog.jpg": b""},
    }
    for name, members in zips.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
    np.savez(folder / "arrays.npz", a=np.zeros(2))
    np.save(folder / "array.npy", np.zeros(2))
    torch.save(net(), folder / "module.pt")
    (folder / "module.pkl").write_bytes(pickle.dumps(Path("x")))
    (folder / "net.onnx").write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.4.0:\x10")
    (folder / "page.pt").write_bytes(b"\n<!DOCTYPE html><html>404</html>")
    (folder / "pointer.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid ...")
    (folder / "keras.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(20))
    (folder / "llama.gguf").write_bytes(b"GGUF" + bytes(20))
    (folder / "w.pt.gz").write_bytes(gzip.compress(b"x", mtime=0))
    (folder / "w.json").write_text(json.dumps({"a": [1.0]}))
    (folder / "words.txt").write_text("hello there")
    (folder / "none.pt").write_bytes(b"")
    pack(net(), folder / "packed.pt").close()
    torch.save(STATE, folder / "good.pt")
    whole = (folder / "good.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save(STATE, folder / "old.pt", _use_new_zipfile_serialization=False)
    whole = (folder / "old.pt").read_bytes()
    (folder / "cut-old.pt").write_bytes(whole[: len(whole) // 2])
    save_file(dict(STATE), folder / "good.safetensors")
    whole = (folder / "good.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    return folder


KINDS: dict[str, tuple[Any, str]] = {
    "script.pt": (ArgumentError, r"TorchScript archive.*torch\.jit\.load"),
    "program.pt2": (ArgumentError, r"exported program.*torch\.export\.load"),
    "data.zip": (ArgumentError, r"zip archive of something else \(cat\.jpg, dog\.jpg\)"),
    "arrays.npz": (ArgumentError, r"numpy archive"),
    "array.npy": (ArgumentError, r"numpy array"),
    "module.pt": (ArgumentError, r"holds Python objects \(torch\.nn.*would run code.*state_dict"),
    "module.pkl": (ArgumentError, r"holds Python objects"),
    "net.onnx": (ArgumentError, r"ONNX model; give the PyTorch weights"),
    "page.pt": (ArgumentError, r"web page"),
    "pointer.pt": (ArgumentError, r"Git LFS pointer.*git lfs pull"),
    "keras.h5": (ArgumentError, r"HDF5"),
    "llama.gguf": (ArgumentError, r"GGUF"),
    "w.pt.gz": (ArgumentError, r"gzip; unpack it"),
    "w.json": (ArgumentError, r"JSON"),
    "words.txt": (ArgumentError, r"no weight file \(it begins with b'hello th'\)"),
    "none.pt": (ArgumentError, r"empty"),
    "packed.pt": (ArgumentError, r"packed file; give it the ending \.gsm"),
    "cut.pt": (FormatError, r"truncated or corrupt"),
    "cut-old.pt": (FormatError, r"truncated or corrupt"),
    "cut.safetensors": (FormatError, r"not a whole safetensors"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_called_what_it_is(name: str, foreign: Path) -> None:
    error, told = KINDS[name]
    before = (foreign / name).read_bytes()
    with pytest.raises(error, match=told) as caught:
        inputs.read_state(foreign / name)
    assert name in str(caught.value)
    assert "delete" not in str(caught.value)
    assert (foreign / name).read_bytes() == before


class Planted:
    def __reduce__(self) -> Any:
        return (Path("planted").touch, ())


@pytest.mark.parametrize("new", [True, False])
def test_nothing_in_a_file_is_run(
    new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Planted()}, "evil.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(ArgumentError, match="would run code"):
        inputs.read_state("evil.pt")
    assert not Path("planted").exists()


def test_the_command_line_takes_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = datasets.load("digits")
    torch.manual_seed(0)
    model = inputs.network("mlp-64-10", digits)
    other = inputs.network("mlp-64-10", digits, seed=5)
    path = tmp_path / "w.pt"
    torch.save({"live": other.state_dict(), "average": model.state_dict()}, path)
    with pytest.raises(SystemExit) as end:
        main(["pack", str(path), str(tmp_path / "w.gsm")])
    assert end.value.code == 1
    assert "--key live" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["pack", str(path), str(tmp_path / "w.gsm"), "--key", "average"])
    assert not end.value.code
    back = inputs.read_state(tmp_path / "w.gsm")
    assert all(torch.equal(t, back[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: (w * 40).to(torch.int8), "integer codes are no weights"),
        (lambda w: w.to(torch.complex64), "no imaginary part"),
        (lambda w: w.double() * 1e300, "does not hold values as large as"),
    ],
)
def test_values_that_the_network_would_change_are_refused(
    tmp_path: Path, change: Any, told: str
) -> None:
    net = nn.Linear(3, 2)
    before = net.weight.detach().clone()
    torch.save({"weight": change(torch.ones(2, 3)), "bias": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(ArgumentError, match=f"'weight': .*{told}"):
        inputs.load_weights(net, tmp_path / "w.pt")
    assert torch.equal(net.weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.bool])
def test_other_dtypes_are_read_where_nothing_is_lost(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({"weight": torch.eye(2).to(dtype), "bias": torch.ones(2)}, tmp_path / "w.pt")
    found = inputs.load_weights(nn.Linear(2, 2), tmp_path / "w.pt")
    assert torch.equal(found.state_dict()["weight"], torch.eye(2))


def test_two_values_for_one_tied_tensor_are_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    torch.save(net.state_dict(), tmp_path / "w.pt")
    net[1].weight = net[0].weight
    with pytest.raises(ArgumentError, match=r"'1\.weight': it is tied to '0\.weight'"):
        inputs.load_weights(net, tmp_path / "w.pt")
