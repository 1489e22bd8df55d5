"""Any network as an ONNX model in float32, by torch's own exporter (``torch.export``).

The batch is a dynamic dimension where the network allows it. Batch-norm is folded and constants are
by the exporter's optimizer.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.runtime.compare import altered
from gossamer.runtime.flat import Flat, named
from gossamer.runtime.quiet import quiet, reason

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["OPSET", "batched", "captured", "to_model", "why"]

OPSET = 21
"""The operator set of every export: it has QuantizeLinear for 16 bits too."""

# what torch notes of the sizes for which a capture holds: that inputs share their batch is fine
_SAME_BATCH = re.compile(r"L\[[^ ]*\.size\(\)\[0\] == L\[[^ ]*\.size\(\)\[0\]")
_MOST_BYTES = 1 << 31  # of a protobuf message
_PACKAGES = str(Path(torch.__file__).parent)


def batched(tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], bool]:
    """The example with at least two rows, and whether its tensors share a batch dimension.

    A size of one is a constant to torch's capture.
    """
    if any(t.ndim == 0 for t in tensors) or len({len(t) for t in tensors}) != 1:
        return tuple(tensors), False
    count = len(tensors[0])
    return (tuple(tensors), True) if count > 1 else (altered(tensors, 2), True)


def captured(flat: Flat, tensors: Sequence[Tensor], *, free: bool = True) -> tuple[Any, bool]:
    """The network as ``torch.export`` captures it, and whether its batch may change.

    ``free``: whether the first dimension is the batch, which may change at all. Where the forward
    pass does something else for some sizes of it (a branch, a table that ends), it may not: what
    was captured is one of its ways.

    Raises :class:`ArgumentError` saying where the forward pass does what cannot be captured.
    """
    rows = tuple(tensors)
    if free:
        rows, free = batched(tensors)
    dims = {0: torch.export.Dim.AUTO} if free else None
    with quiet(), torch.no_grad():
        try:
            program = torch.export.export(
                flat, rows, dynamic_shapes={"tensors": tuple(dims for _ in rows)}, strict=False
            )
        except Exception as e:  # torch's capture runs the user's code, and has errors of any kind
            raise ArgumentError(f"{_what(flat)} cannot be exported: {why(e)}") from e
    if free and any(not _SAME_BATCH.fullmatch(g) for g in getattr(program, "_guards_code", ())):
        return captured(flat, tensors, free=False)
    sizes = [n.meta["val"].shape for n in program.graph.nodes if n.name in _user_inputs(program)]
    return program, free and all(isinstance(s[0], torch.SymInt) for s in sizes)


def _user_inputs(program: Any) -> set[str]:
    return set(program.graph_signature.user_inputs)


def to_model(
    flat: Flat, tensors: Sequence[Tensor], *, free: bool = True
) -> tuple[ModelProto, list[str]]:
    """The float32 model, and what is to be said of it. It is not yet compared with torch.

    ``free``: as for :func:`captured`.

    Raises :class:`ArgumentError` where torch's exporter fails: naming the operation that it has no
    rule for, or the line of the forward pass.
    """
    program, free = captured(flat, tensors, free=free)
    outputs = _output_names(flat, tensors)
    with quiet(), torch.no_grad():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(flat.inputs),
                output_names=outputs,
            )
            assert made is not None  # of the dynamo exporter
            model: ModelProto = made.model_proto
        except Exception as e:  # the exporter's errors have no common base
            raise ArgumentError(f"{_what(flat)} cannot be exported to ONNX: {why(e)}") from e
    size = sum(len(t.raw_data) for t in model.graph.initializer)
    if size >= _MOST_BYTES:
        raise ArgumentError(
            f"the export holds {size:,} bytes of weights; one ONNX file here holds less than "
            f"{_MOST_BYTES:,}"
        )
    if free:
        _name_batch(model)
    told = [] if free else ["shapes are the example's: the first dimension cannot vary alone"]
    model.producer_name = "gossamer"
    del model.metadata_props[:]
    for node in model.graph.node:  # the exporter's notes hold stack traces with paths of files
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    return model, told


def _what(flat: Flat) -> str:
    return type(flat.model).__name__


def _output_names(flat: Flat, tensors: Sequence[Tensor]) -> list[str]:
    with torch.no_grad():
        found = [name for name, _ in named(flat.whole(*tensors), "output")]
    taken = set(flat.inputs)
    return [f"{name}_out" if name in taken else name for name in found]


def _name_batch(model: ModelProto) -> None:
    """The batch is ``N`` in place of the capture's symbol."""
    symbol = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "N", dim.dim_param)


def why(error: BaseException) -> str:
    """An exporter's error in a sentence: the operation without a rule, else the forward's line."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    text = "\n".join(str(e) for e in chain)
    if missing := re.search(r"No (?:ONNX function|decompositions?)[^\n]*?'([\w.]+)'", text):
        return (
            f"torch's exporter has no rule for the operation {missing[1]}; write that part with "
            "other operations"
        )
    place = next(filter(None, (_place(e) for e in reversed(chain))), "")
    if "data-dependent" in text.lower() or "GuardOnDataDependent" in text:
        return (
            f"its forward decides by the values of tensors{place}; use torch.where or torch.cond, "
            "which keep both ways"
        )
    return f"{reason(error)}{place}"


def _place(error: BaseException) -> str:
    """The last line of the user's own code that an error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((_PACKAGES, str(Path(__file__).parent)))]
    own = [f for f in own if "site-packages" not in f.filename and not f.filename.startswith("<")]
    if not own or own[-1].name in ("export", "to_model"):
        return ""
    return f" (line {own[-1].lineno} of {Path(own[-1].filename).name}: {own[-1].line})"
