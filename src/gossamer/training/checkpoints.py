"""Files that survive a kill at any moment, and that load without pickle's powers."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from gossamer.errors import ArgumentError, FormatError

__all__ = ["load_checkpoint", "save_atomic"]


def save_atomic(obj: Any, path: str | Path) -> None:
    """Write ``obj`` (tensors and plain values) so that ``path`` is always old or new, never half.

    A temporary file in the same folder, flushed to disk, then renamed over ``path``. The
    temporary name is fixed: what a killed process left is overwritten by the next save.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(obj, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself reaches the disk with the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path: str | Path) -> Any:
    """Read what :func:`save_atomic` wrote, onto the CPU; nothing in the file is executed.

    Raises :class:`ArgumentError` when there is no such file, :class:`FormatError` for a truncated,
    corrupt or foreign one.
    """
    path = Path(path)
    if not path.is_file():
        raise ArgumentError(f"checkpoint {path} is no file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        pickle.UnpicklingError,
        struct.error,
        zipfile.BadZipFile,
    ) as e:
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise FormatError(
            f"checkpoint {path} is truncated, corrupt or no checkpoint ({reason[0][:160]}); "
            "delete it to start again, or restore it from a copy"
        ) from e
