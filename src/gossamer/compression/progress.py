"""What a long command says while it works: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from gossamer.training import Progress

__all__ = ["Lines", "Reporter", "console", "shown"]

_EVERY = 5.0  # seconds between two lines about one piece of work


class Reporter:
    """Silent; the base of the others, and what to subclass for a display of one's own."""

    def __enter__(self) -> Self:
        """Begin to show."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Clear what is shown."""

    def say(self, line: str) -> None:
        """A line that stays."""

    def count(self, name: str, done: int, total: int, figures: str = "") -> None:
        """Piece of work ``name`` stands at ``done`` of ``total``."""

    def training(self, name: str, p: Progress) -> None:
        """A training run's progress, as :func:`gossamer.training.train` tells it."""
        figures = f"epoch {p.epoch}/{p.epochs}, loss {p.loss:.4f}"
        found = (p.row or {}).get("validation_score", (p.row or {}).get("validation_accuracy"))
        if found is not None:
            figures += f", validation {found:.4f}"
        self.count(name, p.step, p.steps, figures)


class Lines(Reporter):
    """Plain lines, at most one in five seconds for each piece of work."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file or sys.stderr
        self._told: dict[str, float] = {}

    def say(self, line: str) -> None:
        """Print the line."""
        print(line, file=self.file, flush=True)

    def count(self, name: str, done: int, total: int, figures: str = "") -> None:
        """Print where the work stands, unless that was done just now."""
        now = time.monotonic()
        if now - self._told.setdefault(name, now) >= _EVERY:
            self._told[name] = now
            self.say(f"  {name}: {done}/{total}" + (f", {figures}" if figures else ""))


class _Bars(Reporter):
    """A bar for each piece of work, gone when it is done."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def count(self, name: str, done: int, total: int, figures: str = "") -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=total, figures=figures)
        self.bars.update(self.tasks[name], completed=done, total=total, figures=figures)
        if done >= total:
            self.bars.remove_task(self.tasks.pop(name))


def console() -> Reporter:
    """Bars where standard error is a terminal, else plain lines."""
    return _Bars() if sys.stderr.isatty() else Lines()


@contextmanager
def shown(wanted: Reporter | bool | None) -> Iterator[Reporter]:
    """Who is told of a call from Python.

    None: a terminal gets bars and a notebook lines, and nobody is told elsewhere (a script whose
    output goes to a file, a test). True: :func:`console`, False: nobody. A reporter is used as it
    is, begun and ended by its owner.
    """
    if isinstance(wanted, Reporter):
        yield wanted
        return
    if wanted is None and _notebook():
        made: Reporter = Lines(sys.stdout)
    elif wanted or (wanted is None and sys.stderr is not None and sys.stderr.isatty()):
        made = console()
    else:
        made = Reporter()
    with made as reporter:
        yield reporter


def _notebook() -> bool:
    """Whether the code runs in the kernel of a notebook; nothing is imported to find out."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"
