"""What the page says of the time that a network takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from gossamer.report import plots, words

__all__ = ["latency"]

Run = Mapping[str, Any]
Section = dict[str, Any]


def latency(run: Run) -> Section | None:
    """Milliseconds of a forward pass, two bars where two were compared."""
    found = run.get("latency")
    if not found:
        return None
    pairs: tuple[tuple[str, str], ...] = (("Dense", "dense_ms"), ("From the file", "compressed_ms"))
    if found.get("same_operations"):  # two bars would read as a comparison
        pairs = (("Before and after", "compressed_ms"),)
    slowest = max(found[key] for _, key in pairs) or 1
    rows = []
    for name, key in pairs:
        label = f"{found[key]:.3f} ms"
        rows.append((name, label, Markup(plots.bar(found[key] / slowest, label=label))))
    return {
        "said": words.speed(found),
        "note": found.get("note"),
        "engine": found.get("engine"),
        "batch": found.get("batch"),
        "pairs": found.get("pairs"),
        "rows": rows,
    }
