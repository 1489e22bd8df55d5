"""What a run knows of its file: tried at the start, proved at the end by a network built anew."""

import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.cli.program import main
from gossamer.compression import fresh, packing, proof
from gossamer.core.errors import ArgumentError
from gossamer.datasets import Dataset, Split
from gossamer.pack import pack
from gossamer.training.tasks import Classification

TASK = Classification()

QUICK: dict[str, Any] = {
    "name": "t",
    "max_drop": 1,
    "stages": [{"prune": {"density": 0.5}}, "pack", {"evaluate": {"latency": False}}],
}


def data() -> Dataset:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    split = Split(x, torch.arange(60) % 3)
    return Dataset("own", split, split, split, 3)


class Scaled(nn.Module):
    """Computes with a number that is extra state."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.kind, self.scale = nn.Linear(4, 3), kind, 3.0

    def get_extra_state(self) -> Any:
        return torch.tensor(self.scale) if self.kind == "tensor" else {"scale": self.scale}

    def set_extra_state(self, state: Any) -> None:
        self.scale = float(state if isinstance(state, Tensor) else state["scale"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


class Loose(nn.Module):
    """Computes with a buffer that is not persistent, and with a plain attribute."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("shift", torch.full((3,), scale), persistent=False)
        self.factor = torch.tensor(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.factor + self.shift * torch.arange(3)


class Masked(nn.Module):
    """Adds a mask of minus infinity, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) @ self.mask.softmax(-1)


def test_a_skeleton_has_no_value_of_any_kind() -> None:
    net = Loose(2.0)
    empty = fresh.skeleton(net)
    assert not any(bool(t.any()) for t in empty.model.state_dict().values())
    assert not bool(empty.model.get_buffer("shift").any())
    assert float(empty.model.factor) == 0
    assert sorted(empty.others) == ["factor", "shift"]
    assert torch.equal(empty.others["shift"], torch.full((3,), 2.0))
    assert float(net.factor) == 2
    assert fresh.skeleton(Scaled("tensor")).model.scale == 0
    with pytest.raises(ArgumentError, match=r"Scaled.*extra state of type dict"):
        fresh.skeleton(Scaled("dict"))


def test_a_file_without_the_extra_state_gives_other_outputs(tmp_path: Path) -> None:
    net, split = Scaled("tensor"), data().test
    plain = {n: t for n, t in net.state_dict().items() if "extra" not in n}
    pack(plain, tmp_path / "a.gsm").close()
    # loaded as far as it goes: the scale is nowhere in the file
    empty = fresh.skeleton(net)
    gossamer.load(tmp_path / "a.gsm", empty.model, strict=False)
    same, difference = fresh._compare(empty.model, split, TASK, fresh.outputs(net, split, TASK))
    assert not same
    assert difference == pytest.approx(float(fresh.outputs(net, split, TASK)[0].abs().max()))


def test_what_had_to_be_carried_beside_the_file_is_named(tmp_path: Path) -> None:
    net, split = Loose(2.0), data().test
    pack(net, tmp_path / "a.gsm").close()
    found = fresh.prove(
        tmp_path / "a.gsm", fresh.skeleton(net), split, TASK, fresh.outputs(net, split, TASK)
    )
    assert found["same"]
    assert found["carried"] == ["factor", "shift"]
    unused = Masked()  # nothing but what the file holds
    pack(unused, tmp_path / "b.gsm", allow_nonfinite=True).close()
    found = fresh.prove(
        tmp_path / "b.gsm", fresh.skeleton(unused), split, TASK, fresh.outputs(unused, split, TASK)
    )
    assert found["same"]
    assert found["carried"] == []
    assert found["test"]["total"] == 60


def test_a_run_says_what_it_could_not_prove(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="NOT PROVED: .*carried over: factor, shift"):
        result = gossamer.compress(Loose(), data(), recipe="lossless", out=tmp_path / "r")
    assert result.problems[0].startswith("NOT PROVED")
    assert result.run["bytes"]["reloaded"]["identical"]
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Not proved: the network computes with tensors that no file of it holds" in page


def test_by_a_function_the_network_is_built_anew_and_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = Path(__file__).read_text()
    body = text[text.index("class Loose") : text.index("class Masked")]
    header = "import sys, torch\nfrom torch import Tensor, nn\n"
    honest = "def model():\n    torch.manual_seed(0)\n    return Loose(2.0)\n"
    Path("honest.py").write_text(header + body + honest)
    result = gossamer.compress("honest.py:model", data(), recipe="lossless", out="a")
    back = result.run["bytes"]["reloaded"]
    assert back["not_proved"] is None
    assert back["built"] == "honest.py:model"
    assert back["evaluated_in"] == proof.FRESH
    # Another constant where it is built anew: found before any work.
    other = "def model():\n    torch.manual_seed(0)\n"
    other += "    return Loose(1.0 if sys.argv[0].endswith('fresh.py') else 3.0)\n"
    Path("other.py").write_text(header + body + other)
    trains = {**QUICK, "stages": [{"train": {"epochs": 1}}]}
    with pytest.raises(ArgumentError, match=r"before any work.*other outputs"):
        gossamer.compress("other.py:model", data(), recipe=trains, out="b")
    assert not Path("b").exists()


def test_infinite_buffers_are_packed_and_infinite_weights_refused_at_the_start(
    tmp_path: Path,
) -> None:
    result = gossamer.compress(Masked(), data(), recipe=QUICK, out=tmp_path / "r")
    assert torch.isinf(result.model.get_buffer("mask")).sum() == 3
    assert result.problems == []
    assert packing.infinite_buffers(Masked())
    assert not packing.infinite_buffers(nn.Linear(2, 2))
    net = Masked()
    with torch.no_grad():
        net.fc.weight[0, 0] = float("inf")
    with pytest.raises(ArgumentError, match=r"fc\.weight holds NaN or infinite"):
        gossamer.compress(net, data(), recipe=QUICK, out=tmp_path / "q")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("kind", ["older", "parametrized", "wrapped"])
def test_derived_and_wrapped_networks_run_to_their_end(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(4, 8)
    if kind == "parametrized":
        layer = nn.utils.parametrizations.weight_norm(layer)
    elif kind == "older":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            layer = nn.utils.weight_norm(layer)
    net: nn.Module = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 3))
    if kind == "wrapped":
        net = nn.DataParallel(net)
    result = gossamer.compress(net, data(), recipe=QUICK, out=tmp_path / "r")
    assert list(dict(result.model.named_parameters())) != []
    assert result.run["bytes"]["reloaded"]["evaluated_in"] == proof.FRESH
    assert len(result.run["notes"]) == 1
    assert result.run["notes"][0] in result.report.read_text().replace("&#39;", "'")
    assert set(result.model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_class_of_a_module_that_is_only_here_is_proved_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As torch.hub and remote code make them: a module in sys.modules that no path leads to.
    made = types.ModuleType("hub_like")
    text = Path(__file__).read_text()
    body = text[text.index("class Masked") : text.index("def test_a_skeleton")]
    exec("import torch\nfrom torch import Tensor, nn\n" + body, made.__dict__)
    monkeypatch.setitem(sys.modules, "hub_like", made)
    result = gossamer.compress(made.Masked(), data(), recipe="lossless", out=tmp_path / "r")
    back = result.run["bytes"]["reloaded"]
    assert back["evaluated_in"] == proof.HERE
    assert back["identical"]
    assert back["same_outputs"]
    assert result.problems == []
    assert "No module named 'hub_like'" in back["notes"][0]


def test_extra_state_travels_as_a_tensor_or_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"extra.state|state_dict\(\) does not hold"):
        gossamer.compress(Scaled("dict"), data(), recipe=QUICK, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()
    result = gossamer.compress(Scaled("tensor"), data(), recipe="lossless", out=tmp_path / "r")
    assert result.run["bytes"]["reloaded"]["same_outputs"]
    assert result.problems == []


def test_a_network_that_cannot_take_the_data_is_refused_before_any_work(tmp_path: Path) -> None:
    for net, told in (
        (nn.Linear(5, 3), r"cannot take the inputs of dataset 'own', \(4,\) each"),
        (nn.Linear(4, 2), "2 outputs|3 classes"),
        (nn.LSTM(4, 3), "no one tensor of logits"),
    ):
        with pytest.raises(ArgumentError, match=told):
            gossamer.compress(net, data(), recipe=QUICK, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_what_fails_at_the_end_leaves_file_figures_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> dict[str, Any]:
        return {"digest": "another", "failed": "RuntimeError: out of luck"}

    monkeypatch.setattr(fresh, "check", broken)
    out = tmp_path / "r"
    # an untrained network by name is refused, so the recipe trains for no epoch
    given = ["-m", "mlp-64-8-10", "-d", "digits", "-r", str(_recipe(tmp_path))]
    with pytest.raises(SystemExit) as ended:
        main(["compress", *given, "--out", str(out)])
    assert ended.value.code == 4
    assert "NOT PROVED: the file does not decode" in capsys.readouterr().err
    assert (out / "model.gsm").exists()
    run = json.loads((out / "run.json").read_text())
    assert run["bytes"]["reloaded"]["identical"] is False
    assert "Not proved" in (out / "report.html").read_text()


def _recipe(folder: Path) -> Path:
    path = folder / "r.yaml"
    path.write_text(
        "name: t\nmax_drop: 1\nstages:\n  - train: {epochs: 0}\n  - evaluate: {latency: false}\n"
    )
    return path
