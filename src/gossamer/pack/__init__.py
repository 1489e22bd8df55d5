"""The pack: arrays to bytes to a file, and back."""

from gossamer.pack.read.archive import Archive, describe, unpack
from gossamer.pack.read.load import load_into
from gossamer.pack.read.rows import Row
from gossamer.pack.write.writer import PROFILES, pack, pack_bytes

__all__ = ["PROFILES", "Archive", "Row", "describe", "load_into", "pack", "pack_bytes", "unpack"]
