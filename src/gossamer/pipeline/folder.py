"""The run directory: whose run it holds, and files in it that are whole or absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from gossamer.errors import ArgumentError
from gossamer.files import write_text

__all__ = ["KEY", "begin", "write_text"]

KEY = "run-key.json"
"""The file that says what is being run."""


def begin(out: Path, key: dict[str, Any], restart: bool) -> None:
    """Begin, or go on with, the run that the directory is of.

    Raises :class:`ArgumentError` when it holds another run, naming the first difference, or
    anything else.
    """
    marker = out / KEY
    if restart and marker.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    if not marker.exists():
        if any(not p.name.endswith(".tmp") for p in out.iterdir()):
            raise ArgumentError(f"{out} is not empty and holds no run; name another directory")
        write_text(marker, json.dumps(key, indent=1))
    try:
        found = json.loads(marker.read_text())
    except ValueError as e:
        raise ArgumentError(f"{marker} is damaged ({e}); start anew with --restart") from e
    # through JSON once, as what was read has been
    difference = _difference(found, json.loads(json.dumps(key)))
    if difference:
        raise ArgumentError(
            f"{out} holds another run: {difference}; start anew with --restart (restart=True), "
            "or name another directory"
        )
    (out / "metrics").mkdir(exist_ok=True)


def _difference(old: Any, new: Any, path: str = "") -> str:
    """The first place where two runs differ, in words; empty where they do not."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            found = _difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return ""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return next(filter(None, (_difference(a, b, f"{path}.{i}") for i, (a, b) in pairs)), "")
    if old == new:
        return ""
    return f"{path} was {json.dumps(old)[:120]}, now it is {json.dumps(new)[:120]}"


