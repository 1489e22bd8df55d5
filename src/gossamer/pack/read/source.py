"""Bytes at a place of a file, for several threads and for forked processes at once.

A seek and a read share one position between all threads, and with every process that was forked
since the file was opened. So each read names its place; where the system has no such call, one
thread reads at a time.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import BinaryIO

from gossamer.core.errors import ArgumentError

__all__ = ["Source"]


class Source:
    """A file, or its bytes, to be read anywhere.

    Args:
        source: path, or the bytes of a file.
    """

    def __init__(self, source: str | Path | bytes) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._data: memoryview | None = None
        self._file: BinaryIO | None = None
        if isinstance(source, bytes):
            self._data, self.size = memoryview(source), len(source)
        elif not isinstance(source, (str, os.PathLike)):
            raise ArgumentError(
                f"a packed file is given as a path or as bytes, not as {type(source).__name__}"
            )
        elif os.path.exists(source) and not os.path.isfile(source) and not os.path.isdir(source):
            raise ArgumentError(
                f"{source} is no regular file (a pipe?), and is read at more than one place; write "
                "it to a file first"
            )
        else:
            self._file = open(source, "rb")  # noqa: SIM115 (closed by close())
            self.size = os.fstat(self._file.fileno()).st_size

    def read(self, at: int, count: int) -> bytes:
        """Up to ``count`` bytes from place ``at`` on; fewer only at the end of the file.

        Raises :class:`ValueError` when it was closed.
        """
        if self._closed:
            raise ValueError("the file was closed; open it again to read it")
        if self._data is not None:
            return bytes(self._data[at : at + count])
        parts: list[bytes] = []
        while count > 0 and (part := self._some(at, count)):  # one call gives at most 2 GiB
            parts.append(part)
            at, count = at + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _some(self, at: int, count: int) -> bytes:
        assert self._file is not None
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), count, at)
        with self._lock:
            self._file.seek(at)
            return self._file.read(count)

    def close(self) -> None:
        """Close the file."""
        self._closed = True
        if self._file is not None:
            self._file.close()
