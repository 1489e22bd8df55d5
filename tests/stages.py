"""What tests of recipe stages share."""

import copy
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import gossamer
from gossamer import datasets
from gossamer.compression import door
from gossamer.compression.job import Job
from gossamer.compression.progress import Reporter
from gossamer.core.errors import RecipeError
from gossamer.training.tasks import Classification

HEAD = "name: t\nstages:\n"


class Stop(Exception):
    """What a killed run ends with."""


class Killed(Reporter):
    """Raises at the n-th word of a training."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def training(self, name: str, progress: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stop


def job(
    given: list[dict[str, Any]], model: nn.Module, out: Path, progress: Reporter | None = None
) -> Job:
    """A begun run of some stages on a copy of a network, on digits, then packed and evaluated."""
    recipe = {
        "name": "t",
        "max_drop": 1,
        "stages": [*given, "pack", {"evaluate": {"latency": False}}],
    }
    plan = gossamer.recipe.load(recipe)
    data = datasets.load("digits")
    made = Job(
        plan, copy.deepcopy(model), data, Classification(), out, {}, None, progress or Reporter()
    )
    made.begin(False)
    return made


def mistaken(text: str, parts: list[str]) -> None:
    """A recipe of one stage is refused in words that hold all parts."""
    with pytest.raises(RecipeError) as caught:
        gossamer.recipe.parse(f"{HEAD}  - {text}", "mine.yaml")
    for part in parts:
        assert part in str(caught.value)


def unfit(text: str, told: str, model: nn.Module) -> None:
    """A recipe of one stage, on line 3, is refused for a network before any work."""
    plan = gossamer.recipe.parse(f"{HEAD}  - {text}", "mine.yaml")
    with pytest.raises(RecipeError, match=told) as caught:
        door.check_patterns(plan, model)
    assert "mine.yaml, line 3" in str(caught.value)
