"""Published tables and figures, one command each: ``gossamer reproduce NAME``.

An experiment is a function decorated with :func:`experiment` in a module of this package. It gets
a :class:`Context` (where to work, which seeds, how many workers), runs resumably below
``context.work``, and returns an :class:`Outcome`. :func:`run` writes ``results/NAME.json``::

    {name, command, commit, hardware, seeds, claims: [{id, what, value, bound, holds}], ...raw}

``id`` is the specification page and the number of its point (``deep-compression.1``); ``holds``
is computed from value and bound, never written by hand; a point that falls short stays in the
file with ``holds: false``.
"""

from __future__ import annotations

import importlib
import json
import operator
import os
import pkgutil
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from gossamer.core import machine
from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.core.files import write_text

__all__ = [
    "Claim",
    "Context",
    "Outcome",
    "commit",
    "experiment",
    "hardware",
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
class Outcome:
    """What an experiment returns: its claims, and every raw figure behind them."""

    claims: list[Claim]
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What an experiment is given.

    Attributes:
        work: directory for run directories and checkpoints; a restart resumes from it.
        seeds: the seeds to run.
        quick: a smoke run (tiny subsets); its results are never written to ``results/``.
        workers: processes side by side, one thread each.
        say: prints a progress line.
    """

    work: Path
    seeds: tuple[int, ...]
    quick: bool = False
    workers: int = 1
    say: Callable[[str], None] = print

    def map(self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
        """``[function(*job) for job in jobs]``, side by side, one torch thread in each process.

        ``function`` must be importable (module level). A job that fails stops the rest and its
        error is raised; finished jobs have left their checkpoints, so a restart is cheap.
        """
        if self.workers <= 1:
            return [function(*job) for job in jobs]
        with ProcessPoolExecutor(
            self.workers, mp_context=get_context("spawn"), initializer=_one_thread
        ) as pool:
            futures = [pool.submit(function, *job) for job in jobs]
            return [f.result() for f in futures]


def _one_thread() -> None:
    # Two busy processes with two threads each on two cores can be tens of times slower.
    torch.set_num_threads(1)


Experiment = Callable[[Context], Outcome]
_REGISTRY: dict[str, tuple[Experiment, str, tuple[int, ...]]] = {}


def experiment(
    name: str, *, seeds: Sequence[int] = (0, 1, 2)
) -> Callable[[Experiment], Experiment]:
    """Register an experiment by name; its docstring's first line describes it."""

    def register(function: Experiment) -> Experiment:
        if name in _REGISTRY:
            raise ArgumentError(f"experiment {name!r} is registered twice")
        summary = (function.__doc__ or name).strip().splitlines()[0]
        _REGISTRY[name] = (function, summary, tuple(seeds))
        return function

    return register


def _load() -> None:
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)


def names() -> list[tuple[str, str]]:
    """``(name, one line)`` of every experiment, sorted."""
    _load()
    return sorted((name, entry[1]) for name, entry in _REGISTRY.items())


def hardware() -> dict[str, Any]:
    """Processor, cores, memory (bytes), accelerator and versions of this machine."""
    return {
        "cpu": machine.cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": machine.memory(),
        "gpu": machine.gpu(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """The source's commit; ``+dirty`` when tracked source differs from it."""
    root = Path(__file__).resolve().parents[3]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        if head.returncode:
            return "unknown"
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", "src", "native"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("+dirty" if dirty.stdout.strip() else "")


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


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON atomically."""
    # numpy scalars become plain numbers
    text = json.dumps(data, indent=1, default=lambda value: value.item())
    write_text(path, text + "\n")


def run(
    name: str,
    *,
    out: str | Path = "results",
    seeds: int | Sequence[int] | None = None,
    quick: bool = False,
    workers: int | None = None,
    work: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Run one experiment and write ``out/NAME.json``; killed, it resumes where it was.

    Args:
        name: an experiment's name (:func:`names`).
        out: directory of the results file.
        seeds: how many seeds, or which; the experiment's own when not given.
        quick: a smoke run that proves the path, not the claim; writes ``NAME.quick.json``.
        workers: processes side by side with one thread each; the number of cores when not given.
        work: directory for checkpoints, default ``runs/reproduce/NAME``.
        say: receives progress lines.

    Raises :class:`ArgumentError` for an unknown name or no seeds.
    """
    _load()
    if name not in _REGISTRY:
        raise ArgumentError(
            f"experiment {name!r} does not exist; there are: {', '.join(sorted(_REGISTRY))}"
        )
    function, summary, default = _REGISTRY[name]
    if seeds is None:
        chosen = default
    else:
        chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen:
        raise ArgumentError("seeds is empty; give at least one")
    suffix = ".quick" if quick else ""
    directory = Path(work) if work else Path("runs/reproduce") / (name + suffix)
    directory.mkdir(parents=True, exist_ok=True)
    context = Context(directory, chosen, quick, workers or os.cpu_count() or 1, say)
    started = time.time()
    outcome = function(context)
    if not outcome.claims and not outcome.raw:
        raise GossamerError(f"experiment {name!r} returned nothing")
    command = f"gossamer reproduce {name}" + (" --quick" if quick else "")
    path = Path(out) / f"{name}{suffix}.json"
    write_json(
        path,
        {
            "name": name,
            "about": summary,
            "command": command,
            "commit": commit(),
            "hardware": hardware(),
            "python": sys.version.split()[0],
            "seconds": round(time.time() - started, 1),
            "seeds": list(chosen),
            "claims": [claim.as_dict() for claim in outcome.claims],
            **outcome.raw,
        },
    )
    for claim in outcome.claims:
        row = claim.as_dict()
        mark = "holds" if claim.holds else "FALLS SHORT"
        say(f"{row['id']}: {row['what']}: {row['value']:.6g} ({row['bound']}) {mark}")
    return path
