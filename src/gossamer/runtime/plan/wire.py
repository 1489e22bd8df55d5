"""ONNX models as bytes, written without the ``onnx`` package: protobuf's wire format.

A few messages of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto are enough, so that a plan
opens its sessions with numpy and onnxruntime alone.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["OPSET", "model", "node", "tensor"]

OPSET, _IR = 21, 10
_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int16": 5, "int32": 6, "int64": 7, "bool": 9,
          "float64": 11}  # fmt: skip
_FLOAT, _INT, _STRING, _FLOATS, _INTS = 1, 2, 3, 6, 7  # AttributeProto.AttributeType


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers take ten bytes
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes | str) -> bytes:
    held = value.encode() if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(held)) + held


def _attribute(name: str, value: Any) -> bytes:
    out = _bytes(1, name)
    if isinstance(value, str):
        return out + _bytes(4, value) + _int(20, _STRING)
    if isinstance(value, float):
        return out + _varint(2 << 3 | 5) + struct.pack("<f", value) + _int(20, _FLOAT)
    if isinstance(value, int):
        return out + _int(3, value) + _int(20, _INT)
    if any(isinstance(v, float) for v in value):
        each = (_varint(7 << 3 | 5) + struct.pack("<f", v) for v in value)
        return out + b"".join(each) + _int(20, _FLOATS)
    return out + b"".join(_int(8, v) for v in value) + _int(20, _INTS)


def node(kind: str, inputs: Sequence[str], outputs: str | list[str], **attributes: Any) -> bytes:
    """A NodeProto, named by its first output; an input of "" is left out."""
    gives = [outputs] if isinstance(outputs, str) else outputs
    parts = [_bytes(1, name) for name in inputs]
    parts += [*(_bytes(2, name) for name in gives), _bytes(3, gives[0]), _bytes(4, kind)]
    parts += [_bytes(5, _attribute(name, value)) for name, value in attributes.items()]
    return b"".join(parts)


def tensor(name: str, array: np.ndarray) -> bytes:
    """A TensorProto."""
    parts = [_int(1, size) for size in array.shape]
    raw = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return b"".join([*parts, _int(2, _TYPES[str(array.dtype)]), _bytes(8, name), _bytes(9, raw)])


def _value(name: str, dtype: str, shape: Sequence[int | str]) -> bytes:
    dims = [_bytes(1, _bytes(2, d) if isinstance(d, str) else _int(1, d)) for d in shape]
    kind = _int(1, _TYPES[dtype]) + _bytes(2, b"".join(dims))
    return _bytes(1, name) + _bytes(2, _bytes(1, kind))


Typed = Mapping[str, tuple[str, Sequence[int | str]]]
"""Name -> type as numpy calls it, and shape; a string is a free dimension."""


def model(
    nodes: Sequence[bytes], constants: Sequence[bytes], inputs: Typed, outputs: Typed
) -> bytes:
    """A ModelProto of these parts."""
    parts = [_bytes(1, n) for n in nodes]
    parts += [_bytes(2, "plan"), *(_bytes(5, c) for c in constants)]
    parts += [_bytes(11, _value(n, *v)) for n, v in inputs.items()]
    parts += [_bytes(12, _value(n, *v)) for n, v in outputs.items()]
    opset = _bytes(8, _bytes(1, "") + _int(2, OPSET))
    return _int(1, _IR) + opset + _bytes(7, b"".join(parts))
