"""Networks from other tools' files, from the file to a packed one that gives them back."""

import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer import nets
from gossamer.core import names
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.nets.sources import open_source
from gossamer.training.layer_inputs import readers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.mix = nn.Dropout(0.5), nn.Parameter(torch.randn(4, 4))
        self.out = nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.einsum("nchw,cd->ndhw", x, self.mix)
        return self.out(self.drop(x).flatten(1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    net, folder = Net(), tmp_path_factory.mktemp("sources")
    net(torch.rand(50, 1, 8, 8))
    net.eval()
    batch = {0: torch.export.Dim.DYNAMIC}
    example = (torch.rand(2, 1, 8, 8),)
    torch.export.save(
        torch.export.export(net, example, dynamic_shapes=(batch,)), folder / "net.pt2"
    )
    torch.export.save(torch.export.export(net, example), folder / "fixed.pt2")
    training = torch.export.export(net.train(), example, dynamic_shapes=(batch,))
    torch.export.save(training, folder / "training.pt2")
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(net)
        torch.jit.save(script, folder / "net.pt")
        torch.jit.save(torch.jit.freeze(script), folder / "frozen.pt")
    return net, folder


@pytest.mark.parametrize("file", ["net.pt2", "net.pt"])
def test_a_file_is_a_network_like_any_other(made: Any, file: str) -> None:
    net, folder = made
    x = torch.rand(5, 1, 8, 8)
    found = nets.build(str(folder / file), seed=1, pretrained=False)
    torch.testing.assert_close(found(x), net(x), rtol=1e-5, atol=1e-6)
    assert set(names.clean_state_dict(found)) == set(net.state_dict())
    known = ["conv.weight", "out.weight"] + (["mix"] if file == "net.pt2" else [])
    assert set(names.weights(found)) == set(known)  # einsum is no layer of TorchScript's
    own = [n for n, p in names.parameters(found).items() if p.ndim >= 2]
    assert set(readers(found, [x], own)) == {"conv.weight", "mix", "out.weight"}
    found.train()
    with torch.no_grad():  # the graph of an export has one mode, TorchScript both
        assert torch.allclose(found(x), net(x), atol=1e-6) == (file == "net.pt2")


@pytest.mark.parametrize("file", ["net.pt2", "net.pt"])
def test_from_a_file_to_a_packed_one(made: Any, file: str, tmp_path: Path) -> None:
    net, folder = made
    stages = [{"prune": {"density": 0.5}}, {"obs": {"bits": 4, "calibration": 64}}]
    recipe = {"name": "x", "max_drop": 1, "stages": [*stages, {"evaluate": {"latency": False}}]}
    result = gossamer.compress(str(folder / file), "digits", recipe=recipe, out=tmp_path)
    assert not result.problems
    back = result.run["bytes"]["reloaded"]
    assert back["built"] == str(folder / file)
    assert back["same_outputs"]
    for name in ("conv.weight", "mix", "out.weight"):
        weight = dict(result.model.named_parameters())[name]
        assert len(weight.unique()) < weight.numel()
    assert torch.equal(open_source(str(folder / file)).out.weight, net.out.weight)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("none.pt2", "there is no file"),
        ("fixed.pt2", r"exported for batches of exactly 2 \(x\).*Dim.DYNAMIC"),
        ("training.pt2", "exported in training mode"),
        ("frozen.pt", "no parameters: torch.jit.freeze"),
        ("tensors.pt", r"holds tensors and no code.*--weights"),
        ("text.ts", "holds tensors and no code"),
    ],
)
def test_what_is_no_network_to_rewrite_is_refused_in_a_sentence(
    made: Any, file: str, told: str
) -> None:
    _, folder = made
    torch.save({"a": torch.ones(2)}, folder / "tensors.pt")
    (folder / "text.ts").write_text("no network")
    with pytest.raises(ArgumentError, match=told):
        nets.build(str(folder / file))


def test_a_method_that_replaces_a_weight_of_torchscript_is_refused(made: Any) -> None:
    found = nets.build(str(made[1] / "net.pt"))
    found.out.weight = nn.Parameter(torch.zeros(10, 144))
    with pytest.raises(ArgumentError, match=r"out.weight has been replaced.*in place"):
        found(torch.rand(2, 1, 8, 8))


def test_options_that_a_file_does_not_take(made: Any) -> None:
    with pytest.raises(ArgumentError, match="takes no pretrained="):
        nets.build(str(made[1] / "net.pt"), pretrained=True)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_nothing_is_unpickled(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = made
    bad = folder / "bad.pt2"
    with zipfile.ZipFile(folder / "net.pt2") as old, zipfile.ZipFile(bad, "w") as new:
        for member in old.namelist():
            data = old.read(member)
            if "sample_inputs" in member:
                stream = io.BytesIO()
                torch.save(Evil(), stream)
                data = stream.getvalue()
            new.writestr(member, data)
    with pytest.raises(FormatError, match="no exported program"):
        nets.build(str(bad))
    assert "run" not in capsys.readouterr().out
    (folder / "evil.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ArgumentError, match="no code"):
        nets.build(str(folder / "evil.pt"))
    assert torch.load.__module__ == "torch.serialization"
