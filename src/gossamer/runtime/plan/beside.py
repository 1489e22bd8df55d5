"""The plan beside a packed file: a network's file and its plan run without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.machine import cpu
from gossamer.runtime.plan import planfile

__all__ = ["plan_of"]


def plan_of(path: str | Path) -> Path:
    """The plan that ``gossamer.compile`` left beside a file for this processor, the newest.

    A plan counts whose own digest is right and that was made of just this file, by its SHA-256.

    Raises :class:`ArgumentError` where there is none.
    """
    path = Path(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    found: list[tuple[float, Path]] = []
    stale = 0
    for plan in path.parent.glob(f"{glob_free(path.stem)}.*.plan"):
        try:
            key = planfile.header(plan).get("key")
        except (FormatError, ValueError, OSError):  # damaged, or gone meanwhile
            continue
        if isinstance(key, dict) and key.get("processor") == cpu():
            if key.get("file") == digest:
                found.append((plan.stat().st_mtime, plan))
            else:
                stale += 1
    if not found:
        why = f"; {stale} there are of another file of this name" if stale else ""
        raise ArgumentError(
            f"{path} is no plan, and no plan of it for this processor is beside it{why}: "
            f"run 'gossamer compile {path}' first, or gossamer.compile in Python"
        )
    return max(found)[1]


def glob_free(text: str) -> str:
    """A name as a pattern that stands for it alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)
