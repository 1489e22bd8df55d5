"""Networks that answer fast: exported, compared with the original, timed in engines, compiled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gossamer.runtime.plan.plan import Plan

__all__ = ["load"]


def load(path: str | Path) -> Plan:
    """The network of a plan's file (:meth:`gossamer.runtime.plan.plan.Plan.save`), ready to run.

    It takes and gives numpy arrays; torch is not imported. Kernels that this machine lacks are
    replaced by portable ones, and the example in the file is computed and compared first.

    Raises :class:`FormatError` for a file that is damaged, or no plan.
    """
    from gossamer.runtime.plan.plan import Plan

    return Plan.load(path)
