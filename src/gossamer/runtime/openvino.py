"""Networks as OpenVINO's ``.xml`` and ``.bin``, made of the ONNX model and compared with torch."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.core.errors import ArgumentError
from gossamer.runtime.quiet import quiet, reason
from gossamer.runtime.sessions import needs

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

__all__ = ["compiled", "files", "opened", "run", "tensors"]

_WHY = "it makes and runs .xml files"


def _core() -> Any:
    needs("openvino", extra="openvino", why=_WHY)
    import openvino

    return openvino


def _read(openvino: Any, model: ModelProto | bytes) -> Any:
    held = model if isinstance(model, bytes) else model.SerializeToString()
    return openvino.Core().read_model(held)


def _settings(threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # no half precision where it has one
    }


def opened(model: bytes, shapes: Mapping[str, Sequence[int]], *, threads: int = 1) -> Any:
    """An ONNX model of float32 or in eight bits, compiled for inputs of just these shapes.

    Raises :class:`ArgumentError` without OpenVINO, and for a model that it does not take.
    """
    openvino = _core()
    with quiet():
        try:
            found = _read(openvino, model)
            found.reshape({name: openvino.PartialShape(list(s)) for name, s in shapes.items()})
            return openvino.Core().compile_model(found, "CPU", _settings(threads))
        except Exception as e:  # the runtime's errors have no common base
            raise ArgumentError(f"OpenVINO does not take the operators: {reason(e)}") from e


def files(model: ModelProto) -> tuple[bytes, bytes]:
    """The texts of the ``.xml`` and the ``.bin`` file of an ONNX model, float32 or int8.

    Weights stay in the precision they have; nothing is rounded to half precision.

    Raises :class:`ArgumentError` without OpenVINO, and for a model that it does not read.
    """
    openvino = _core()
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "model.xml"
        try:
            openvino.save_model(_read(openvino, model), path, compress_to_fp16=False)
        except Exception as e:  # the runtime's errors have no common base
            raise ArgumentError(f"OpenVINO does not read the export: {reason(e)}") from e
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def compiled(model: ModelProto | tuple[bytes, bytes], *, threads: int = 1) -> Any:
    """The model ready to run on the CPU for latency, with so many threads and in its precision.

    Raises :class:`ArgumentError` without OpenVINO, and for a model that it does not take.
    """
    openvino = _core()
    with quiet():
        try:
            core = openvino.Core()
            found = core.read_model(*model) if isinstance(model, tuple) else _read(openvino, model)
            return core.compile_model(found, "CPU", _settings(threads))
        except Exception as e:  # as above
            raise ArgumentError(f"OpenVINO does not run the export: {reason(e)}") from e


def tensors(opened: Any, found: Any) -> list[Tensor]:
    """The outputs of a call of a compiled model, in the model's order."""
    import torch  # plans need none of it

    return [torch.from_numpy(found[i].copy()) for i in range(len(opened.outputs))]


def run(opened: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs for input tensors in the model's order."""
    return tensors(opened, opened([t.numpy() for t in inputs]))
