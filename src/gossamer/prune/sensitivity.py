"""Sensitivity scan: a task's score against density, one layer at a time.

Han, Pool, Tran, Dally, NIPS 2015, section 3 and figure 6: each layer is pruned alone, without
retraining, and the accuracy is measured; the most sensitive layer gets the smallest threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks, above_quality, keep_top
from gossamer.datasets import Split
from gossamer.training import Task, evaluate
from gossamer.training.metric import ACCURACY, Metric

__all__ = ["DENSITIES", "Sensitivity", "scan"]

DENSITIES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.17, 0.12, 0.08, 0.05, 0.03)


@dataclass(frozen=True)
class Sensitivity:
    """What a scan found.

    Attributes:
        rows: one a measurement: layer, setting (the density or quality asked for), density (the
            fraction of the layer kept), score, loss; accuracy where the task counts.
        base: score of the untouched network.
        metric: what a score is.
    """

    rows: tuple[dict[str, Any], ...]
    base: float
    metric: Metric = ACCURACY

    @property
    def layers(self) -> list[str]:
        """The layers scanned, in the model's order."""
        return list(dict.fromkeys(row["layer"] for row in self.rows))

    def as_dict(self) -> dict[str, list[list[float]]]:
        """Layer -> [[density, score], ...], as the report takes it."""
        return {
            name: [[r["density"], r["score"]] for r in self.rows if r["layer"] == name]
            for name in self.layers
        }

    def table(self) -> str:
        """The scan as plain text: a row a layer, a column a setting; fractions in percent."""
        settings = list(dict.fromkeys(row["setting"] for row in self.rows))
        found = {(row["layer"], row["setting"]): row["score"] for row in self.rows}
        times = 100 if self.metric.unit == "%" else 1
        width = max(len("layer"), *(len(name) for name in self.layers))
        lines = ["layer".ljust(width) + "".join(f"{s:>9g}" for s in settings)]
        for name in self.layers:
            cells = "".join(
                f"{times * found[name, s]:>9.{2 if times == 100 else 4}f}" for s in settings
            )
            lines.append(name.ljust(width) + cells)
        return "\n".join(lines)

    def suggest(self, max_drop: float) -> dict[str, float]:
        """The smallest density of each layer that costs at most ``max_drop`` of the score.

        Densities below one that fails are not looked at: a layer that recovers by luck is still
        sensitive. Raises :class:`ArgumentError` for a drop outside [0, 1].
        """
        if not 0 <= max_drop <= 1:
            raise ArgumentError(f"max_drop={max_drop} is outside [0, 1] (a fraction)")
        chosen = {}
        for name, points in self.as_dict().items():
            best = 1.0
            for density, score in sorted(points, reverse=True):
                if not self.metric.keeps(self.base, score, max_drop):
                    break
                best = density
            chosen[name] = best
        return chosen

    def plot(self, path: str | Path) -> Path:
        """Draw the scan; the suffix decides the format (PNG, SVG, PDF)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        times = 100 if self.metric.unit == "%" else 1
        for name, points in self.as_dict().items():
            points.sort()
            axes.plot([100 * d for d, _ in points], [times * s for _, s in points], label=name)
        axes.axhline(times * self.base, color="0.6", linewidth=0.8)
        label = ", ".join(word for word in (self.metric.name, self.metric.unit) if word)
        axes.set(xscale="log", xlabel="density of the layer, %", ylabel=label)
        if len(self.layers) <= 24:
            axes.legend(fontsize="x-small", ncols=1 + len(self.layers) // 8)
        figure.savefig(path)
        return Path(path)


def scan(
    model: nn.Module,
    split: Split,
    *,
    densities: Sequence[float] = DENSITIES,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    mode: Literal["density", "quality"] = "density",
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 1000,
    task: Task | str | None = None,
) -> Sensitivity:
    """Prune each layer alone by magnitude and evaluate; the model ends bit for bit as it was.

    Args:
        split: what to measure on; a choice belongs on validation data.
        densities: fractions kept; with ``mode="quality"`` factors q of q * std(W).
        progress: called with (measurements done, measurements in all).
        task: by which it is judged; None: by the targets.

    Raises :class:`ArgumentError` for no layers, no densities or values outside what is allowed.
    """
    if mode not in ("density", "quality"):
        raise ArgumentError(f"mode {mode!r} is not one of 'density', 'quality'")
    if not densities:
        raise ArgumentError("densities is empty; give at least one")
    weights = names.weights(model, include=include, exclude=exclude)
    if not weights:
        raise ArgumentError("the model has no weight to scan; name some with include=")
    before = evaluate(model, split, batch_size=batch_size, task=task)
    rows: list[dict[str, Any]] = []
    total = len(weights) * len(densities)
    for name, weight in weights.items():
        saved = weight.detach().clone()
        try:
            for setting in densities:
                mask = _mask(name, saved, setting, mode)
                Masks({name: mask}).apply_({name: weight.detach()})
                found = evaluate(model, split, batch_size=batch_size, task=task)
                rows.append(
                    {
                        "layer": name,
                        "setting": setting,
                        "density": int(mask.sum()) / max(1, mask.numel()),
                        "score": found.score,
                        **({} if found.correct is None else {"accuracy": found.accuracy}),
                        "loss": found.loss,
                    }
                )
                weight.detach().copy_(saved)
                if progress is not None:
                    progress(len(rows), total)
        finally:
            # whatever was raised, Ctrl-C included: the user's weights come back
            weight.detach().copy_(saved)
    return Sensitivity(tuple(rows), before.score, before.metric)


def _mask(name: str, weight: torch.Tensor, setting: float, mode: str) -> torch.Tensor:
    if mode == "quality":
        return above_quality(weight, setting, name=name)
    return keep_top({name: weight.abs()}, setting)[name]
