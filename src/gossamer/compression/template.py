"""Fresh processes without the seconds that their imports take.

A *template* is a process that has imported what :mod:`gossamer.compression.fresh` needs and
nothing else: no module, tensor or thread of whoever asks. Each job is a fork of it, with the
asker's arguments, environment, folder and import path. One template serves a process until that
ends; on other systems than Linux, where forks are not safe, each job starts an interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["run", "serve"]

_MODULE = "gossamer.compression.fresh"
_SERVES = f"import {_MODULE} as job; job.template.serve(job.main, job.__file__)"
_FORKS = sys.platform == "linux"
_LOCK = threading.Lock()
_template: _Template | None = None


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """``python -m gossamer.compression.fresh ARGUMENTS`` in a process that knows nothing of this.

    Modules are looked for where this process looks. Interrupted, the process is killed first.
    """
    global _template
    places = [p for p in sys.path if p]
    if _FORKS:
        with _LOCK:
            key = (os.getpid(), sys.executable, tuple(places))
            if _template is None or _template.key != key:
                _close()
                with contextlib.suppress(OSError):  # no process to be had: as elsewhere
                    _template = _Template(key)
            if _template is not None:
                try:
                    done = _template.run(arguments, places)
                except BaseException:
                    _close()
                    raise
                if done is not None:
                    return done
                _close()  # it was killed: the job, if begun, has changed nothing
    return subprocess.run(
        [sys.executable, "-m", _MODULE, *arguments],
        capture_output=True,
        text=True,
        env=_environment(places),
    )


def _environment(places: Sequence[str]) -> dict[str, str]:
    """The user's own modules are importable there if they are here."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def _close() -> None:
    global _template
    if _template is not None:
        _template.close()
    _template = None


atexit.register(_close)


class _Template:
    """The process to fork, and how it is asked."""

    def __init__(self, key: tuple[Any, ...]) -> None:
        self.key = key
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(key[-1]),
            text=True,
            start_new_session=True,  # Ctrl-C comes from here alone
        )

    def run(
        self, arguments: Sequence[str], places: Sequence[str]
    ) -> subprocess.CompletedProcess[str] | None:
        """A job; None where the template is gone."""
        assert self.process.stdin is not None  # both are pipes
        assert self.process.stdout is not None
        with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
            job = {
                "arguments": list(arguments),
                "environment": _environment(places),
                "folder": str(Path.cwd()),
                "places": list(places),
                "output": folder,
            }
            try:
                self.process.stdin.write(json.dumps(job) + "\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except (OSError, ValueError):  # closed: it was killed
                return None
            if not answer.endswith("\n"):
                return None
            told = [Path(folder, name).read_text(errors="replace") for name in ("out", "err")]
        return subprocess.CompletedProcess(list(arguments), int(answer), *told)

    def close(self) -> None:
        """End it, and a job of its that still runs."""
        if self.key[0] != os.getpid():  # a fork's copy of its parent's
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def serve(main: Callable[[], None], file: str) -> None:
    """Fork for each line of standard input, until it ends; answer with the exit status.

    ``main``: the job, as a program: it reads its arguments. ``file``: its name.
    """
    # the pipes are this process's alone: jobs have no input, and their output is files
    asked = os.fdopen(os.dup(0), "r")
    answers = os.fdopen(os.dup(1), "w")
    for line in asked:
        job = json.loads(line)
        child = os.fork()
        if not child:
            _become(job, main, file)
        _, status = os.waitpid(child, 0)
        try:
            answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
            answers.flush()
        except BrokenPipeError:
            return


def _become(job: dict[str, Any], main: Callable[[], None], name: str) -> None:
    """Be the process of a job, and end."""
    status = 1
    try:
        for number, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, f"{job['output']}/out", os.O_WRONLY | os.O_CREAT),
            (2, f"{job['output']}/err", os.O_WRONLY | os.O_CREAT),
        ):
            opened = os.open(path, flags, 0o600)
            os.dup2(opened, number)
            os.close(opened)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        own = [p for p in sys.path if p not in job["places"]]
        sys.path[:] = [job["folder"], *job["places"], *own]
        sys.argv = [name, *job["arguments"]]
        main()
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)
