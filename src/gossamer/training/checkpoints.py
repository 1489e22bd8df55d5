"""Files that survive a kill at any moment, and that load without pickle's powers.

A checkpoint is what ``torch.save`` writes, a zip archive, with the SHA-256 of its bytes as the
archive's comment; ``torch.load(weights_only=True)`` reads it as any other.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.files import replacing, sha256

__all__ = ["load_checkpoint", "save_atomic"]

_MARK = b"gossamer-sha256:"
_COMMENT = len(_MARK) + 64


def save_atomic(obj: Any, path: str | Path) -> None:
    """Write ``obj`` (tensors and plain values) so that ``path`` is always old or new, never half.

    Raises as :func:`gossamer.core.files.replacing`, a full disk among them.
    """
    with replacing(path, make_folder=True) as file:
        torch.save(obj, file)
        file.flush()
        length = file.seek(-2, 2)  # the archive ends with the length of its comment, which is 0
        digest = sha256(file, length)
        file.seek(length)
        file.write(_COMMENT.to_bytes(2, "little") + _MARK + digest)


def load_checkpoint(path: str | Path) -> Any:
    """Read what :func:`save_atomic` wrote, onto the CPU; nothing in the file is executed.

    A file without the digest, of an older version, is checked by the archive's own CRC-32s.

    Raises :class:`ArgumentError` when there is no such file, :class:`FormatError` for a truncated,
    changed or foreign one.
    """
    path = Path(path)
    if not path.is_file():
        raise ArgumentError(f"checkpoint {path} is no file")
    try:
        with open(path, "rb") as file:
            _check(file, path)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except FormatError:
        raise
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        NotImplementedError,
        pickle.UnpicklingError,
        struct.error,
        zipfile.BadZipFile,
    ) as e:
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise FormatError(
            f"checkpoint {path} is truncated, damaged or no checkpoint of this library "
            f"({reason[0][:160]}); restore it from a copy, or start the run again"
        ) from e


def _check(file: BinaryIO, path: Path) -> None:
    """Raise :class:`FormatError` where a byte is not what was written."""
    size = file.seek(0, 2)
    file.seek(max(0, size - _COMMENT - 2))
    end = file.read()
    if end[2 : 2 + len(_MARK)] == _MARK and end[:2] == _COMMENT.to_bytes(2, "little"):
        if sha256(file, size - _COMMENT - 2) != end[2 + len(_MARK) :]:
            raise FormatError(
                f"checkpoint {path} is damaged: its bytes are not those that were written (its "
                "SHA-256 differs); restore it from a copy, or start the run again"
            )
        return
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise FormatError(
            f"checkpoint {path} is damaged: {bad} in it fails its CRC-32; restore it from a copy, "
            "or start the run again"
        )
