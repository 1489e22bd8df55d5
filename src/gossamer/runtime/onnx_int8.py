"""A float32 ONNX model in eight bits, quantized statically in the QDQ form.

onnxruntime's own quantizer does it, with what it leaves open decided here:

- activations are uint8 with a zero point, their ranges the least and largest value seen while the
  calibration inputs pass (min-max);
- weights have a scale for each output channel. Where a channel lies on a grid of up to 8 bits, as
  quantized networks do, the scale is that grid's step and the values stay as they are;
- biases are int32 with the scale of the sums.

onnxruntime's kernels for unsigned inputs and **signed weights of eight bits saturate** sums of two
products at 16 bits on processors without VNNI: ResNet-20 agreed with itself on 95 % of CIFAR-10
there, and on 99.8 % with the same weights stored unsigned. Signed weights of seven bits (codes to
64) cannot saturate and are the fastest; they are taken unless a grid needs eight bits. Those are
stored as uint8 around 128: the same results everywhere, at about half the speed, with VNNI too. A
network whose weights are to be rounded for an export wants seven bits, not eight.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.runtime.quiet import quiet, reason

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["WEIGHTS", "Weights", "grid", "quantized"]

Weights = Literal["auto", "int7", "uint8"]
WEIGHTS: tuple[Weights, ...] = ("auto", "int7", "uint8")
_TOP = 127  # the largest code of a symmetric grid of eight bits
_SIGNED = 64  # of seven: two products with 255 stay below 2^15
_OFF = 1e-3  # of a step: float32 rounding of a value, folded batch-norm included
_KINDS = [
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Relu", "Clip", "LeakyRelu",
    "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Split", "Pad", "Reshape",
    "Transpose", "Squeeze", "Unsqueeze", "Resize", "Flatten",
]  # fmt: skip
_CHANNEL = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1}


def grid(rows: np.ndarray, top: int = _TOP) -> np.ndarray:
    """The step of the coarsest grid that each row lies on: (channels, n) -> (channels,) float64.

    A row lies on it where every value is a whole multiple, up to ``top``, within a thousandth of
    the step. NaN where there is none; rows of zeros have step 1.

    >>> grid(np.array([[0.5, -1.0, 0.0], [0.3, 1.0, 0.7071], [0.0, 0.0, 0.0]])).tolist()
    [0.5, nan, 1.0]
    """
    most = np.abs(rows).max(1, initial=0.0).astype(np.float64)
    steps = np.where(most == 0, 1.0, np.nan)
    for codes in range(1, top + 1):
        left = np.flatnonzero(np.isnan(steps))
        if not len(left):
            break
        step = most[left] / codes
        scaled = rows[left] / step[:, None]
        fits = np.abs(scaled - np.round(scaled)).max(1) <= _OFF
        steps[left[fits]] = step[fits]
    return steps


def quantized(
    model: ModelProto,
    batches: Iterable[Sequence[Tensor]],
    *,
    weights: Weights = "auto",
) -> tuple[ModelProto, list[str]]:
    """The int8 model, and what is to be said of it. It is not yet compared with torch.

    Args:
        model: float32, as :func:`gossamer.runtime.onnx_float.to_model` makes it.
        batches: calibration inputs, each the tensors of one batch in the model's order.
        weights: ``int7``, ``uint8`` or ``auto`` (see above).

    Raises :class:`ArgumentError` where no layer can be quantized or onnxruntime's quantizer fails.
    """
    if weights not in WEIGHTS:
        raise ArgumentError(f"weights={weights!r} is not one of {', '.join(WEIGHTS)}")
    overrides, most, kept, total = _grids(model)
    if not total:
        raise ArgumentError(
            "the network has no convolution, linear layer or product with a constant matrix that "
            "int8 would be for; export float32"
        )
    if weights == "auto":
        weights = "uint8" if most > _SIGNED else "int7"
    if weights == "int7":
        overrides = {k: v for k, v in overrides.items() if _top(v) <= _SIGNED}
        kept = sum(1 for _ in overrides)
    found = _run(model, batches, overrides, weights)
    told = [f"weights of {kept} of {total} layers keep the grid they lay on"] if kept else []
    stored = {
        "int7": "weights are int8 in seven bits (no saturation without VNNI)",
        "uint8": "weights are uint8 around 128 (no saturation without VNNI)",
    }
    return found, [*told, stored[weights], *_floats(found)]


def _top(override: list[dict[str, Any]]) -> int:
    return max(int(entry["top"]) for entry in override)


def _grids(model: ModelProto) -> tuple[dict[str, list[dict[str, Any]]], int, int, int]:
    """Weights on grids: name -> step and largest code of each channel; the largest code of all."""
    from onnx import numpy_helper

    constants = {c.name: c for c in model.graph.initializer}
    found: dict[str, list[dict[str, Any]]] = {}
    most, total = 0, 0
    for node in model.graph.node:
        if node.op_type not in _CHANNEL:
            continue
        name = next((n for n in list(node.input)[:2] if n in constants), None)
        if name is None or name in found or constants[name].data_type != 1:
            continue
        values = numpy_helper.to_array(constants[name])
        if values.ndim < 2:
            continue
        total += 1
        if node.op_type == "ConvTranspose" or (node.op_type == "MatMul" and values.ndim != 2):
            continue  # their channels are not one axis
        axis = _axis(node)
        rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        steps = grid(rows)
        if np.isnan(steps).any():
            continue
        tops = np.rint(np.abs(rows).max(1, initial=0.0) / steps).astype(int)
        most = max(most, int(tops.max()))
        found[name] = [
            {"axis": axis, "scale": float(s), "top": int(t)}
            for s, t in zip(steps, tops, strict=True)
        ]
    return found, most, len(found), total


def _grouped(model: ModelProto) -> list[str]:
    """Transposed convolutions with groups: the quantizer has no channel axis for them."""
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "ConvTranspose"
        and any(a.name == "group" and a.i > 1 for a in node.attribute)
    ]


def _floats(model: ModelProto) -> list[str]:
    """What is to be said of matrices that stay float32, and the operations that read them."""
    sizes = {c.name: int(np.prod(c.dims)) for c in model.graph.initializer if len(c.dims) > 1}
    kinds = {c.name: c.data_type for c in model.graph.initializer}
    floats = {name: n for name, n in sizes.items() if kinds[name] == 1}
    if not floats:
        return []
    readers = {node.op_type for node in model.graph.node if set(node.input) & set(floats)}
    return [
        f"{sum(floats.values()):,} of {sum(sizes.values()):,} weights stay float32 "
        f"({', '.join(sorted(readers))})"
    ]


def _axis(node: Any) -> int:
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if node.op_type == "Gemm" and transposed else _CHANNEL[node.op_type]


def _run(
    model: ModelProto,
    batches: Iterable[Sequence[Tensor]],
    overrides: dict[str, list[dict[str, Any]]],
    weights: Weights,
) -> ModelProto:
    import onnx
    from onnxruntime import quantization as q

    names = [given.name for given in model.graph.input]

    class Reader(q.CalibrationDataReader):
        """The batches by name."""

        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            if batch is None:
                return None
            return {n: t.numpy() for n, t in zip(names, batch, strict=True)}

    signed = weights == "int7"
    kind = q.QuantType.QInt8 if signed else q.QuantType.QUInt8
    zero = np.array(0, np.int8) if signed else np.array(128, np.uint8)
    chosen = {
        name: [
            {
                "quant_type": kind,
                "axis": entry["axis"],
                "scale": np.array(entry["scale"], np.float32),
                "zero_point": zero,
            }
            for entry in entries
        ]
        for name, entries in overrides.items()
    }
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "int8.onnx"
        try:
            q.quantize_static(
                copy,
                str(path),
                Reader(),
                quant_format=q.QuantFormat.QDQ,
                op_types_to_quantize=_KINDS,
                per_channel=True,
                reduce_range=signed,
                activation_type=q.QuantType.QUInt8,
                weight_type=kind,
                calibrate_method=q.CalibrationMethod.MinMax,
                nodes_to_exclude=_grouped(model),
                extra_options={"WeightSymmetric": True, "TensorQuantOverrides": chosen},
            )
        except Exception as e:  # the quantizer's errors have no common base
            raise ArgumentError(
                f"onnxruntime cannot quantize the network: {reason(e)}; export float32"
            ) from e
        made: ModelProto = onnx.load(str(path))
    made.producer_name = "gossamer"
    return made
