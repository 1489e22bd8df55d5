"""The run directory: whose run it holds, who works in it, and files that are whole or absent.

Every step can be the last before a kill. A restart first writes a marker that says that the older
run is being thrown away; only then is anything deleted, and whoever comes next finishes that.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from gossamer.core.errors import ArgumentError
from gossamer.core.files import write_text

__all__ = ["KEY", "begin", "held", "look", "write_text"]

KEY = "run-key.json"
"""The file that says what is being run."""
LOCK = "run.lock"
"""Held by the process that works in the directory; the system lets go of it when that ends."""
_CLEARING = "throwing away"  # the only key of a marker while an older run is deleted
# What a run leaves, marker apart; the files that no other program is likely to have written.
_OWN = ("stage-*.pt", "reference.pt", "metrics", "[0-9]*-*.train.pt", "[0-9]*-*.search")
_ALSO = ("recipe.yaml", "model.gsm", "run.json", "report.html", "[0-9]*-*.gsm")


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Work in the directory alone; it is made where it is missing, and goes if it stays empty.

    Raises :class:`ArgumentError` when another process works in it. The lock is the operating
    system's, on an open file: a process that is killed holds it no longer.
    """
    made = not out.exists()
    file = _locked(out)
    try:
        yield
    finally:
        # Removed while it is held: who opens it later finds that it is no longer the file here.
        if sys.platform != "win32":
            (out / LOCK).unlink(missing_ok=True)
        file.close()
        if made:
            with suppress(OSError):  # not empty: a run's, or the next one's lock
                out.rmdir()


def _locked(out: Path) -> IO[str]:
    path = out / LOCK
    while True:
        if out.exists() and not out.is_dir():
            raise ArgumentError(f"{out} is a file; name a directory for the run")
        out.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(path, flags, 0o644), "r+", encoding="utf-8")
        try:
            _lock(file)
        except BlockingIOError:
            owner = file.read().strip()
            file.close()
            raise ArgumentError(
                f"out={out} is in use{f' by process {owner}' if owner else ''}: two runs in one "
                "directory would tear each other's files; wait for it, or name another directory"
            ) from None
        except BaseException:
            file.close()
            raise
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        file.close()  # the run before removed the file between our opening and locking it
    # The number is for people; a full disk is told by what has to be written.
    with suppress(OSError):
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    return file


def _lock(file: IO[str]) -> None:
    """Take the system's lock on an open file or raise BlockingIOError."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as e:
            raise BlockingIOError(str(e)) from e
    else:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(str(e)) from e
            raise


def look(out: Path, key: dict[str, Any], restart: bool) -> bool:
    """Whether the directory holds a begun run that is gone on with; nothing is written.

    Raises :class:`ArgumentError` when it holds another run, naming the first difference, or
    anything else.
    """
    marker = out / KEY
    if not marker.exists():
        left = [p.name for p in out.iterdir() if not _passing(p.name)]
        if not left or (restart and _a_run(left)):
            return False
        hint = ""
        if _a_run(left):
            hint = "; it looks like a run without its marker: --restart (restart=True) clears it"
        raise ArgumentError(
            f"{out} is not empty and holds no run ({', '.join(sorted(left)[:4])}); name another "
            f"directory{hint}"
        )
    try:
        found = json.loads(marker.read_text())
    except ValueError as e:
        if restart:
            return False
        raise ArgumentError(f"{marker} is damaged ({e}); start anew with --restart") from e
    if restart or (isinstance(found, dict) and list(found) == [_CLEARING]):
        return False
    # through JSON once, as what was read has been
    difference = _difference(found, json.loads(json.dumps(key)))
    if difference:
        raise ArgumentError(
            f"{out} holds another run: {difference}; start anew with --restart (restart=True), "
            "or name another directory"
        )
    return True


def begin(out: Path, key: dict[str, Any], restart: bool) -> None:
    """Begin, or go on with, the run that the directory is of; raises as :func:`look` does."""
    out.mkdir(parents=True, exist_ok=True)
    kept = look(out, key, restart)
    for path in out.glob("*.tmp"):  # of a writer that was killed: no other works here
        path.unlink(missing_ok=True)
    if not kept:
        marker = out / KEY
        if any(not _passing(p.name) for p in out.iterdir()):
            write_text(marker, json.dumps({_CLEARING: "an older run; the next command ends this"}))
            _clear(out)
        write_text(marker, json.dumps(key, indent=1))
    (out / "metrics").mkdir(exist_ok=True)


def _clear(out: Path) -> None:
    """Delete all but the marker and the lock."""
    for path in sorted(out.iterdir()):
        if path.name in (KEY, LOCK):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _passing(name: str) -> bool:
    """Whether a file is a lock or what a kill left of one that was being written."""
    return name == LOCK or name.endswith(".tmp")


def _a_run(left: list[str]) -> bool:
    """Whether only a run's files are there, and one that nothing else writes is among them."""

    def among(name: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return all(among(n, _OWN + _ALSO) for n in left) and any(among(n, _OWN) for n in left)


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
