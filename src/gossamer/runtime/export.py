"""The door to deployment: a network becomes a file that other runtimes open, checked before.

The file's suffix says which: ``.onnx`` (float32 or int8 QDQ), ``.xml`` with its ``.bin``
(OpenVINO), ``.pte`` (ExecuTorch). Whatever is written has been run in its runtime on the example
and on another batch, and compared with torch; nothing is left where that fails. ``.gguf`` (ternary
weights for ggml) holds no graph to run: its tensors are read back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from gossamer.core import nest
from gossamer.core.errors import ArgumentError
from gossamer.core.files import write_chunks
from gossamer.datasets import Split
from gossamer.quantize.emulated import Emulated
from gossamer.quantize.network import FixedPoint
from gossamer.runtime import executorch, gguf, onnx_float, onnx_int8, openvino, sessions
from gossamer.runtime import onnx as fixed
from gossamer.runtime.compare import Closeness, compared, probes
from gossamer.runtime.flat import Flat, check_example, flatten
from gossamer.runtime.onnx_int8 import Weights

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "FORMATS",
    "PRECISIONS",
    "Export",
    "Precision",
    "batches_of",
    "eight_bits",
    "export",
    "float32",
]

Precision = Literal["float32", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "int8")
FORMATS = {".onnx": "ONNX", ".xml": "OpenVINO", ".pte": "ExecuTorch", ".gguf": "GGUF"}
_ONE_PRECISION = {"ExecuTorch": "float32", "GGUF": "ternary"}

_RELATIVE = 1e-4  # of the largest output: what float32 in another order may differ by
_FLOOR = 0.98  # cosine
_MOST_CALIBRATION = 512  # examples of a split
_WHY = "an export is run and compared before it is written"


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: the file; of OpenVINO the ``.xml``.
        format: ONNX, OpenVINO, ExecuTorch or GGUF.
        precision: float32, int8, ternary, or fixed-point with the library's own formats.
        opset: of ONNX; None for the others.
        inputs, outputs: name -> type and shape in words; N is a batch of any size.
        bytes: of all files together.
        dense_bytes: of the network's float32 tensors.
        check: the runtime beside torch, on the example and another batch (for int8, on the
            calibration inputs too). None for fixed point, which is compared step by step, and for
            GGUF, whose tensors are read back.
        notes: what else is to be said.
    """

    path: Path
    format: str
    precision: str
    opset: int | None
    inputs: dict[str, str]
    outputs: dict[str, str]
    bytes: int
    dense_bytes: int
    check: Closeness | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        of = f"{self.format} {self.precision}" + (f", opset {self.opset}" if self.opset else "")
        lines = [
            f"file     {self.path} ({of})",
            f"bytes    {self.bytes:,} for {self.dense_bytes:,}",
        ]
        for what, those in (("inputs", self.inputs), ("outputs", self.outputs)):
            if self.format != "GGUF":
                lines.append(f"{what:8} " + ", ".join(f"{n} {kind}" for n, kind in those.items()))
        otherwise = "step by step against the fixed-point network"
        if self.format == "GGUF":
            otherwise = "every tensor, read back from the file"
        lines.append(f"checked  {self.check or otherwise}")
        return "\n".join([*lines, *(f"note     {n}" for n in self.notes)])


def export(
    model: nn.Module | FixedPoint,
    example_inputs: Any,
    path: str | Path,
    *,
    precision: Precision = "float32",
    calibration: Iterable[Any] | Split | None = None,
    weights: Weights = "auto",
    floor: float = _FLOOR,
    exclude: Iterable[str] | None = None,
    overwrite: bool = False,
) -> Export:
    """Write a network for another runtime, after the runtime gave what torch gives.

    Args:
        model: any network, which is left as it is; wrappers and derived weights are taken off a
            copy. A fixed-point network is written with its own formats.
        example_inputs: one batch as the network takes it: a tensor, a tuple in order, a mapping by
            name. Unused for a fixed-point network and for ``.gguf``.
        path: ends in ``.onnx``, ``.xml`` (``.bin`` beside it), ``.pte`` or ``.gguf``.
        precision: ``int8``: eight-bit weights and activations
            (:mod:`gossamer.runtime.onnx_int8`), for ONNX and OpenVINO.
        calibration: inputs for int8: a split, or an iterable of batches like the example; of pairs
            (inputs, targets) the inputs, where the example is one tensor. A tensor is one batch.
        weights: of int8: ``int7``, ``uint8``, or ``auto``.
        floor: of int8: the least mean cosine of the outputs with torch's; below, it is refused.
        exclude: of ``.gguf``: patterns of weights that need not be ternary
            (:mod:`gossamer.runtime.gguf`).
        overwrite: replace a file that is there.

    Raises :class:`ArgumentError`, and writes nothing: for a suffix, precision, target or example
    that cannot be; a package that is not installed; int8 without calibration inputs; a network that
    the exporter does not take, naming the operation or the line; float32 outputs beyond 1e-4 of the
    largest one, int8 outputs below the floor.
    """
    target, kind = _target(path, precision, overwrite)
    if exclude is not None and kind != "GGUF":
        raise ArgumentError(f"exclude= is for .gguf; {target.suffix} holds every weight alike")
    if isinstance(model, Emulated):
        model = model.net()
    if isinstance(model, FixedPoint):
        return _fixed(model, target, kind)
    if kind == "GGUF":
        file = gguf.write(model, target, exclude=exclude)
        sizes = (file.bytes, file.dense_bytes)
        return Export(target, kind, "ternary", None, {}, {}, *sizes, None, file.notes)
    if precision == "int8" and calibration is None:
        raise ArgumentError(
            "precision='int8' needs calibration inputs, which set the ranges of activations; give "
            "calibration= some hundred examples like those it will see (--data)"
        )
    check_example(example_inputs)
    _installed(kind)
    flat, tensors, told = flatten(model, example_inputs)
    if kind == "ExecuTorch":
        held = executorch.program(flat, tensors)
        method = executorch.opened(held)
        check = compared(flat, [tensors], lambda x: executorch.run(method, x), "ExecuTorch")
        _float(check)
        shape = {n: _shown(t) for n, t in zip(flat.inputs, tensors, strict=True)}
        told.append("inputs have the example's shapes: ExecuTorch plans its memory for them")
        return _written(target, kind, precision, flat, [held], check, told, shape, {}, None)
    made, check, more = float32(flat, tensors)
    told += more
    if precision == "int8":
        batches = list(batches_of(calibration, example_inputs, tensors))
        made, check, more = eight_bits(flat, tensors, made, batches, weights=weights, floor=floor)
        told += more
    pieces = [made.SerializeToString()]
    if kind == "OpenVINO":
        pieces = list(openvino.files(made))
        opened = openvino.compiled((pieces[0], pieces[1]))
        checked = _probes(flat, tensors, made)
        check = compared(flat, checked, lambda x: openvino.run(opened, x), kind)
        _judged(check, precision, floor, kind)
    inputs, outputs = (
        {v.name: _typed(v) for v in some} for some in (made.graph.input, made.graph.output)
    )
    opset = onnx_float.OPSET if kind == "ONNX" else None
    return _written(target, kind, precision, flat, pieces, check, told, inputs, outputs, opset)


def float32(flat: Flat, tensors: Sequence[Tensor]) -> tuple[ModelProto, Closeness, list[str]]:
    """The float32 model, checked in onnxruntime; the batch fixed where it cannot vary.

    Raises :class:`ArgumentError` where it cannot be made, or differs from torch.
    """
    for free in (True, False):
        made, told = onnx_float.to_model(flat, tensors, free=free)
        opened = sessions.session(made)
        try:
            check = compared(flat, _probes(flat, tensors, made), _runs(opened), "onnxruntime")
            _float(check)
        except ArgumentError:  # a first dimension that is time, or whose size a branch asks for
            if not free:
                raise
            continue
        return made, check, told
    raise AssertionError  # the second turn returns or raises


def eight_bits(
    flat: Flat,
    tensors: Sequence[Tensor],
    model: ModelProto,
    batches: Sequence[Sequence[Tensor]],
    *,
    weights: Weights = "auto",
    floor: float = _FLOOR,
) -> tuple[ModelProto, Closeness, list[str]]:
    """The int8 model of a float32 one, checked in onnxruntime on what calibrated it.

    Raises :class:`ArgumentError` where it cannot be made, or is below the floor.
    """
    if not 0 <= floor <= 1:
        raise ArgumentError(f"floor={floor} is a cosine between 0 and 1")
    made, told = onnx_int8.quantized(model, batches, weights=weights)
    opened = sessions.session(made)
    check = compared(flat, batches, _runs(opened), "onnxruntime")
    _judged(check, "int8", floor, "onnxruntime")
    seen = sum(len(b[0]) for b in batches)
    told.append(f"activations are uint8, their ranges the extremes of {seen:,} calibration inputs")
    return made, check, told


def _target(path: str | Path, precision: str, overwrite: bool) -> tuple[Path, str]:
    target = Path(path)
    if target.suffix not in FORMATS:
        known = ", ".join(f"{s} ({f})" for s, f in FORMATS.items())
        raise ArgumentError(f"path {str(target)!r}: end its name in one of {known}")
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    kind = FORMATS[target.suffix]
    if kind in _ONE_PRECISION and precision != "float32":
        raise ArgumentError(
            f"precision='int8' is written to .onnx and .xml; {target.suffix} is "
            f"{_ONE_PRECISION[kind]}"
        )
    if not target.parent.is_dir():
        raise ArgumentError(f"path {str(target)!r}: there is no folder {str(target.parent)!r}")
    for file in (target, target.with_suffix(".bin")) if kind == "OpenVINO" else (target,):
        if file.is_dir():
            raise ArgumentError(f"path {str(file)!r} is a folder; name a file")
        if file.exists() and not overwrite:
            raise ArgumentError(
                f"path {str(file)!r} is there already; name another, or overwrite it "
                "(overwrite=True, --overwrite)"
            )
    return target, kind


def _installed(kind: str) -> None:
    """Ask for packages before any work."""
    if kind == "ExecuTorch":
        return
    sessions.needs("onnx", "onnxscript", "onnxruntime", extra="onnx", why=_WHY)
    if kind == "OpenVINO":
        sessions.needs("openvino", extra="openvino", why=_WHY)


def _fixed(net: FixedPoint, target: Path, kind: str) -> Export:
    if kind != "ONNX":
        raise ArgumentError(f"a fixed-point network is written to .onnx, not {target.suffix}")
    model = fixed.to_onnx(net)
    held = model.SerializeToString()
    write_chunks(target, [held])
    inputs, outputs = (
        {v.name: _typed(v) for v in some} for some in (model.graph.input, model.graph.output)
    )
    dense = sum(4 * w.numel() for name in net.program.weights for w in _values(net, name))
    return Export(
        target, kind, "fixed-point", onnx_float.OPSET, inputs, outputs, len(held), dense, None,
        ("weights are uint8 around 128 or int16, biases int32, inputs float32 rounded to "
         f"{net.formats[net.program.steps[0].name].bits} bits",),
    )  # fmt: skip


def _values(net: FixedPoint, name: str) -> list[Tensor]:
    return [w for w in net.program.weights[name] if w is not None]


def _probes(flat: Flat, tensors: Sequence[Tensor], model: ModelProto) -> Sequence[Sequence[Tensor]]:
    """The example, and batches of other sizes where the model takes them."""
    first = model.graph.input[0].type.tensor_type.shape
    if not first.dim or not first.dim[0].HasField("dim_param"):
        return [tensors]
    return probes(flat, tensors)


def _runs(opened: Any) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    return partial(sessions.run, opened)


def _judged(check: Closeness, precision: str, floor: float, who: str) -> None:
    if precision == "float32":
        _float(check)
    elif check.cosine < floor:
        raise ArgumentError(
            f"int8 in {who} is too far from torch: {check}; the floor is a cosine of {floor}. "
            "Nothing was written. Calibrate with inputs of the kind it will see, try "
            "weights='uint8', export float32, or lower floor="
        )


def _float(check: Closeness) -> None:
    if check.relative > _RELATIVE:
        raise ArgumentError(
            f"the export differs from torch: {check}, where {_RELATIVE:g} is allowed; nothing was "
            "written. The forward does something that a captured graph does not hold (random "
            "numbers, values kept between calls), or the runtime computes an operation otherwise"
        )


def batches_of(
    given: Iterable[Any] | Split | None, example: Any, tensors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Calibration inputs as flat batches; raises for none, and for other shapes."""
    if isinstance(given, Tensor):
        given = [given]
    if isinstance(given, Split):
        given = list(_parts(given))
    seen = 0
    for batch in given or ():
        if isinstance(example, Tensor) and isinstance(batch, (tuple, list)) and batch:
            batch = batch[0]
        rows = tuple(t.detach().cpu() for t in nest.leaves(batch))
        rows = tuple(t.float() if t.is_floating_point() else t for t in rows)
        alike = len(rows) == len(tensors) and all(
            a.dtype == b.dtype and a.shape[1:] == b.shape[1:]
            for a, b in zip(rows, tensors, strict=True)
        )
        if not alike:
            raise ArgumentError(
                f"calibration holds {nest.shown(batch)}, where example_inputs is "
                f"{nest.shown(example)}; give batches like the example"
            )
        seen += 1
        yield rows
    if not seen:
        raise ArgumentError("calibration is empty; give some hundred examples")


def _parts(split: Split) -> Iterator[Any]:
    count = min(len(split), _MOST_CALIBRATION)
    for start in range(0, count, 32):
        yield split.batch(slice(start, min(start + 32, count)))[0]


def _typed(value: Any) -> str:
    from onnx import TensorProto

    tensor = value.type.tensor_type
    shape = ", ".join(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)
    return f"{TensorProto.DataType.Name(tensor.elem_type).lower()} ({shape})"


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _written(
    target: Path,
    kind: str,
    precision: str,
    flat: Flat,
    pieces: Sequence[bytes],
    check: Closeness,
    told: Sequence[str],
    inputs: dict[str, str],
    outputs: dict[str, str],
    opset: int | None,
) -> Export:
    for file, piece in zip((target, target.with_suffix(".bin")), pieces, strict=False):
        write_chunks(file, [piece])
    dense = sum(t.numel() * t.element_size() for t in (*flat.parameters(), *flat.buffers()))
    size = sum(len(piece) for piece in pieces)
    return Export(target, kind, precision, opset, inputs, outputs, size, dense, check, tuple(told))
