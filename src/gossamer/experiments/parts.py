"""The parts of an experiment: each is done once, anywhere, and says what made it.

A part is one call of a function of a module, ``function(*job)``. Finished, it lies below the work
folder as ``parts/KEY.json`` (``KEY.pt``, which ``torch.load(weights_only=True)`` reads, where JSON
would change the result), with the seconds, commits and machine that made it.

**In the key**: the function's module and name; the job's arguments, paths relative to the folder
above the work folder; whether the run is quick; the source of the function's module and of those
modules of :mod:`gossamer.experiments` that it imports, in turn.
**Not in the key**: the source of the rest of the library (the commit is recorded instead), the
versions of torch and Python, the machine, the contents of data files. Checkpoints lie in folders
that are named by the same source (:func:`gossamer.experiments.run`), so a changed experiment
starts anew.

**Seconds** are those of every session that worked on this part, killed ones included: a session
writes down every five seconds how long it has worked. What another experiment's part left in a
shared folder counts there.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import inspect
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gossamer.core.errors import ArgumentError, FormatError
from gossamer.experiments.record import commit, hardware, write_json
from gossamer.training.checkpoints import load_checkpoint, save_atomic

__all__ = ["Part", "run_parts", "source", "summary"]

_BEAT = 5.0  # seconds between two notes of a session's length
_PACKAGE = "gossamer.experiments."
_RUNNER = (__name__, "gossamer.experiments.record")  # shape no result


@dataclass(frozen=True)
class Part:
    """One finished call.

    Attributes:
        job: the function's name and its arguments but paths, in short.
        key: what tells it from every other part of the run.
        seconds: of all sessions that worked on it.
        commits: of those sessions, the earliest first.
        hardware: the machine that finished it.
    """

    job: str
    key: str
    result: Any
    seconds: float
    commits: tuple[str, ...]
    hardware: dict[str, Any]


def run_parts(
    function: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    *,
    work: Path,
    quick: bool,
    executor: Executor | None,
) -> list[Part]:
    """``function(*job)`` for every job, those that are finished read from ``work``.

    Without an executor they run here, one after another. A job that fails stops the rest, and its
    error is raised; what was finished stays. An executor's workers need the library, and the work
    folder under the same path where they are to share checkpoints with each other.

    Raises :class:`ArgumentError` for a function that is no module's, for an argument that cannot
    be written down, and for a result that neither JSON nor a checkpoint can hold.
    """
    folder = work / "parts"
    named = [_Named.of(function, job, work, quick) for job in jobs]
    found = {n.key: _read(folder, n) for n in named}
    left = {n.key: (n, job) for n, job in zip(named, jobs, strict=True) if found[n.key] is None}
    if executor is None:
        for n, job in left.values():
            found[n.key] = _write(folder, n, _session(function, job, folder / n.notes))
    else:
        futures: dict[Future[dict[str, Any]], _Named] = {}
        try:
            for n, job in left.values():
                futures[executor.submit(_session, function, job, folder / n.notes)] = n
            for future in as_completed(futures):
                n = futures[future]
                found[n.key] = _write(folder, n, future.result())
        finally:
            for future in futures:
                future.cancel()
    return [part for n in named if (part := found[n.key]) is not None]


def summary(parts: Sequence[Part], head: str, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a part for the results file: job and seconds, and what differs from the head's."""
    labels = [part.job for part in parts]
    rows = []
    for part in parts:
        row: dict[str, Any] = {"job": part.job, "seconds": round(part.seconds, 1)}
        if labels.count(part.job) > 1:
            row["key"] = part.key[:8]
        if part.commits != (head,):
            row["commits"] = list(part.commits)
        other = {k: v for k, v in part.hardware.items() if machine.get(k) != v}
        if other:
            row["hardware"] = other
        rows.append(row)
    return rows


def _session(function: Callable[..., Any], job: tuple[Any, ...], notes: Path) -> dict[str, Any]:
    # Two busy processes with two threads each on two cores can be tens of times slower; and the
    # bits of a sum depend on how many threads share it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _noted(notes) as sessions:
            result = function(*job)
    finally:
        torch.set_num_threads(threads)
    return {
        "seconds": sum(row["seconds"] for row in sessions),
        "commits": list(dict.fromkeys(row["commit"] for row in sessions)),
        "hardware": hardware(),
        "result": result,
    }


@contextlib.contextmanager
def _noted(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The sessions of a part so far; the block's is the last, its length noted as it grows."""
    sessions = json.loads(path.read_text())["sessions"] if path.exists() else []
    mine = {"commit": commit(), "seconds": 0.0}
    sessions.append(mine)
    write_json(path, {"sessions": sessions})
    began, over = time.monotonic(), threading.Event()

    def note() -> None:
        mine["seconds"] = time.monotonic() - began
        write_json(path, {"sessions": sessions})

    def beat() -> None:
        while not over.wait(_BEAT):
            note()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield sessions
    finally:
        over.set()
        thread.join()
        note()


@dataclass(frozen=True)
class _Named:
    """What a part is called: in short, by its key, and where its sessions are noted."""

    job: str
    key: str

    @property
    def notes(self) -> str:
        return f"{self.key}.sessions.json"

    @classmethod
    def of(
        cls, function: Callable[..., Any], job: tuple[Any, ...], work: Path, quick: bool
    ) -> _Named:
        name = getattr(function, "__qualname__", "<")
        if "<" in name:  # a lambda or a function within another
            raise ArgumentError(
                f"function {function!r} is no function of a module; define it there"
            )
        what = {
            "function": f"{function.__module__}.{name}",
            "job": [_plain(value, work) for value in job],
            "quick": quick,
            "source": source(function.__module__),
        }
        short = " ".join([function.__name__, *(t for t in map(_short, job) if t)])
        return cls(short, hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24])


def _write(folder: Path, named: _Named, made: dict[str, Any]) -> Part:
    folder.mkdir(parents=True, exist_ok=True)
    data = {"job": named.job, **made}
    if _same(data["result"]):
        write_json(folder / f"{named.key}.json", data)
    else:
        path = folder / f"{named.key}.pt"
        save_atomic(data, path)
        try:
            load_checkpoint(path)
        except FormatError as e:
            path.unlink()
            raise ArgumentError(
                f"the result of {named.job} cannot be kept; return numbers, strings, lists, "
                "tuples, dicts and tensors"
            ) from e
    part = _read(folder, named)  # a fresh part and one of an earlier session are the same
    assert part is not None  # just written
    return part


def _same(value: Any) -> bool:
    """Whether JSON gives the value back: no tuples, no keys but strings, no NaN, no tensors."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RuntimeError):
        return False


def _read(folder: Path, named: _Named) -> Part | None:
    if (path := folder / f"{named.key}.json").exists():
        data = json.loads(path.read_text())
    elif (path := folder / f"{named.key}.pt").exists():
        data = load_checkpoint(path)
    else:
        return None
    commits = tuple(data["commits"])
    return Part(named.job, named.key, data["result"], data["seconds"], commits, data["hardware"])


def _plain(value: Any, work: Path) -> Any:
    """An argument as JSON that tells it from every other."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        above = work.resolve().parent
        path = value.resolve()
        return {"path": str(path.relative_to(above)) if path.is_relative_to(above) else str(path)}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_plain(v, work) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(k, work), _plain(v, work)] for k, v in value.items()]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {type(value).__qualname__: {k: _plain(v, work) for k, v in fields.items()}}
    if inspect.isfunction(value) and "<" not in value.__qualname__:
        return {"function": f"{value.__module__}.{value.__qualname__}"}
    raise ArgumentError(
        f"job argument {value!r} of type {type(value).__name__} cannot be written down; give "
        "numbers, strings, paths, lists, dicts, dataclasses and functions of a module"
    )


def source(module: str) -> str:
    """SHA-256 of a module's source and of the experiments' modules it imports, in turn."""
    waiting: list[str] = [module]
    seen: dict[str, bytes] = {}
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        path = getattr(sys.modules[name], "__file__", None)
        if path is None:
            raise ArgumentError(f"module {name!r} has no file; write its functions in one")
        seen[name] = Path(path).read_bytes()
        for node in ast.walk(ast.parse(seen[name])):
            if isinstance(node, ast.ImportFrom) and node.module:
                named = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Import):
                named = [a.name for a in node.names]
            else:
                continue
            waiting += [
                n for n in named if n.startswith(_PACKAGE) and n in sys.modules and n not in _RUNNER
            ]
    digest = hashlib.sha256()
    for name, source in sorted(seen.items()):
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def _short(value: Any) -> str:
    if isinstance(value, (Path, bool)):
        return ""
    if isinstance(value, (list, tuple)):
        return ",".join(filter(None, map(_short, value)))
    if isinstance(value, (str, int, float)):
        return str(value)
    return str(getattr(value, "name", ""))
