"""Which compiled kernels can be used: see :mod:`gossamer.native`."""

from gossamer.native import kernel

__all__ = ["kernel"]
