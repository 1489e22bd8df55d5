"""The pack: arrays to bytes to a file, and back.

Read when asked for: the coders are for programs without torch too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.pack.read.archive import Archive, describe, unpack
    from gossamer.pack.read.load import load_into
    from gossamer.pack.read.rows import Row
    from gossamer.pack.write.writer import PROFILES, pack, pack_bytes

__all__ = ["PROFILES", "Archive", "Row", "describe", "load_into", "pack", "pack_bytes", "unpack"]

_HOME = {
    "read.archive": ("Archive", "describe", "unpack"),
    "read.load": ("load_into",),
    "read.rows": ("Row",),
    "write.writer": ("PROFILES", "pack", "pack_bytes"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"gossamer.pack.{module}"), name)
    raise AttributeError(f"module 'gossamer.pack' has no attribute {name!r}")
