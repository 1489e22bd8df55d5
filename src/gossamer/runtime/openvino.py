"""Networks as OpenVINO's ``.xml`` and ``.bin``, made of the ONNX model and compared with torch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.runtime.quiet import quiet, reason
from gossamer.runtime.sessions import needs

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["compiled", "files", "run", "tensors"]


def _core() -> Any:
    needs("openvino", extra="openvino", why="it makes and runs .xml files")
    import openvino

    return openvino


def _read(openvino: Any, model: ModelProto) -> Any:
    return openvino.Core().read_model(model.SerializeToString())


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
            return core.compile_model(
                found,
                "CPU",
                {
                    "INFERENCE_NUM_THREADS": threads,
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_PRECISION_HINT": "f32",  # no half precision where it has one
                },
            )
        except Exception as e:  # as above
            raise ArgumentError(f"OpenVINO does not run the export: {reason(e)}") from e


def tensors(opened: Any, found: Any) -> list[Tensor]:
    """The outputs of a call of a compiled model, in the model's order."""
    return [torch.from_numpy(found[i].copy()) for i in range(len(opened.outputs))]


def run(opened: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs for input tensors in the model's order."""
    return tensors(opened, opened([t.numpy() for t in inputs]))
