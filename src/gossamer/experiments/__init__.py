"""Published tables and figures, one command each: ``gossamer reproduce NAME``.

An experiment is a function decorated with :func:`experiment` in a module of this package. It gets
a :class:`Context` (where to work, which seeds, how many workers), does its work in parts that a
restart finds again (:meth:`Context.map`), and returns its raw figures; what they show is judged by
a pure function of them, now or another day. :func:`run` writes ``results/NAME.json``::

    {name, command, commit, hardware, seconds, wall, seeds, parts: [{job, seconds}],
     claims: [{id, what, value, bound, holds}], ...raw}

``id`` is the specification page and the number of its point (``deep-compression.1``); ``holds``
is computed from value and bound, never written by hand; a point that falls short stays in the
file with ``holds: false``. A claim is what could have come out otherwise: a picture's size or a
count of what was run is a raw figure. ``seconds`` is the sum of the parts' (see
:mod:`gossamer.experiments.parts`) and of the rest of this call; ``wall`` is this call alone. Where
several commits made the parts, ``commits`` names them, the earliest first. :func:`judge` judges a
file's raw figures again, and names the commit that did in ``judged``.
"""

from __future__ import annotations

import importlib
import json
import operator
import os
import pkgutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.experiments.parts import Part, run_parts, source, summary
from gossamer.experiments.record import commit, hardware, write_json

__all__ = [
    "Claim",
    "Context",
    "commit",
    "experiment",
    "hardware",
    "judge",
    "names",
    "run",
    "spread",
    "write_json",
]

T = TypeVar("T")

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}


@dataclass(frozen=True)
class Claim:
    """One point of a specification page: a measured value against its bound.

    >>> Claim("deep-compression.1", "LeNet-300-100 file, KB", 24.5, "<=", 27.0).holds
    True
    """

    id: str
    what: str
    value: float
    relation: str
    limit: float

    def __post_init__(self) -> None:
        """Refuse an unknown relation."""
        if self.relation not in _COMPARE:
            raise ArgumentError(f"relation {self.relation!r} is not one of {', '.join(_COMPARE)}")

    @property
    def holds(self) -> bool:
        """Whether the value meets its bound; NaN never does."""
        return bool(_COMPARE[self.relation](self.value, self.limit))

    def as_dict(self) -> dict[str, Any]:
        """The layout of the results file."""
        return {
            "id": self.id,
            "what": self.what,
            "value": float(self.value),
            "bound": f"{self.relation} {self.limit:g}",
            "holds": self.holds,
        }


@dataclass
class _Ledger:
    """The parts of a run so far, and the seconds of this call that passed inside them."""

    parts: list[Part] = field(default_factory=list)
    inside: float = 0.0


@dataclass(frozen=True)
class Context:
    """What an experiment is given.

    Attributes:
        work: directory for parts and checkpoints; a restart resumes from it.
        seeds: the seeds to run.
        quick: a smoke run (tiny subsets); its results are never written to ``results/``.
        workers: processes side by side, one thread each.
        say: prints a progress line.
        executor: where parts run instead of in local processes.
    """

    work: Path
    seeds: tuple[int, ...]
    quick: bool = False
    workers: int = 1
    say: Callable[[str], None] = print
    executor: Executor | None = None
    ledger: _Ledger = field(default_factory=_Ledger, repr=False)

    def beside(self, name: str, module: str) -> Path:
        """The work folder of another experiment, or one that several share, beside this one's.

        It is named by the source of the module that fills it: what an earlier one made there is
        not taken for this one's.
        """
        return self.work.parent / _folder(name, module, self.quick)

    def map(self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
        """``[function(*job) for job in jobs]``, side by side, one torch thread in each.

        Finished parts are read from ``work`` (:mod:`gossamer.experiments.parts`: what tells one
        part from another, and what may be an argument and a result). ``function`` must be a
        module's. A job that fails stops the rest and its error is raised.
        """
        began = time.monotonic()
        with self._pool(len(jobs)) as pool:
            parts = run_parts(function, jobs, work=self.work, quick=self.quick, executor=pool)
        known = {part.key for part in self.ledger.parts}
        self.ledger.parts += {p.key: p for p in parts if p.key not in known}.values()
        self.ledger.inside += time.monotonic() - began
        return [part.result for part in parts]

    def alone(self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
        """As :meth:`map`, one after the other: what is timed, or starts many processes itself."""
        return [self.map(function, [job])[0] for job in jobs]

    def _pool(self, jobs: int) -> AbstractContextManager[Executor | None]:
        if self.executor is not None or self.workers <= 1 or not jobs:
            return nullcontext(self.executor)
        return ProcessPoolExecutor(
            min(self.workers, jobs),
            mp_context=get_context("spawn"),
            initializer=_follow,
            initargs=(os.getpid(),),
        )


def _follow(parent: int) -> None:
    """End this process when its parent has ended: a killed one cannot tell it to."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _folder(name: str, module: str, quick: bool) -> str:
    return f"{name}{'.quick' if quick else ''}-{source(module)[:12]}"


Judge = Callable[[Mapping[str, Any]], list[Claim]]
"""Raw figures, as they are in the results file, to claims."""
Experiment = Callable[[Context], dict[str, Any]]


@dataclass(frozen=True)
class _Entry:
    function: Experiment
    about: str
    seeds: tuple[int, ...]
    judge: Judge


_REGISTRY: dict[str, _Entry] = {}


def experiment(
    name: str, *, judge: Judge, seeds: Sequence[int] = (0, 1, 2)
) -> Callable[[Experiment], Experiment]:
    """Register an experiment by name; its docstring's first line describes it.

    The function returns raw figures; the claims are the judge's, of the figures alone.
    """

    def register(function: Experiment) -> Experiment:
        if name in _REGISTRY:
            raise ArgumentError(f"experiment {name!r} is registered twice")
        about = (function.__doc__ or name).strip().splitlines()[0]
        _REGISTRY[name] = _Entry(function, about, tuple(seeds), judge)
        return function

    return register


def _load() -> None:
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)


def _entry(name: str) -> _Entry:
    _load()
    if name not in _REGISTRY:
        raise ArgumentError(
            f"experiment {name!r} does not exist; there are: {', '.join(sorted(_REGISTRY))}"
        )
    return _REGISTRY[name]


def names() -> list[tuple[str, str]]:
    """``(name, one line)`` of every experiment, sorted."""
    _load()
    return sorted((name, entry.about) for name, entry in _REGISTRY.items())


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation, extremes and n of figures over seeds.

    >>> spread([1.0, 3.0])
    {'mean': 2.0, 'std': 1.4142135623730951, 'min': 1.0, 'max': 3.0, 'n': 2, 'values': [1.0, 3.0]}
    """
    n = len(values)
    if not n:
        raise ArgumentError("spread() of no values; give at least one seed")
    mean = sum(values) / n
    std = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5 if n > 1 else 0.0
    return {
        "mean": mean,
        "std": std,
        "min": min(values),
        "max": max(values),
        "n": n,
        "values": list(values),
    }


def run(
    name: str,
    *,
    out: str | Path = "results",
    seeds: int | Sequence[int] | None = None,
    quick: bool = False,
    workers: int | None = None,
    work: str | Path | None = None,
    executor: Executor | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Run one experiment and write ``out/NAME.json``; killed, it resumes where it was.

    Args:
        name: an experiment's name (:func:`names`).
        out: directory of the results file.
        seeds: how many seeds, or which; the experiment's own when not given.
        quick: a smoke run that proves the path, not the claim; writes ``NAME.quick.json``.
        workers: processes side by side with one thread each; the number of cores when not given.
        work: where the folder of parts and checkpoints is made, default ``runs/reproduce``; the
            folder is called by the experiment's name and a hash of its source.
        executor: runs the parts instead of local processes; any of :mod:`concurrent.futures`.
        say: receives progress lines.

    Raises :class:`ArgumentError` for an unknown name or no seeds.
    """
    entry = _entry(name)
    if seeds is None:
        chosen = entry.seeds
    else:
        chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen:
        raise ArgumentError("seeds is empty; give at least one")
    suffix = ".quick" if quick else ""
    folder = _folder(name, entry.function.__module__, quick)
    directory = (Path(work or "runs/reproduce") / folder).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    context = Context(directory, chosen, quick, workers or os.cpu_count() or 1, say, executor)
    began = time.monotonic()
    raw = entry.function(context)
    wall = time.monotonic() - began
    if not raw:
        raise GossamerError(f"experiment {name!r} returned nothing")
    if clash := sorted(_HEAD & raw.keys()):
        raise GossamerError(f"experiment {name!r} has raw figures of the names {clash}; rename")
    head, here, parts = commit(), hardware(), context.ledger.parts
    commits = list(dict.fromkeys([*(c for part in parts for c in part.commits), head]))
    data = {
        "name": name,
        "about": entry.about,
        "command": f"gossamer reproduce {name}" + (" --quick" if quick else ""),
        "commit": head,
        **({"commits": commits} if len(commits) > 1 else {}),
        "hardware": here,
        "python": sys.version.split()[0],
        "seconds": round(
            sum(part.seconds for part in parts) + max(0.0, wall - context.ledger.inside), 1
        ),
        "wall": round(wall, 1),
        "seeds": list(chosen),
        "parts": summary(parts, head, here),
        "claims": [],
        **raw,
    }
    path = Path(out) / f"{name}{suffix}.json"
    write_json(path, data)
    # of the file's figures, not of those in memory: another day's judgement is then the same
    return _judged(entry.judge, path, say)


_HEAD = {
    *("name", "about", "command", "commit", "commits", "hardware", "python", "seconds", "wall"),
    *("seeds", "parts", "judged", "claims"),
}


def judge(
    name: str,
    *,
    out: str | Path = "results",
    quick: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Judge the raw figures of ``out/NAME.json`` again; nothing is run.

    Raises :class:`ArgumentError` for an unknown name or no such file; :class:`GossamerError` where
    the file lacks a figure. The file is then as it was.
    """
    entry = _entry(name)
    path = Path(out) / f"{name}{'.quick' if quick else ''}.json"
    if not path.is_file():
        raise ArgumentError(f"there is no {path}; gossamer reproduce {name} makes it")
    return _judged(entry.judge, path, say, mark=True)


def _judged(judge: Judge, path: Path, say: Callable[[str], None], *, mark: bool = False) -> Path:
    data = json.loads(path.read_text())
    raw = {key: value for key, value in data.items() if key not in _HEAD}
    try:
        data["claims"] = [claim.as_dict() for claim in judge(raw)]
    except LookupError as e:
        raise GossamerError(
            f"{path} lacks the figure {e} that its claims are computed from; "
            f"{data['command']} measures it"
        ) from e
    if mark:
        claims = data.pop("claims")
        head = {key: value for key, value in data.items() if key in _HEAD}
        data = {**head, "judged": commit(), "claims": claims, **raw}
    write_json(path, data)
    for row in data["claims"]:
        verdict = "holds" if row["holds"] else "FALLS SHORT"
        say(f"{row['id']}: {row['what']}: {row['value']:.6g} ({row['bound']}) {verdict}")
    return path
