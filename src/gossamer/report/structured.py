"""What the page says of groups: what a lasso left of each layer's matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossamer.report import words
from gossamer.report.fewbits import ends, noted

__all__ = ["groups"]

_HEAD = ("Layer", "Groups left", "Rows left", "Columns left", "Not zero", "Multiplications left")


def groups(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Groups, rows and columns that are left, a block a stage."""
    blocks = []
    for stage, notes in noted(run, "group_lasso"):
        rows = []
        for x in notes["layers"]:
            layer = x["name"].removesuffix(".weight")
            of = [
                f"{g['left']:,} of {g['groups']:,} ({g['kind']})"
                for g in notes["groups"]
                if g["layer"] == layer
            ]
            used = x.get("multiplications")
            rows.append(
                [
                    x["name"],
                    ", ".join(of),
                    *(f"{x[side][1]:,} of {x[side][0]:,}" for side in ("rows", "columns")),
                    words.percent(x["density"], 1),
                    words.percent(used[1] / used[0], 1) if used else "",
                ]
            )
        last = notes.get("finetune") or notes["lasso"]
        blocks.append({"title": stage, "epochs": ends(run, last), "head": _HEAD, "rows": rows})
    return {"blocks": blocks} if blocks else None
