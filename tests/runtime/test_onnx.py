import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.core.errors import ArgumentError
from gossamer.quantize import FixedPoint, Precision, calibrate
from gossamer.runtime.onnx import export, to_onnx
from gossamer.structure import fold_batchnorm

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx.reference")
ort = pytest.importorskip("onnxruntime")


def run(net: FixedPoint, path: Path, x: Tensor) -> Tensor:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(
        str(export(net, path)), options, providers=["CPUExecutionProvider"]
    )
    (out,) = session.run(None, {"input": x.numpy()})
    return torch.from_numpy(out)


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 8, 12, 16])
def test_onnxruntime_gives_the_same_top_1_on_a_residual_network(bits, tmp_path):
    folded = fold_batchnorm(nets.build("resnet-8", seed=1))
    net = calibrate(folded, [images(8, 0)], Precision(bits, 8, bits, True))
    x = images(16, 1)
    got, simulated = run(net, tmp_path / "net.onnx", x), net(x)
    assert torch.equal(got.argmax(1), simulated.argmax(1))
    step = net.formats[net.program.output].step
    # a tie may fall the other way where float32 rounds: a few steps of the last format
    assert float((got - simulated).abs().max()) <= (2 if bits <= 8 else 40) * step


def test_every_operation_is_exported_exactly(tmp_path):
    spec = importlib.util.spec_from_file_location(
        "fixed_point_tests", Path(__file__).parents[1] / "quantize" / "test_fixed_point.py"
    )
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    net = calibrate(fold_batchnorm(tests.zoo(0)), [images(8, 0)], Precision(6, 8, 6, True))
    x = images(8, 1)
    got = run(net, tmp_path / "zoo.onnx", x)
    assert float((got - net(x)).abs().max()) <= net.formats[net.program.output].step
    assert torch.equal(got.argmax(1), net(x).argmax(1))


def test_the_file_holds_codes_and_power_of_two_scales():
    net = calibrate(
        nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.ReLU()),
        [images(4, 0)],
        Precision(8, 8, 16, True),
    )
    model = to_onnx(net)
    held = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
    assert held["1.weight/codes"].dtype == "uint8"
    assert held["zero_uint8"] == 128
    assert held["1.bias/codes"].dtype == "int32"
    assert (held["1.weight/codes"] - 128.0 == net.layer("1").weight.numpy()).all()
    scales = [float(v) for n, v in held.items() if n.startswith("scale_")]
    assert scales
    assert all(s.hex().startswith("0x1.0000000000000p") for s in scales)
    assert held["zero_int16"] == 0
    kinds = [n.op_type for n in model.graph.node]
    assert kinds.count("QuantizeLinear") == 3  # input, reshaped, output
    assert "Clip" not in kinds


def test_what_onnx_cannot_hold_is_named():
    class Adaptive(nn.Sequential):
        pass

    net = calibrate(Adaptive(nn.AdaptiveMaxPool2d(3)), [images(2, 0)], Precision(8, 8, 8, True))
    with pytest.raises(ArgumentError, match=r"0 pools .* unequal"):
        to_onnx(net)
    net = calibrate(nn.Sequential(nn.Linear(16, 2)), [images(2, 0)], Precision(8, 8, 8, True))
    with pytest.raises(ArgumentError, match="0: a linear layer"):
        to_onnx(net)


WINDOWS = {
    "overhanging": nn.AvgPool2d(3, 2, ceil_mode=True),
    "overhanging, one side": nn.AvgPool2d((3, 2), (2, 2), ceil_mode=True),
    "far apart": nn.AvgPool2d(2, 3, ceil_mode=True),
    "whole": nn.AvgPool2d(4, 4, ceil_mode=True),
    "padded": nn.AvgPool2d(3, 2, padding=1),
    "padded, not counted": nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
    "largest, overhanging": nn.MaxPool2d(3, 2, ceil_mode=True),
    "largest, padded and overhanging": nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
    "largest, dilated": nn.MaxPool2d(2, 3, padding=1, dilation=2, ceil_mode=True),
}


@pytest.mark.parametrize("side", [6, 7, 8])
@pytest.mark.parametrize("kind", WINDOWS)
def test_pooling_windows_are_the_networks_everywhere(kind, side, tmp_path):
    x = torch.arange(float(side * side)).view(1, 1, side, side)
    net = calibrate(nn.Sequential(WINDOWS[kind]), [x], Precision(8, 8, 8, True))
    assert torch.equal(run(net, tmp_path / "net.onnx", x), net(x))
    model = onnx.load(str(tmp_path / "net.onnx"))
    (reference,) = onnx.reference.ReferenceEvaluator(model).run(None, {"input": x.numpy()})
    assert torch.equal(torch.from_numpy(reference), net(x))
    assert not any(a.name == "ceil_mode" for n in model.graph.node for a in n.attribute)


def test_an_average_over_the_overhanging_window_by_hand(tmp_path):
    x = torch.arange(36.0).view(1, 1, 6, 6)
    net = calibrate(
        nn.Sequential(nn.AvgPool2d(3, 2, ceil_mode=True)), [x], Precision(8, 8, 8, True)
    )
    # the last window of the first row: (4 + 5 + 10 + 11 + 16 + 17) / 6
    assert run(net, tmp_path / "net.onnx", x)[0, 0, 0].tolist() == [7.0, 9.0, 10.5]


def test_an_export_that_computes_otherwise_is_not_written(tmp_path, monkeypatch):
    from gossamer.runtime import onnx as exporting

    net = calibrate(
        nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), [images(2, 0)], Precision(8, 8, 8, True)
    )
    windows = exporting._Export._window
    for wrong, match in (
        ({"pads": [1] * 4}, r"no valid ONNX model: .*\(9\) vs \(8\)"),
        ({"kernel_shape": [1, 1]}, r"1 \(average\) differs by .*; nothing was written"),
    ):

        def window(self, step, wrong=wrong):
            return {**windows(self, step), **wrong}

        monkeypatch.setattr(exporting._Export, "_window", window)
        with pytest.raises(ArgumentError, match=match):
            export(net, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_without_onnxruntime_nothing_is_written(tmp_path, monkeypatch):
    net = calibrate(nn.Sequential(nn.ReLU()), [images(2, 0)], Precision(8, 8, 8, True))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ArgumentError, match=r"onnxruntime is not installed; pip install"):
        export(net, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()
