"""A run that kills its own process, for tests of what is resumed."""

import os
import signal
from pathlib import Path
from typing import Any

import torch

import gossamer
from gossamer import compression
from gossamer.compression.progress import Reporter
from gossamer.training import run as training


class Killing(Reporter):
    """Kills its own process at a step of a training, or at a line."""

    def __init__(self, at: list[Any] | None) -> None:
        super().__init__()
        self.at = at

    def training(self, name: str, p: Any) -> None:
        if [name, p.step] == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def say(self, line: str) -> None:
        if self.at and self.at[0] in line:
            os.kill(os.getpid(), signal.SIGKILL)


def run_until(at: list[Any] | None, given: dict[str, Any], out: Path) -> None:
    """In a process of its own: the run, killed there."""
    torch.set_num_threads(1)
    # a second a look: saves fall where they fell
    training.time.monotonic = iter(range(10**9)).__next__  # type: ignore[attr-defined]
    compression.run(gossamer.recipe.load(given), None, None, out, progress=Killing(at))
