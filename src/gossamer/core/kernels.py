"""Which compiled kernels can be used.

Everything that is compiled has a plain numpy or Python twin that reads and writes the same bytes.
``GOSSAMER_NATIVE=0`` in the environment turns the compiled ones off.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

__all__ = ["kernel"]


@cache
def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"gossamer._native.{name}")
    except ImportError:
        return None


def kernel(name: str) -> ModuleType | None:
    """The module ``gossamer._native.<name>``; ``None`` when it was not built or is turned off.

    The environment is read at each call, so that one process can compare both.
    """
    if os.environ.get("GOSSAMER_NATIVE") == "0":
        return None
    return _load(name)
