"""What a run's page says of units that were taken out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["shrink"]


def shrink(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Shapes before and after, and what stayed and why, a block a stage."""
    blocks = []
    for stage in run.get("stages") or []:
        notes = stage.get("shrink")
        if not notes:
            continue
        before, after = notes["parameters"]
        blocks.append(
            {
                "title": str(stage["stage"]),
                "text": f"{before:,} parameters became {after:,}; outputs on a batch differ by "
                f"{notes['difference']:.1e} of the largest.",
                "head": ("Tensor", "Before", "After"),
                "rows": [
                    [x["name"], _shape(x["before"]), _shape(x["after"])] for x in notes["layers"]
                ],
                "stays": [str(one) for one in notes["stays"]],
            }
        )
    return {"blocks": blocks} if blocks else None


def _shape(sizes: list[int]) -> str:
    return " x ".join(f"{int(s):,}" for s in sizes) or "none"
