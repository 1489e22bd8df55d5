"""Exports: what is written gives what torch gives, and what cannot be is refused by name."""

import copy
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer import cli
from gossamer.core.errors import ArgumentError
from gossamer.quantize import Precision, calibrate
from gossamer.runtime import export as door
from gossamer.runtime import onnx_float
from gossamer.runtime.compare import altered, closeness
from gossamer.runtime.flat import flatten
from gossamer.runtime.onnx_int8 import grid, quantized


@dataclasses.dataclass
class Out:
    logits: Tensor
    hidden: tuple


class Net(nn.Module):
    """Two inputs by name, a derived weight, a number among the inputs; a dataclass comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(8, 5))

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Out:
        h = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        h = h if mask is None else h * mask
        return Out(self.head(h) * scale, (h,))


def network() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():  # a grid of seven bits in each channel
        step = net.conv.weight.abs().amax((1, 2, 3), keepdim=True) / 60
        net.conv.weight.copy_((net.conv.weight / step).round() * step)
    return net.eval()


def example(count: int = 2, seed: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=draw)
    return {"x": x, "mask": torch.rand(count, 8, generator=draw), "scale": 3.0}


def outputs(path: Path, inputs: dict) -> list[Tensor]:
    ort = pytest.importorskip("onnxruntime")
    found = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {k: v.numpy() for k, v in inputs.items() if isinstance(v, Tensor)}
    return [torch.from_numpy(t) for t in found.run(None, feeds)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, gossamer.Export]:
    pytest.importorskip("onnxscript")
    net = network()
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    return net, gossamer.export(net, example(), path)


def test_the_file_gives_what_torch_gives_for_any_batch(written) -> None:
    net, made = written
    assert made.check.relative < 1e-4
    assert made.check.examples == 6  # the example, and other sizes
    assert made.inputs == {"x": "float (N, 3, 8, 8)", "mask": "float (N, 8)"}
    assert made.outputs == {"logits": "float (N, 5)", "hidden_0": "float (N, 8)"}
    assert (made.format, made.precision, made.opset) == ("ONNX", "float32", 21)
    assert made.bytes == made.path.stat().st_size
    assert [p.name for p in made.path.parent.iterdir()] == ["net.onnx"]
    given = example(7, 1)
    with torch.no_grad():
        wanted = net(**given)
    logits, hidden = outputs(made.path, given)
    assert torch.allclose(logits, wanted.logits, atol=1e-5)
    assert torch.allclose(hidden, wanted.hidden[0], atol=1e-5)
    assert nn.utils.parametrize.is_parametrized(net.head)  # as it was
    assert str(Path.cwd()).encode() not in made.path.read_bytes()  # no paths of ours


def test_int8_keeps_grids_and_is_checked(written, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    net, made = written
    flat, tensors, _ = flatten(net, example())
    float_model = onnx.load(str(made.path))
    batches = [flatten(net, example(16, s))[1] for s in range(2)]
    model, check, told = door.eight_bits(flat, tensors, float_model, batches)
    assert check.cosine > 0.99
    assert check.examples == 32
    assert any("in seven bits" in t for t in told)
    assert any(t.startswith("weights of 1 of 2 layers keep the grid") for t in told)
    held = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
    (codes,) = [v for n, v in held.items() if v.dtype == np.int8 and v.ndim == 4]
    own = net.conv.weight.detach()
    step = own.abs().amax((1, 2, 3), keepdim=True) / 60
    sign = net.norm.weight.detach().sign().view(-1, 1, 1, 1)
    assert np.array_equal(codes, ((own / step).round() * sign).numpy())
    with pytest.raises(ArgumentError, match=r"too far from torch: .*the floor is a cosine of 1"):
        door.eight_bits(flat, tensors, float_model, batches, floor=1.0)
    model, told = quantized(float_model, batches, weights="uint8")
    kinds = {c.data_type for c in model.graph.initializer if len(c.dims) > 1}
    assert kinds == {onnx.TensorProto.UINT8}


def test_what_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")

    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return x
            return -x

    x = torch.ones(2, 3)
    with pytest.raises(ArgumentError, match=r"differs from torch: .*random numbers"):
        gossamer.export(Noise(), x, tmp_path / "a.onnx")
    with pytest.raises(
        ArgumentError, match=r"decides by the values of tensors \(line \d+ of test_export.py: if x"
    ):
        gossamer.export(Branch(), x, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [1, 8])
def test_a_branch_on_the_size_of_a_batch_fixes_it(size: int, tmp_path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return -self.layer(x) if x.shape[0] == size else self.layer(x)

    made = gossamer.export(Branch().eval(), torch.randn(2, 4), tmp_path / "net.onnx")
    assert "the example's: the first dimension cannot vary" in str(made)


def test_a_missing_operation_is_named() -> None:
    cause = ValueError("No ONNX function found for <OpOverload(op='aten.linalg_eig', ov='x')>")
    error = RuntimeError("Failed to export. And many lines")
    error.__cause__ = cause
    assert "no rule for the operation aten.linalg_eig" in onnx_float.why(error)


@pytest.mark.parametrize(
    ("path", "options", "match"),
    [
        ("a.txt", {}, r"end its name in one of \.onnx \(ONNX\)"),
        ("a.onnx", {"precision": "int4"}, "precision='int4' is not one of float32, int8"),
        ("a.onnx", {"precision": "int8"}, "needs calibration inputs"),
        ("a.pte", {"precision": "int8"}, r"\.pte is float32"),
        ("none/a.onnx", {}, "there is no folder"),
        ("there.onnx", {}, "is there already"),
        ("folder.onnx", {}, "is a folder"),
    ],
)
def test_the_door_names_what_is_wrong(tmp_path: Path, path: str, options: dict, match: str) -> None:
    (tmp_path / "there.onnx").write_text("as it was")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ArgumentError, match=match):
        gossamer.export(network(), example(), tmp_path / path, **options)
    assert (tmp_path / "there.onnx").read_text() == "as it was"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "path", "extra"),
    [("onnxscript", "a.onnx", "onnx"), ("openvino", "a.xml", "openvino"),
     ("executorch.exir", "a.pte", "executorch")],
)  # fmt: skip
def test_what_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, path: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    if name == "openvino":
        pytest.importorskip("onnxscript")
    with pytest.raises(ArgumentError, match=rf"not installed; pip install 'gossamer\[{extra}\]'"):
        gossamer.export(network(), example(), tmp_path / path)
    assert list(tmp_path.iterdir()) == []


def test_examples_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError, match="holds no tensor"):
        flatten(network(), None)
    with pytest.raises(ArgumentError, match=r"does not take example_inputs \(2, 4\) float32"):
        flatten(network(), torch.zeros(2, 4))
    with pytest.raises(ArgumentError, match="model is of type str"):
        flatten("resnet-20", torch.zeros(1))
    wanted = tuple(flatten(network(), example())[1])
    bad = {**example(), "x": torch.zeros(2, 3, 9, 9)}
    with pytest.raises(ArgumentError, match=r"calibration holds \{x: \(2, 3, 9, 9\)"):
        list(door.batches_of([bad], example(), wanted))
    with pytest.raises(ArgumentError, match="calibration is empty"):
        list(door.batches_of([], example(), wanted))
    pairs = [(torch.zeros(2, 4), torch.zeros(2))]  # of a DataLoader
    assert len(list(door.batches_of(pairs, torch.zeros(1, 4), (torch.zeros(1, 4),)))) == 1


def test_half_precision_and_wrappers_become_plain_float32() -> None:
    net = nn.DataParallel(network().half())
    before = copy.deepcopy(net.state_dict())
    flat, tensors, told = flatten(net, {**example(), "x": example()["x"].half()})
    assert {t.dtype for t in tensors} == {torch.float32}
    assert any("float16 tensors are float32" in t for t in told)
    assert not any(nn.utils.parametrize.is_parametrized(m) for m in flat.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_closeness_by_hand() -> None:
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [1.0, 0.0]])
    found = closeness([a], [b], "x")
    assert (found.relative, found.agreement, found.examples) == (0.25, 0.5, 2)
    assert found.cosine == pytest.approx((24 / 25 + 1) / 2)
    assert closeness([a * 0], [a * 0], "x").cosine == 1  # zeros agree
    nan = torch.tensor([float("nan"), 1.0])
    assert closeness([nan], [nan], "x").relative == 0
    with pytest.raises(ArgumentError, match="not finite"):
        closeness([nan], [nan.nan_to_num()], "x")
    with pytest.raises(ArgumentError, match=r"is \(2, 1\) in x and \(2, 2\)"):
        closeness([a], [b[:, :1]], "x")
    with pytest.raises(ArgumentError, match="2 outputs where torch gives 1"):
        closeness([a], [b, b], "x")
    x, ids = altered((a, torch.tensor([[7], [8]])), 3)
    assert torch.equal(x, 0.7 * a[[0, 1, 0]])
    assert ids.flatten().tolist() == [7, 8, 7]


def test_grids_are_found_by_channel() -> None:
    draw = np.random.default_rng(0)
    codes = draw.integers(-90, 91, (6, 40))
    codes[:, 0], codes[0] = 90, 0
    steps = draw.uniform(1e-4, 10, 6)
    rows = (codes * steps[:, None]).astype(np.float32)
    found = grid(rows)
    assert found[0] == 1
    assert np.allclose(found[1:], steps[1:] * np.gcd.reduce(codes[1:], axis=1), rtol=1e-5)
    assert np.isnan(grid(draw.normal(size=(4, 40)))).all()


def test_a_fixed_point_network_goes_through_the_same_door(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = calibrate(nn.Sequential(nn.Linear(8, 3), nn.ReLU()), [x], Precision(8, 8, 8, True))
    made = gossamer.export(net, None, tmp_path / "net.onnx")
    assert (made.precision, made.check, made.opset) == ("fixed-point", None, 21)
    assert "step by step" in str(made)
    with pytest.raises(ArgumentError, match=r"written to \.onnx, not \.xml"):
        gossamer.export(net, None, tmp_path / "net.xml")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    net = gossamer.nets.build("mlp-64-16-10", seed=0)
    gossamer.pack.pack(net, tmp_path / "net.gsm").close()
    (tmp_path / "run.json").write_text('{"model": "mlp-64-16-10", "dataset": "digits"}')
    to = tmp_path / "net.onnx"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["export", str(tmp_path / "net.gsm"), "--to", str(to), "--int8"])
    said = capsys.readouterr().out
    assert "ONNX int8, opset 21" in said
    assert "512 calibration inputs" in said
    x = gossamer.datasets.load("digits").test.batch(slice(0, 32))[0]
    (got,) = outputs(to, {"input": x})
    assert float((got.argmax(1) == net(x).argmax(1)).double().mean()) > 0.9


def test_the_command_needs_to_know_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gossamer.pack.pack(gossamer.nets.build("mlp-64-16-10"), tmp_path / "net.gsm").close()
    to = ["--to", str(tmp_path / "a.onnx")]
    # code that a run.json names is not run unasked
    (tmp_path / "run.json").write_text('{"model": "os:getcwd", "dataset": "x:y"}')
    for arguments, match in (
        ([str(tmp_path / "net.gsm")], "say of which network they are: --model NAME"),
        (["lenet-5", "--model", "lenet-5"], "give one of them"),
        (["lenet-5"], "example_inputs is NoneType, which holds no tensor"),
        (["lenet-5", "--shape", "a"], "--shape 'a' is no shape"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["export", *arguments, *to])
        assert match in capsys.readouterr().err
