"""Write a benchmark's figures and claims in the layout of ``gossamer reproduce``."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from gossamer.experiments import Claim, commit, hardware, write_json


def record(
    name: str, about: str, began: float, claims: list[Claim], raw: dict[str, Any], path: Path | None
) -> None:
    """Print the claims; write ``path`` when one is given. ``began``: of :func:`time.time`."""
    for claim in claims:
        row = claim.as_dict()
        mark = "holds" if claim.holds else "FALLS SHORT"
        print(f"{row['id']}: {row['what']}: {row['value']:.4g} ({row['bound']}) {mark}")
    if path is not None:
        write_json(
            path,
            {
                "name": name,
                "about": about,
                "command": shlex.join(["python", *sys.argv]),
                "commit": commit(),
                "hardware": hardware(),
                "seconds": round(time.time() - began, 1),
                "seeds": [0],
                "claims": [claim.as_dict() for claim in claims],
                **raw,
            },
        )
