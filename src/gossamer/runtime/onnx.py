"""Fixed-point networks as ONNX files, quantised in the QDQ form.

Every value that has a number format passes a QuantizeLinear and a DequantizeLinear with scale
``2^-f`` and zero point 0; weights are stored as uint8 around 128 (up to 8 bits) or int16 and
biases as int32 at the length of the sums, ``f_in + f_w``, each behind a DequantizeLinear (operator
set 21, which has int16). A format of other than 8 or 16 bits is kept by a Clip before the
QuantizeLinear, which rounds ties to even, as the fixed-point network does, so a runtime that adds
in float32 agrees with it while sums stay below 2^24, and to float32 rounding beyond. Weights are
unsigned because onnxruntime's kernels for signed ones saturate sums of two products at 16 bits on
processors without VNNI, and so give other results there. None of it is taken on trust: every
export is run and compared.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.core.errors import ArgumentError
from gossamer.core.files import write_chunks
from gossamer.quantize.fixed_point import Format
from gossamer.quantize.network import FixedPoint
from gossamer.quantize.steps import ARITHMETIC, Step
from gossamer.runtime.onnx_check import check

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["export", "to_onnx"]

_OPSET, _IR = 21, 10
_ZERO = 128  # the code of 0 in weights of up to 8 bits


def export(net: FixedPoint, path: str | Path) -> Path:
    """Write :func:`to_onnx` to a file; raises as it does, and nothing is written then."""
    write_chunks(path, [to_onnx(net).SerializeToString()])
    return Path(path)


def to_onnx(net: FixedPoint) -> ModelProto:
    """The network as a checked ONNX model: ``input`` (N, ...) to ``output``, float32.

    The model is run in onnxruntime and compared with the network before it is returned
    (:mod:`gossamer.runtime.onnx_check`).

    Raises :class:`ArgumentError` without ``onnx`` and ``onnxruntime`` (``pip install
    gossamer[onnx]``), and, naming the layer, for a bias beyond int32, a scale beyond float32,
    adaptive max pooling over unequal windows, a linear layer on more than two dimensions, and a
    step that onnxruntime computes otherwise.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401 (looked for before any work)
    except ImportError as e:
        raise ArgumentError(
            f"{e.name} is not installed; pip install 'gossamer[onnx]' (an export is run and "
            "compared before it is written)"
        ) from e
    export = _Export(net, onnx)
    model = export.model()
    check(net, model, export.held)
    return model


class _Export:
    """Writes the steps as nodes."""

    def __init__(self, net: FixedPoint, onnx: Any) -> None:
        self.net, self.onnx = net, onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.kept: set[str] = set()
        self.held: dict[str, str] = {}  # step -> the name of its value

    def model(self) -> ModelProto:
        """The whole model, checked."""
        helper, program = self.onnx.helper, self.net.program
        for step in program.steps:
            self._step(step)
        self._node("Identity", [self.held[program.output]], "output")
        first = program.steps[0].name

        def tensor(name: str, shape: tuple[int, ...]) -> Any:
            return helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, ["N", *shape])

        graph = helper.make_graph(
            self.nodes,
            "fixed_point",
            [tensor("input", self.net.shapes[first])],
            [tensor("output", self.net.shapes[program.output])],
            self.constants,
        )
        opsets = [helper.make_opsetid("", _OPSET)]
        model = helper.make_model(graph, producer_name="gossamer", opset_imports=opsets)
        model.ir_version = _IR
        try:
            self.onnx.checker.check_model(model, full_check=True)
        except Exception as e:  # the checker's errors have no common base
            raise ArgumentError(f"the export is no valid ONNX model: {e}") from e
        return model

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        made = self.onnx.helper.make_node(kind, inputs, [output], name=output, **attributes)
        self.nodes.append(made)
        return output

    def _constant(self, name: str, array: np.ndarray) -> str:
        if name not in self.kept:
            self.kept.add(name)
            self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def _scale(self, frac: int, where: str) -> str:
        if not -126 <= frac <= 126:
            raise ArgumentError(f"{where}: a length of {frac} is beyond what a float32 scale holds")
        return self._constant(f"scale_{frac}", np.array(math.ldexp(1.0, -frac), np.float32))

    def _zero(self, bits: int) -> str:
        dtype = np.int8 if bits <= 8 else np.int16
        return self._constant(f"zero_{dtype.__name__}", np.array(0, dtype))

    def _rounded(self, name: str, form: Format, *, clip: bool = True) -> str:
        """Quantise and dequantise a value."""
        scale, zero = self._scale(form.frac, name), self._zero(form.bits)
        if clip and form.bits not in (8, 16):
            ends = [
                self._constant(f"{name}/{what}", np.array(code * form.step, np.float32))
                for what, code in (("low", form.low), ("high", form.high))
            ]
            name = self._node("Clip", [name, *ends], f"{name}/clip")
        codes = self._node("QuantizeLinear", [name, scale, zero], f"{name}/codes")
        return self._node("DequantizeLinear", [codes, scale, zero], f"{name}/value")

    def _stored(self, name: str, codes: np.ndarray, frac: int) -> str:
        inputs = [self._constant(f"{name}/codes", codes), self._scale(frac, name)]
        if codes.dtype == np.uint8:
            inputs.append(self._constant("zero_uint8", np.array(_ZERO, np.uint8)))
        return self._node("DequantizeLinear", inputs, name)

    def _step(self, step: Step) -> None:
        form = self.net.formats[step.name]
        if step.kind == "input":
            self.held[step.name] = self._rounded("input", form)
            return
        inputs = [self.held[n] for n in step.inputs]
        if step.kind in ARITHMETIC:
            name = self._arithmetic(step, inputs)
            if step.relu:
                name = self._node("Relu", [name], f"{step.name}/relu")
            self.held[step.name] = self._rounded(name, form)
        else:
            # the format is the input's and changes nothing; runtimes look for the pair to fuse
            name = self._choosing(step, inputs[0])
            self.held[step.name] = self._rounded(name, form, clip=False)

    def _arithmetic(self, step: Step, inputs: list[str]) -> str:
        name, s = step.name, step.settings
        if step.kind in ("conv", "linear"):
            return self._layer(step, inputs[0])
        if step.kind == "add":
            return self._node("Add", inputs, name)
        if step.kind == "cat":
            return self._node("Concat", inputs, name, axis=s["dim"])
        if s["how"] == "mean":
            axes = self._constant(f"{name}/axes", np.array(s["dim"], np.int64))
            return self._node("ReduceMean", [inputs[0], axes], name, keepdims=int(s["keepdim"]))
        if s["how"] == "adaptive":
            kernel = self._windows(step)
            return self._node("AveragePool", inputs, name, kernel_shape=kernel, strides=kernel)
        # Windows that hang over the end (ceil_mode, without padding) average what is inside.
        include = int(s["count_include_pad"] and not s["ceil_mode"])
        return self._node(
            "AveragePool", inputs, name, **self._window(step), count_include_pad=include
        )

    def _window(self, step: Step) -> dict[str, Any]:
        """A pooling's windows, its padding explicit: runtimes differ in what ceil_mode means.

        Padding at the end is what the last window needs, which the shapes tell.
        """
        s = step.settings
        have, want = self.net.shapes[step.inputs[0]][-2:], self.net.shapes[step.name][-2:]
        spread = s.get("dilation", (1, 1))
        after = list(s["padding"])
        if s["ceil_mode"]:
            after = [
                max(0, (w - 1) * stride + (kernel - 1) * d + 1 - h - before)
                for h, w, stride, kernel, d, before in zip(
                    have, want, s["stride"], s["kernel_size"], spread, s["padding"], strict=True
                )
            ]
        got = {
            "kernel_shape": list(s["kernel_size"]),
            "strides": list(s["stride"]),
            "pads": [*s["padding"], *after],
        }
        return {**got, "dilations": list(spread)} if "dilation" in s else got

    def _windows(self, step: Step) -> list[int]:
        """Sides of the equal windows of an adaptive pooling."""
        have, want = self.net.shapes[step.inputs[0]][-2:], self.net.shapes[step.name][-2:]
        if any(h % w for h, w in zip(have, want, strict=True)):
            raise ArgumentError(f"{step.name} pools {have} to {want} by unequal windows; no rule")
        return [h // w for h, w in zip(have, want, strict=True)]

    def _layer(self, step: Step, x: str) -> str:
        name, layer = step.name, self.net.layer(step.name)
        assert layer is not None  # convolutions and linear layers have one
        codes = layer.weight.numpy()
        codes = (codes + _ZERO).astype(np.uint8) if layer.form.bits <= 8 else codes.astype(np.int16)
        inputs = [x, self._stored(f"{name}.weight", codes, layer.form.frac)]
        if layer.bias is not None:
            frac = layer.form.frac + self.net.formats[step.inputs[0]].frac
            bias = layer.bias.long() << (frac - layer.bias_form.frac)
            if bias.numel() and int(bias.abs().max()) >= 1 << 31:
                raise ArgumentError(
                    f"{name}: the bias, aligned to the sums, is beyond int32; use fewer bits"
                )
            codes = bias.numpy().astype(np.int32)
            inputs.append(self._stored(f"{name}.bias", codes, frac))
        if step.kind == "linear":
            if len(self.net.shapes[name]) != 1:
                raise ArgumentError(f"{name}: a linear layer on {self.net.shapes[name]}; flatten")
            return self._node("Gemm", inputs, name, transB=1)
        s = step.settings
        return self._node(
            "Conv",
            inputs,
            name,
            strides=list(s["stride"]),
            pads=[*s["padding"]] * 2,
            dilations=list(s["dilation"]),
            group=s["groups"],
        )

    def _choosing(self, step: Step, x: str) -> str:
        name, s = step.name, step.settings
        if step.kind == "relu":
            return self._node("Relu", [x], name)
        if step.kind == "max_pool":
            window = self._window(step)
            sides = zip(window["pads"], [*s["kernel_size"]] * 2, strict=True)
            if any(pad >= side for pad, side in sides):  # dilated: runtimes want less than a side
                pads = window["pads"]
                around = np.array([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64)
                form = self.net.formats[step.name]
                low = self._constant(f"{name}/low", np.array(form.low * form.step, np.float32))
                where = self._constant(f"{name}/pads", around)
                x = self._node("Pad", [x, where, low], f"{name}/padded")
                window["pads"] = [0] * 4
            return self._node("MaxPool", [x], name, **window)
        if step.kind == "adaptive_max":
            kernel = self._windows(step)
            return self._node("MaxPool", [x], name, kernel_shape=kernel, strides=kernel)
        if step.kind in ("flatten", "reshape"):
            shape = np.array([-1, *self.net.shapes[name]], np.int64)
            return self._node("Reshape", [x, self._constant(f"{name}/shape", shape)], name)
        if step.kind == "slice":
            rows = [
                (start or 0, np.iinfo(np.int64).max if stop is None else stop, axis, pace or 1)
                for axis, (start, stop, pace) in enumerate(s["index"])
            ]
            parts = ("starts", "ends", "axes", "steps")
            names = [
                self._constant(f"{name}/{part}", np.array(column, np.int64))
                for part, column in zip(parts, zip(*rows, strict=True), strict=True)
            ]
            return self._node("Slice", [x, *names], name)
        rank = 1 + len(self.net.shapes[name])
        before, after = list(s["pad"][::2])[::-1], list(s["pad"][1::2])[::-1]
        still = [0] * (rank - len(before))
        pads = np.array([*still, *before, *still, *after], np.int64)
        return self._node("Pad", [x, self._constant(f"{name}/pads", pads)], name)
