"""Products of ggml, the library under llama.cpp, through its shared library.

``GOSSAMER_GGML`` names a built ``libggml.so`` (``cmake --build BUILD --target ggml ggml-cpu`` in
llama.cpp's ``ggml`` folder, ``-DGGML_NATIVE=ON``). The graph is one ``ggml_mul_mat`` on the CPU
backend, as llama.cpp runs it: the activations become 8-bit blocks inside (``Q8_K`` for TQ2_0).
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import ArgumentError

__all__ = ["VARIABLE", "Product", "library"]

VARIABLE = "GOSSAMER_GGML"
_TYPES = {"F32": 0, "Q8_0": 8, "TQ2_0": 35}  # enum ggml_type
_ROOM = 1 << 20  # bytes for the graph's description


class _Settings(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_version": (ctypes.c_char_p, []),
    "ggml_init": (c_void_p, [_Settings]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_free": (None, [c_void_p]),
}


def library() -> Any | None:
    """The library that ``GOSSAMER_GGML`` names, its functions typed; None where it names none.

    Raises :class:`ArgumentError` for a file that is no ggml.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    try:
        found = ctypes.CDLL(path)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as e:
        raise ArgumentError(
            f"{VARIABLE}={path!r} is no ggml library with a CPU backend: {e}"
        ) from e
    return found


class Product:
    """``W x`` for one x, on one thread.

    Args:
        lib: of :func:`library`.
        weight: float32, (outputs, inputs); quantized by ggml itself.
        kind: ``TQ2_0`` or ``Q8_0``.
        held: address of the quantized rows, where a file has them.

    Raises :class:`ArgumentError` where ggml gives no memory.
    """

    def __init__(
        self, lib: Any, weight: NDArray[np.float32], kind: str, *, held: int | None = None
    ) -> None:
        self.lib, (outputs, inputs) = lib, weight.shape
        self.out = np.empty(outputs, np.float32)
        self._context = lib.ggml_init(_Settings(_ROOM, None, True))
        self._backend = lib.ggml_backend_cpu_init()
        lib.ggml_backend_cpu_set_n_threads(self._backend, 1)
        matrix = lib.ggml_new_tensor_2d(self._context, _TYPES[kind], inputs, outputs)
        self._x = lib.ggml_new_tensor_2d(self._context, _TYPES["F32"], inputs, 1)
        self._y = lib.ggml_mul_mat(self._context, matrix, self._x)
        self._graph = lib.ggml_new_graph(self._context)
        lib.ggml_build_forward_expand(self._graph, self._y)
        self._buffer = lib.ggml_backend_alloc_ctx_tensors(self._context, self._backend)
        if not self._buffer:
            raise ArgumentError(f"ggml has no memory for {outputs} x {inputs} in {kind}")
        rows = np.empty(outputs * lib.ggml_row_size(_TYPES[kind], inputs), np.uint8)
        weight = np.ascontiguousarray(weight)
        if held is None:
            lib.ggml_quantize_chunk(
                _TYPES[kind], weight.ctypes.data, rows.ctypes.data, 0, outputs, inputs, None
            )
        lib.ggml_backend_tensor_set(matrix, held or rows.ctypes.data, 0, rows.nbytes)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """``W x``, (outputs,), in memory that the next call writes over; x: float32, (inputs,)."""
        self.lib.ggml_backend_tensor_set(self._x, x.ctypes.data, 0, x.nbytes)
        if self.lib.ggml_backend_graph_compute(self._backend, self._graph):
            raise ArgumentError("ggml did not compute the product")
        self.lib.ggml_backend_tensor_get(self._y, self.out.ctypes.data, 0, self.out.nbytes)
        return self.out

    def __del__(self) -> None:
        self.lib.ggml_backend_buffer_free(self._buffer)
        self.lib.ggml_backend_free(self._backend)
        self.lib.ggml_free(self._context)
