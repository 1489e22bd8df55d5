"""Networks as ExecuTorch programs (``.pte``) for phones, float32 through XNNPACK."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.runtime.flat import Flat
from gossamer.runtime.quiet import quiet, reason
from gossamer.runtime.sessions import needs

__all__ = ["opened", "program", "run"]

_WHY = "it makes and runs .pte files"


def program(flat: Flat, tensors: Sequence[Tensor]) -> bytes:
    """The program for inputs of the example's shapes, in float32, on XNNPACK where it can.

    Raises :class:`ArgumentError` without ExecuTorch or a package that it needs, and for a network
    that it does not lower.
    """
    needs("executorch.exir", extra="executorch", why=_WHY)
    with quiet(), torch.no_grad():
        try:
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
                XnnpackPartitioner,
            )
            from executorch.exir import to_edge_transform_and_lower

            captured = torch.export.export(flat, tuple(tensors), strict=False)
            lowered = to_edge_transform_and_lower(captured, partitioner=[XnnpackPartitioner()])
            return bytes(lowered.to_executorch().buffer)
        except ImportError as e:
            raise ArgumentError(
                f"ExecuTorch lacks {e.name or e}; pip install 'gossamer[executorch]' ({_WHY})"
            ) from e
        except Exception as e:  # its errors have no common base
            raise ArgumentError(
                f"{type(flat.model).__name__} cannot be exported to ExecuTorch: {reason(e)}"
            ) from e


def opened(held: bytes) -> Any:
    """The program's forward method, ready to run; raises as :func:`program`."""
    needs("executorch.runtime", extra="executorch", why=_WHY)
    with quiet():
        try:
            from executorch.runtime import Runtime

            return Runtime.get().load_program(held).load_method("forward")
        except Exception as e:  # as above
            raise ArgumentError(f"ExecuTorch does not run the export: {reason(e)}") from e


def run(method: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The outputs for input tensors in the network's order."""
    return [t.clone() for t in method.execute(list(tensors))]
