"""What tests of recipe stages share."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

import gossamer
from gossamer import datasets
from gossamer.pipeline.run import _Job
from gossamer.progress import Reporter


def job(
    given: list[dict[str, Any]], model: nn.Module, out: Path, progress: Reporter | None = None
) -> _Job:
    """A begun run of some stages on a copy of a network, on digits, then packed and evaluated."""
    recipe = {"name": "t", "stages": [*given, "pack", {"evaluate": {"latency": False}}]}
    plan = gossamer.recipe.load(recipe)
    data = datasets.load("digits")
    made = _Job(plan, copy.deepcopy(model), data, out, {}, None, progress or Reporter())
    made.begin(False)
    return made
