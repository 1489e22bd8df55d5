"""What a process holds."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["give_back"]


def give_back() -> None:
    """Return what was freed to the system; nothing where the C library is another than glibc.

    It keeps what lies between blocks that are still in use, and of threads that took turns the
    holes of each: with large matrices that come and go a fifth of what a process holds.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
