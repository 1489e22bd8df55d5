"""Where experiments keep runs of the library's own recipes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gossamer.compression.recipe import dump, load

__all__ = ["of_recipes"]


def of_recipes(folder: Path, *names: str) -> Path:
    """A folder inside, named by what these recipes say.

    Runs and finished parts of one setting of a recipe are not taken for another's.
    """
    text = "".join(dump(load(name)) for name in names)
    return folder / hashlib.sha256(text.encode()).hexdigest()[:12]
