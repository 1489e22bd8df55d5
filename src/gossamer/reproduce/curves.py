"""Early-stop iteration and accuracy against density, with error bars over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.errors import ArgumentError
from gossamer.reproduce import spread

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
    """Draw :func:`density_curves`: mean, and bars from the lowest to the highest seed.

    The suffix of ``path`` decides the format (PNG, SVG, PDF).

    Raises :class:`ArgumentError` when there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not any(curves.values()):
        raise ArgumentError("curves is empty: no density to draw")
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, unit, label) in zip(figure.subplots(1, 3), _PANELS, strict=True):
        for way, points in curves.items():
            mean = [unit * p[key]["mean"] for p in points]
            low = [unit * (p[key]["mean"] - p[key]["min"]) for p in points]
            high = [unit * (p[key]["max"] - p[key]["mean"]) for p in points]
            axes.errorbar(
                [100 * p["density"] for p in points],
                mean,
                yerr=[low, high],
                label=way,
                capsize=2,
                marker=".",
                linewidth=1,
            )
        axes.set(xscale="log", xlabel="weights kept, %", ylabel=label)
        axes.invert_xaxis()
    figure.axes[0].legend(fontsize="small")
    if title:
        figure.suptitle(title)
    figure.savefig(path)
    return Path(path)
