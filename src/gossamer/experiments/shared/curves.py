"""Early-stop iteration and accuracy against density, with error bars over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.analysis import against_density
from gossamer.experiments import spread

__all__ = ["density_curves", "plot_density_curves"]

_PANELS = (
    ("early_stop", 1.0, "early-stop iteration"),
    ("early_accuracy", 100.0, "test accuracy at early stop, %"),
    ("accuracy", 100.0, "test accuracy at the end, %"),
)


def density_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Way -> one entry a density, dense first: density and the spread of each figure over seeds.

    ``rows`` hold ``way``, ``round``, ``density``, ``early_stop``, ``early_accuracy`` and
    ``accuracy``, one a training; those of one way and round are put together.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        for number in sorted({row["round"] for row in mine}):
            same = [row for row in mine if row["round"] == number]
            found.setdefault(way, []).append(
                {
                    "round": number,
                    "density": sum(row["density"] for row in same) / len(same),
                    **{key: spread([row[key] for row in same]) for key, _, _ in _PANELS},
                }
            )
    return found


def plot_density_curves(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, *, title: str = ""
) -> Path:
    """Draw :func:`density_curves`, a panel a figure (:func:`gossamer.analysis.against_density`)."""
    panels = {
        label: {
            way: {p["density"]: [unit * v for v in p[key]["values"]] for p in points}
            for way, points in curves.items()
        }
        for key, unit, label in _PANELS
    }
    return against_density(panels, path, title=title)
