"""Plots of masks and of training results; the file's suffix decides the format (PNG, SVG, PDF)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.core.files import picture
from gossamer.core.masks import Masks
from gossamer.core.names import select

__all__ = [
    "against_density",
    "bars",
    "canvas",
    "histograms",
    "layer_densities",
    "lines",
    "pictures",
    "pixel_counts",
]

_MOST_PICTURES = 400


def canvas(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, which ``savefig`` draws without a display."""
    # no pyplot: its global figures leak, and it asks for a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path) -> Path:
    path = picture(path)
    figure.savefig(path)
    return path


def pixel_counts(mask: Tensor, in_shape: Sequence[int]) -> Tensor:
    """Weights kept for each input pixel by a first layer: (out, C * H * W) -> (H, W), int64.

    >>> pixel_counts(torch.tensor([[True, False], [True, True]]), (1, 1, 2)).tolist()
    [[2, 1]]

    Raises :class:`ArgumentError` when the mask is no matrix over inputs of that shape.
    """
    if len(in_shape) != 3 or mask.ndim != 2 or mask.shape[1] != math.prod(in_shape):
        raise ArgumentError(
            f"mask of shape {tuple(mask.shape)} does not read images of in_shape={tuple(in_shape)}"
            "; give a (out, C * H * W) mask and (C, H, W)"
        )
    return mask.long().sum(0).view(*in_shape).sum(0)


def pictures(
    images: Mapping[str, Tensor] | Tensor, path: str | Path, *, columns: int | None = None
) -> Path:
    """Pictures side by side, dark where a value is high.

    Args:
        images: title -> (H, W) values, each on its own grey scale; or the (out, in, H, W) kernels
            or mask of a convolution: a row an output channel, a column an input channel, all on
            one grey scale.
        columns: pictures in a row.

    Raises :class:`ArgumentError` for no picture, more than 400, or a wrong number of dimensions.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise ArgumentError(
                f"images has shape {tuple(images.shape)}; kernels are (out, in, height, width)"
            )
        columns = columns or images.shape[1]
        cells = [("", kernel) for kernel in images.detach().flatten(0, 1).cpu().double()]
        limits = (
            [float(f(images.detach().double())) for f in (torch.min, torch.max)] if cells else []
        )
    else:
        cells = [(title, image.detach().cpu().double()) for title, image in images.items()]
        columns, limits = columns or min(len(cells), 10), []
    if not 0 < len(cells) <= _MOST_PICTURES:
        raise ArgumentError(
            f"images holds {len(cells)} pictures; give 1 to {_MOST_PICTURES}, some channels at a "
            "time"
        )
    for title, image in cells:
        if image.ndim != 2:
            raise ArgumentError(f"image {title!r} has shape {tuple(image.shape)}, not (H, W)")
    rows = -(-len(cells) // columns)
    titled = any(title for title, _ in cells)
    side = 1.2 if titled else 0.45
    figure = canvas(max(2.0, side * columns), max(1.0, (side + 0.25 * titled) * rows))
    for i, (title, image) in enumerate(cells):
        axes = figure.add_subplot(rows, columns, i + 1)
        low, high = limits or (float(image.min()), float(image.max()))
        axes.imshow(
            image.numpy(), cmap="gray_r", vmin=low, vmax=high if high > low else low + 1,
            interpolation="nearest",
        )  # fmt: skip
        axes.set(xticks=[], yticks=[])
        if title:
            axes.set_title(title, fontsize="x-small")
    return _save(figure, path)


def layer_densities(
    masks: Mapping[str, Masks], path: str | Path, *, include: str | Sequence[str] | None = None
) -> Path:
    """Density of each layer, a line for each named set of masks.

    ``include`` names the layers to show (:func:`gossamer.core.names.select`). A layer that a set
    does not mask is dense there and leaves a gap. Raises :class:`ArgumentError` without any layer.
    """
    layers = list(dict.fromkeys(name for some in masks.values() for name in some))
    if include is not None:
        layers = select(layers, include)
    if not layers:
        raise ArgumentError("masks name no layer; give {label: Masks}")
    figure = canvas(max(5.0, 1.5 + 0.45 * len(layers)), 4.2)
    axes = figure.add_subplot()
    for label, some in masks.items():
        found = some.densities()
        axes.plot(
            range(len(layers)),
            [100 * found.get(name, math.nan) for name in layers],
            marker="o",
            markersize=4,
            label=f"{label} ({100 * some.density:.3g} % in all)",
        )
    axes.set(yscale="symlog" if _has_zero(masks, layers) else "log", ylabel="density, %")
    axes.set_xticks(range(len(layers)), [name.removesuffix(".weight") for name in layers])
    axes.tick_params(axis="x", labelrotation=60 if len(layers) > 6 else 0, labelsize="small")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _save(figure, path)


def _has_zero(masks: Mapping[str, Masks], layers: Sequence[str]) -> bool:
    return any(name in some and not some[name].any() for some in masks.values() for name in layers)


Curves = Mapping[str, Mapping[float, Sequence[float]]]
"""Label -> density in (0, 1] -> one value a seed."""


def against_density(panels: Mapping[str, Curves], path: str | Path, *, title: str = "") -> Path:
    """Values against density with error bars: mean and sample standard deviation over the seeds.

    Args:
        panels: label of the vertical axis -> label of the curve -> density in (0, 1] -> one value
            a seed: accuracies, early-stop iterations. One plot beside the other.

    Raises :class:`ArgumentError` for no curve, a density outside (0, 1] or one without values.
    """
    if not panels or not all(panels.values()):
        raise ArgumentError(
            "there is no curve to draw; give {axis: {label: {density: [value of each seed]}}}"
        )
    for curves in panels.values():
        for label, points in curves.items():
            if not points:
                raise ArgumentError(f"curve {label!r} has no point; there is no curve to draw")
            for density, values in points.items():
                if not 0 < density <= 1 or not len(values):
                    raise ArgumentError(
                        f"curve {label!r} has {len(values)} values at density {density}; "
                        "densities lie in (0, 1], with at least one value each"
                    )
    figure = canvas(1 + 5 * len(panels), 4.2)
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (ylabel, curves) in zip(drawn, panels.items(), strict=True):
        for label, points in curves.items():
            ordered = sorted(points.items())
            rows = [torch.tensor(list(values), dtype=torch.float64) for _, values in ordered]
            axes.errorbar(
                [100 * density for density, _ in ordered],
                [float(r.mean()) for r in rows],
                yerr=[float(r.std()) if len(r) > 1 else 0.0 for r in rows],
                capsize=3,
                marker="o",
                markersize=3,
                label=label,
            )
        axes.set(xscale="log", xlabel="density, %", ylabel=ylabel)
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
    drawn[0].legend(fontsize="small")
    if title:
        figure.suptitle(title)
    return _save(figure, path)


def histograms(
    scores: Mapping[str, Mapping[str, Tensor]],
    path: str | Path,
    *,
    low: float,
    high: float = 1.0,
    bins: int = 20,
    xlabel: str = "class specialization",
) -> Path:
    """A histogram a layer, those of several networks over one another, as fractions of channels.

    Args:
        scores: label -> layer -> (channels,) values in [low, high]. One network draws counts.

    Raises :class:`ArgumentError` for no scores or no bins.
    """
    layers = list(dict.fromkeys(name for one in scores.values() for name in one))
    if not layers or bins < 1:
        raise ArgumentError(f"scores of {len(layers)} layers in bins={bins}: give at least one")
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = canvas(3.2 * columns, 2.6 * rows)
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    for i, name in enumerate(layers):
        axes = figure.add_subplot(rows, columns, i + 1)
        for label, one in scores.items():
            values = one.get(name, torch.empty(0)).double().clamp(low, high)
            counts = torch.histogram(values, edges).hist
            if len(scores) > 1:
                counts = counts / max(1, len(values))
            axes.stairs(counts.numpy(), edges.numpy(), fill=True, alpha=0.5, label=label or None)
        axes.set_title(name, fontsize="small")
        axes.set_xlabel(xlabel, fontsize="x-small")
        axes.set_ylabel("fraction of channels" if len(scores) > 1 else "channels", fontsize=7)
        if any(scores):
            axes.legend(fontsize="x-small")
    return _save(figure, path)


def bars(groups: Mapping[str, Mapping[str, float]], path: str | Path, *, xlabel: str) -> Path:
    """Horizontal bars in groups, one colour a label: milliseconds by engine and network.

    ``groups``: name of the group -> label -> value. Raises :class:`ArgumentError` for no bar.
    """
    labels = list(dict.fromkeys(label for values in groups.values() for label in values))
    if not labels:
        raise ArgumentError("groups hold no bar; give {group: {label: value}}")
    figure = canvas(7.0, 1.2 + 0.24 * len(groups) * (len(labels) + 1))
    axes, step = figure.add_subplot(), 1 / (len(labels) + 1)
    for i, label in enumerate(labels):
        places = [n + i * step for n, values in enumerate(groups.values()) if label in values]
        widths = [values[label] for values in groups.values() if label in values]
        drawn = axes.barh(places, widths, height=step, label=label)
        axes.bar_label(drawn, fmt=" %.3g", fontsize="x-small")
    middle = (len(labels) - 1) * step / 2
    axes.set_yticks([n + middle for n in range(len(groups))], list(groups), fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel=xlabel)
    axes.legend(fontsize="small")
    return _save(figure, path)


def lines(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: str | Path,
    *,
    xlabel: str,
    ylabel: str,
) -> Path:
    """Curves through points, one plot beside the other with the same vertical axis.

    ``panels``: title -> label of the curve -> (x, y) in the order to draw them. Raises
    :class:`ArgumentError` for no curve, or one without points.
    """
    empty = [label for curves in panels.values() for label, points in curves.items() if not points]
    if not panels or not all(panels.values()) or empty:
        raise ArgumentError(
            f"there is no curve to draw{f' for {empty[0]!r}' if empty else ''}; give "
            "{title: {label: [(x, y), ...]}}"
        )
    figure = canvas(1 + 4.5 * len(panels), 4.0)
    drawn = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, curves) in zip(drawn, panels.items(), strict=True):
        for label, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axes.set(xlabel=xlabel, title=title)
        axes.grid(alpha=0.3)
    drawn[0].set(ylabel=ylabel)
    drawn[0].legend(fontsize="small")
    return _save(figure, path)
