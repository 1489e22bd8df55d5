"""Files that are whole or as they were: what everything here writes its files with.

The bytes go to a new file of a name nobody can foresee, in the same folder, reach the disk, and
take the place of the old ones in one step. No link is followed, two writers never share a
temporary file, and whatever stops the writer leaves the old file, and nothing beside it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from gossamer.core.errors import ArgumentError, GossamerError

__all__ = ["picture", "replacing", "sha256", "shown", "write_chunks", "write_text"]

_FULL = {errno.ENOSPC, errno.EDQUOT}
_PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp", ".eps", ".tif", ".tiff")


@contextlib.contextmanager
def replacing(path: str | Path, *, make_folder: bool = False) -> Iterator[BinaryIO]:
    """A new binary file, read and write, that becomes ``path`` when the block ends without error.

    A link at ``path`` is replaced, not followed. ``make_folder``: the folder is made where there
    is none.

    Raises :class:`ArgumentError` when the folder does not exist or ``path`` is a folder,
    :class:`GossamerError` when the disk is full; ``path`` is then as it was.
    """
    path = Path(path)
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.is_dir():
        raise ArgumentError(f"path {str(path)!r}: the folder {str(path.parent)!r} does not exist")
    if path.is_dir() and not path.is_symlink():
        raise ArgumentError(f"path {str(path)!r} is a folder; name a file")
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        # O_EXCL: neither a file nor a link may stand there
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
        handle = os.open(temporary, flags, 0o666)
        try:
            with os.fdopen(handle, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            raise
    except OSError as e:
        if e.errno not in _FULL:
            raise
        raise GossamerError(_full(path)) from e
    except RuntimeError as e:
        # torch's writer tells of a failed write in words of its own
        if _free(path) > 1 << 20 or "write" not in str(e).lower():
            raise
        raise GossamerError(_full(path)) from e
    if os.name == "posix":  # the rename itself reaches the disk with the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_chunks(path: str | Path, chunks: Iterable[bytes]) -> None:
    """Write bytes, piece by piece; raises as :func:`replacing`."""
    with replacing(path) as file:
        for chunk in chunks:
            file.write(chunk)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text; the folder is made where there is none. Raises as :func:`replacing`."""
    with replacing(path, make_folder=True) as file:
        file.write(text.encode())


def picture(path: str | Path) -> Path:
    """The path of a figure to draw, its folder made.

    Raises :class:`ArgumentError` for an ending that is no picture's, best before long work.
    """
    path = Path(path)
    if path.suffix.lower() not in _PICTURES:
        raise ArgumentError(f"path {str(path)!r}: end its name in one of {', '.join(_PICTURES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def shown(text: str, keep: str = "") -> str:
    """Text from a file as a terminal may show it: what controls the terminal is escaped.

    >>> print(shown("layer" + chr(27) + "[2J.weight"))
    layer\\x1b[2J.weight
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def _free(path: Path) -> int:
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:
        return 1 << 62


def _full(path: Path) -> str:
    return (
        f"the disk of {path.parent} is full ({_free(path):,} bytes free): {path.name} was not "
        "written, and what was there before is untouched; make room and run the same command again"
    )


def sha256(file: BinaryIO, length: int) -> bytes:
    """SHA-256 of the first ``length`` bytes, in hexadecimal; the file is left behind them.

    Raises :class:`EOFError` when there are fewer.
    """
    file.seek(0)
    total = hashlib.sha256()
    while length:
        part = file.read(min(length, 1 << 20))
        if not part:
            raise EOFError("the file ends while it is read")
        total.update(part)
        length -= len(part)
    return total.hexdigest().encode()
