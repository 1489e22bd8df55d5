"""What the page says of layers that were treated after training, from inputs alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossamer.report import tables, words

__all__ = ["section"]

_BATCH_NORM = {
    True: "Batch-norm statistics were measured anew, which brought the outputs of inputs that were "
    "held back nearer.",
    False: "Batch-norm statistics stayed: measured anew they took outputs of inputs that were held "
    "back farther away.",
}


def section(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """One block an ``obs`` stage: its layers, and what was left as it is and why."""
    sizes = {str(x["name"]): x for x in run.get("layers") or []}
    blocks = []
    for stage in run.get("stages") or []:
        notes = stage.get("obs")
        if not notes:
            continue
        outside = [
            [x["name"], x["kind"], f"{x['parameters']:,}", x.get("note") or ""]
            for x in notes.get("outside") or []
        ]
        blocks.append(
            {
                "title": str(stage["stage"]),
                "examples": words.count(notes["examples"], "example"),
                "rate": None if notes.get("rate") is None else f"{notes['rate']:.3g}",
                "batch_norm": _BATCH_NORM.get(notes.get("batch_norm")),
                "head": ("Layer", "Not zero", "Bits in the file", "Bias", "Note"),
                "rows": [_row(x, sizes.get(x["name"])) for x in notes["layers"]],
                "outside": {
                    "head": ("Left as it is", "Kind", "Parameters", "Why"),
                    "rows": outside,
                }
                if outside
                else None,
            }
        )
    return {"blocks": blocks} if blocks else None


def _row(layer: Mapping[str, Any], stored: Mapping[str, Any] | None) -> list[Any]:
    bits = "–"
    if stored and stored["numel"]:
        bits = f"{8 * stored['bytes'] / stored['numel']:.2f}"
    return [
        tables.layer_name(layer),
        words.percent(layer["density"], 1),
        bits,
        "moved" if layer.get("bias") else "as it was",
        layer.get("note") or "",
    ]
