"""The low-rank experiments in small."""

import json
from pathlib import Path
from typing import Any

from gossamer import experiments


def quickly(name: str, tmp_path: Path) -> dict[str, Any]:
    path = experiments.run(
        name, out=tmp_path, work=tmp_path / "w", seeds=1, quick=True, workers=1, say=print
    )
    data: dict[str, Any] = json.loads(path.read_text())
    return data
