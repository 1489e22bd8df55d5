"""Lines with error bars, a panel a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gossamer.analysis import canvas
from gossamer.core.errors import ArgumentError
from gossamer.experiments import spread

__all__ = ["Lines", "draw"]

Lines = Mapping[str, Mapping[int, Sequence[float]] | Mapping[float, Sequence[float]]]
"""Label -> position across -> one value a seed."""


def draw(
    panels: Mapping[str, Lines],
    path: Path,
    *,
    xlabel: str,
    ylabel: str,
    xlog: bool = True,
    ylog: bool = True,
) -> Path:
    """Draw lines through means, bars of a sample standard deviation; a panel a title.

    Raises :class:`ArgumentError` where there is nothing to draw.
    """
    if not panels or not all(panels.values()):
        raise ArgumentError("panels is empty; give {title: {label: {x: values}}}")
    figure = canvas(1 + 4 * len(panels), 3.8)
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, lines) in zip(drawn, panels.items(), strict=True):
        for label, points in lines.items():
            found = {x: spread(values) for x, values in sorted(points.items())}
            axes.errorbar(
                list(found),
                [s["mean"] for s in found.values()],
                yerr=[s["std"] for s in found.values()],
                capsize=2,
                marker="o",
                markersize=3,
                label=label,
            )
        axes.set(title=title, xlabel=xlabel)
        if xlog:
            axes.set_xscale("log", base=2)
        if ylog:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    drawn[0].set_ylabel(ylabel)
    drawn[-1].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
