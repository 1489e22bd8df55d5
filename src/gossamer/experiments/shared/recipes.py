"""Where experiments keep runs of the library's own recipes, and what they tell of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from gossamer.compression import Result
from gossamer.compression.recipe import dump, load

__all__ = ["figures", "of_recipes"]


def of_recipes(folder: Path, *names: str) -> Path:
    """A folder inside, named by what these recipes say.

    Runs and finished parts of one setting of a recipe are not taken for another's.
    """
    text = "".join(dump(load(name)) for name in names)
    return folder / hashlib.sha256(text.encode()).hexdigest()[:12]


def figures(done: Result) -> dict[str, Any]:
    """Of a finished run: its file's bytes, errors in percent of test examples, stages, layers."""
    return {
        "bytes": done.bytes,
        "ratio": done.ratio,
        "error_before": 100 * done.before.error,
        "error_after": 100 * done.after.error,
        "problems": done.problems,
        "stages": done.run["stages"],
        "layers": [
            {k: row[k] for k in ("name", "shape", "density", "distinct", "codec", "bytes")}
            for row in done.run["layers"]
        ],
    }
