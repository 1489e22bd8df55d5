"""What the page draws of trainings: error and loss over all epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from gossamer.report import plots, words

__all__ = ["section"]


def section(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Validation error and training loss by epoch, and the stages that they span."""
    rows = run.get("curves") or []
    errors, losses = [], []
    spans: list[tuple[str, int]] = []
    of = words.metric(run)
    counted = of.unit == "%"
    for i, row in enumerate(rows):
        score, loss = words.number(row.get("score")), row.get("train_loss")
        if score is not None:
            errors.append((i + 1, 1 - score if counted else score))
        if (shown := words.number(loss)) is not None:
            losses.append((i + 1, shown))
        stage = str(row["stage"])
        if spans and spans[-1][0] == stage:
            spans[-1] = (stage, spans[-1][1] + 1)
        else:
            spans.append((stage, 1))
    if not errors and not losses:
        return None
    ends = [0.5]
    for _, count in spans:
        ends.append(ends[-1] + count)
    x = plots.Axis(0.5, ends[-1], tuple(_epochs(len(rows))))
    made = []
    for title, points, percent in (
        ("Validation error" if counted else f"Validation {of.name}", errors, counted),
        ("Training loss", losses, False),
    ):
        if points:
            y = plots.axis([v for _, v in points], log=True, percent=percent)
            if y.log:
                title += ", logarithmic"
            last = words.percent(points[-1][1]) if percent else f"{points[-1][1]:.4g}"
            label = f"{title} over {len(rows)} epochs, {last} at the end"
            made.append(
                (title, f"{last} at the end", Markup(plots.lines(
                    points, x, y, label=label, marks=ends[1:-1]
                )))
            )  # fmt: skip
    return {
        "small": made,
        "spans": [(name, words.count(n, "epoch")) for name, n in spans],
    }


def _epochs(count: int) -> list[tuple[float, str]]:
    """Epoch ticks: whole numbers only."""
    return [
        (v, f"{v:g}") for v, _ in plots.axis([0, count], ticks=5).ticks if v >= 1 and v == int(v)
    ]
