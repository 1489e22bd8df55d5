"""Which back end works on a tensor: ``native``, ``triton`` or ``eager``.

Each is a module with the functions of :mod:`gossamer.distribute.codecs.eager`, and the same bits.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

from torch import Tensor

from gossamer.core.kernels import kernel
from gossamer.distribute.codecs import compiled, eager

__all__ = ["backend", "module", "statistics"]


@cache
def _triton_found() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend(tensor: Tensor) -> str:
    """``native`` (the compiled kernel, CPU), ``triton`` (CUDA) or ``eager`` (torch, anywhere)."""
    if tensor.device.type == "cpu":
        return "native" if kernel("exchange") is not None else "eager"
    return "triton" if tensor.is_cuda and _triton_found() else "eager"


def module(tensor: Tensor) -> ModuleType:
    """The module of a tensor's back end."""
    name = backend(tensor)
    if name == "triton":
        # imported here: triton is there on CUDA machines only
        return importlib.import_module("gossamer.distribute.codecs.triton_kernels")
    return compiled if name == "native" else eager


def statistics(g: Tensor, absolute: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`~gossamer.distribute.codecs.eager.statistics` of flat float32, by its back end."""
    found: tuple[Tensor, Tensor, Tensor] = module(g).statistics(g, absolute)
    return found
