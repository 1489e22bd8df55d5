"""Models in onnxruntime: opened with a stated number of threads, and run by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gossamer.core.errors import ArgumentError
from gossamer.runtime.quiet import quiet, reason

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

__all__ = ["needs", "run", "session"]


def needs(*packages: str, extra: str, why: str) -> None:
    """Raise :class:`ArgumentError` for a package that is not installed, naming the extra."""
    for package in packages:
        try:
            with quiet():
                import_module(package)
        except ImportError as e:
            raise ArgumentError(
                f"{e.name or package} is not installed; pip install 'gossamer[{extra}]' ({why})"
            ) from e


def session(model: ModelProto | bytes, *, threads: int = 1, fused: bool = True) -> Any:
    """An ``InferenceSession`` on the CPU.

    Args:
        threads: of its own pool, which does not spin between calls: other engines are timed there.
        fused: as deployed; else operators stay apart, so that each one's value can be compared.

    Raises :class:`ArgumentError` where onnxruntime does not take the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    held = model if isinstance(model, bytes) else model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(held, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # the runtime's own errors have no common base
        raise ArgumentError(f"onnxruntime does not take the export: {reason(e)}") from e


def run(opened: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The outputs for input tensors in the model's order.

    Raises :class:`ArgumentError` where the model does not run on them.
    """
    import torch  # sessions alone need none of it

    names = [given.name for given in opened.get_inputs()]
    feeds = {n: t.numpy() for n, t in zip(names, tensors, strict=True)}
    try:
        return [torch.from_numpy(value) for value in opened.run(None, feeds)]
    except Exception as e:  # as above
        raise ArgumentError(f"onnxruntime does not run the export: {reason(e)}") from e
