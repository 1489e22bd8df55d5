"""Plots as inline SVG that takes its colours from the page: readable in light and dark.

Positions across are percentages, heights are pixels, and curves lie in a nested, stretched SVG
whose strokes do not scale. So text keeps its size from a phone to a wide screen. Every text is
escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "Axis",
    "axis",
    "bar",
    "heat",
    "histogram",
    "interval",
    "lines",
    "shared_lines",
    "stacked",
]

Point = tuple[float, float]
_MOST_POINTS = 400  # of one curve; more than a screen shows
_MOST_CELLS = 64  # of a picture's side
_MOST_BARS = 128  # of one histogram
_SHADES = 16
_LABEL = 20.0  # percent of the width between tick labels, so that they stay apart on a phone


@dataclass(frozen=True)
class Axis:
    """A range of values and its ticks.

    Attributes:
        low, high: the ends; ``low < high``.
        ticks: values with their labels, ascending.
        log: logarithmic; then ``low > 0``.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies: 0 at ``low``, 1 at ``high``; values outside go to the ends."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis(
    values: Sequence[float], *, log: bool = False, percent: bool = False, ticks: int = 4
) -> Axis:
    """An axis around ``values``, with about ``ticks`` round ticks.

    ``log`` is for positive values (others are left out), and is given up where they span less
    than a factor of 3. ``percent`` shows fractions as percentages.
    """
    shown = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    # Of numbers too small to have an inverse there is no ratio to show, nor room above the largest.
    log = log and bool(shown) and high >= 3 * low and high / low < 1e300 and high < 1e290
    if log:
        spread = (high / low) ** 0.04
        low, high = low / spread, high * spread
        marks = _powers(low, high, ticks)
    else:
        spread = 0.06 * (high - low) or 0.01 * abs(high) or 1.0
        low, high = low - spread, high + spread
        marks = _round(low, high, ticks)
    unit = 100 if percent else 1
    sign = " %" if percent else ""
    return Axis(low, high, tuple((v, f"{unit * v:.6g}{sign}") for v in marks), log)


def _round(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(m for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.15g}") for i in range(first, last + 1)]


def _powers(low: float, high: float, count: int) -> list[float]:
    """1, 2, 5 times powers of ten, thinned to powers and then to every n-th."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        marks = [float(f"{m}e{d}") for d in decades for m in steps]
        marks = [v for v in marks if low <= v <= high]
        if len(marks) <= count + 2:
            return marks
    return marks[:: -(-len(marks) // count)]


def _svg(height: float, label: str, body: str, kind: str) -> str:
    text = html.escape(label)
    return (
        f'<svg class="{kind}" width="100%" height="{height:g}" role="img" aria-label="{text}">'
        f"{body}</svg>"
    )


def _stretched(height: float, body: str) -> str:
    """A nested SVG of 1000 by 1000 that fills the width; y grows downward."""
    return (
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" '
        f'height="{height:g}">{body}</svg>'
    )


def _text(x: str, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y:g}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _across(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"


def _x_labels(x: Axis, y: float, apart: float = _LABEL) -> str:
    """Tick labels, those left out that would touch their neighbour."""
    out, last = "", -math.inf
    for value, label in x.ticks:
        at = x.at(value)
        if 100 * at - last >= apart:
            out += _text(_across(at), y, label, "middle")
            last = 100 * at
    return out


def _path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """The ``d`` of a curve through the points that are finite; others go to the axes' ends."""
    seen = [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b)]
    stride = -(-len(seen) // _MOST_POINTS) or 1
    kept = seen[::-1][::stride][::-1]  # the last point always stays
    return "M" + "L".join(f"{1000 * x.at(a):.0f} {1000 * (1 - y.at(b)):.0f}" for a, b in kept)


def shared_lines(
    series: Mapping[str, Sequence[Point]], x: Axis, y: Axis, ident: str, *, second: bool = False
) -> str:
    """Curves to be drawn behind others: give ``ident`` to :func:`lines` as ``behind``.

    ``second``: not background, but the other one of two.
    """
    kind = "second" if second else "behind"
    d = "".join(_path(points, x, y) for points in series.values())
    return (
        f'<svg width="0" height="0" class="defs" aria-hidden="true"><defs>'
        f'<path id="{html.escape(ident)}" class="line {kind}" d="{d}"/></defs></svg>'
    )


def lines(
    points: Sequence[Point],
    x: Axis,
    y: Axis,
    *,
    label: str,
    height: float = 170,
    behind: str | None = None,
    marks: Sequence[float] = (),
    small: bool = False,
) -> str:
    """One curve over ``(x, y)`` points, in the accent colour.

    Args:
        label: what a screen reader says.
        behind: id of :func:`shared_lines` drawn in grey.
        marks: x values with a dashed line across.
        small: fewer tick labels, for one of very many plots.
    """
    body = ""
    for value, shown in y.ticks:
        at = height * (1 - y.at(value))
        body += f'<line class="grid" x1="0" x2="100%" y1="{at:.1f}" y2="{at:.1f}"/>'
        body += _text("-8", round(at + 4, 1), shown, "end")
    body += _x_labels(x, height + 18, 2 * _LABEL if small else _LABEL)
    for value in marks:
        at_x = _across(x.at(value))
        body += f'<line class="mark" x1="{at_x}" x2="{at_x}" y1="0" y2="{height:g}"/>'
    curves = f'<use href="#{html.escape(behind)}"/>' if behind else ""
    if points:
        curves += f'<path class="line" d="{_path(points, x, y)}"/>'
    body += _stretched(height, curves)
    if points:
        a, b = points[-1]
        body += (
            f'<circle class="dot" cx="{_across(x.at(a))}" cy="{height * (1 - y.at(b)):.1f}" r="3"/>'
        )
    return _svg(height, label, body, "plot")


def stacked(parts: Sequence[tuple[str, float, str]], total: float, *, label: str) -> str:
    """A horizontal bar of parts, ``(css class, value, tooltip)``; ``total`` is the full width."""
    body, start = "", 0.0
    for kind, value, tip in parts:
        if value > 0:
            body += (
                f'<rect class="{html.escape(kind)}" x="{_across(start / total)}" y="0" '
                f'width="{_across(value / total)}" height="100%">'
                f"<title>{html.escape(tip)}</title></rect>"
            )
        start += value
    return _svg(14, label, body, "bar")


def bar(fraction: float, *, label: str) -> str:
    """A bar in the accent colour over a track that stands for the whole."""
    part = _across(min(max(fraction, 0.0), 1.0))
    body = '<rect class="track" width="100%" height="100%"/>'
    return _svg(8, label, f'{body}<rect class="accent" width="{part}" height="100%"/>', "bar")


def histogram(
    values: Sequence[float], counts: Sequence[float], *, label: str, height: float = 84
) -> str:
    """Counts at shared values: a bar stands where its value lies.

    More than 128 values are counted in as many bins.
    """
    low, high = min(values), max(values)
    if len(values) > _MOST_BARS:
        values, counts = _binned(values, counts, low, high)
    spread = 0.03 * (high - low) or 1.0
    x = Axis(low - spread, high + spread, ())
    most = max(counts) or 1
    d = "".join(
        f"M{1000 * x.at(v):.1f} 1000V{1000 - 1000 * c / most:.0f}"
        for v, c in zip(values, counts, strict=True)
        if c
    )
    thick = "wide" if len(values) <= 16 else "mid" if len(values) <= 64 else "thin"
    body = _stretched(height, f'<path class="bars {thick}" d="{d}"/>')
    body += f'<line class="axis" x1="0" x2="100%" y1="{height + 0.5:g}" y2="{height + 0.5:g}"/>'
    body += _text("0", height + 16, _signed(low), "start")
    if high > low:
        body += _text("100%", height + 16, _signed(high), "end")
        if 0.2 < x.at(0) < 0.8:
            body += _text(_across(x.at(0)), height + 16, "0", "middle")
    return _svg(height, label, body, "plot bare")


def _binned(
    values: Sequence[float], counts: Sequence[float], low: float, high: float
) -> tuple[list[float], list[float]]:
    """The middles of equal bins over [low, high], and what falls into each."""
    width = (high - low) / _MOST_BARS or 1.0
    sums = [0.0] * _MOST_BARS
    for value, number in zip(values, counts, strict=True):
        sums[min(_MOST_BARS - 1, int((value - low) / width))] += number
    return [low + (i + 0.5) * width for i in range(_MOST_BARS)], sums


def _signed(value: float) -> str:
    return f"{value:.2g}".replace("-", "−")


def heat(counts: Sequence[Sequence[float]], *, label: str) -> str:
    """A picture of counts: the stronger, the more. Large ones are shown by means of blocks."""
    cells = _blocks(counts)
    rows, columns = len(cells), len(cells[0]) if cells else 0
    most = max((v for row in cells for v in row), default=0) or 1
    shades: dict[int, str] = {}
    for y, row in enumerate(cells):
        for x, v in enumerate(row):
            shade = math.ceil(_SHADES * v / most)
            if shade > 0:
                shades[shade] = shades.get(shade, "") + f"M{x} {y}h1v1h-1z"
    body = "".join(
        f'<path fill-opacity="{shade / _SHADES:.3g}" d="{d}"/>'
        for shade, d in sorted(shades.items())
    )
    return (
        f'<svg class="heat" viewBox="0 0 {columns} {rows}" role="img" '
        f'aria-label="{html.escape(label)}" shape-rendering="crispEdges">{body}</svg>'
    )


def _blocks(counts: Sequence[Sequence[float]]) -> list[list[float]]:
    """Means of square blocks, so that no side has more than ``_MOST_CELLS``."""
    side = max(len(counts), *(len(row) for row in counts)) if counts else 0
    step = -(-side // _MOST_CELLS) or 1
    out = []
    for y in range(0, len(counts), step):
        band = counts[y : y + step]
        columns = range(0, min(len(row) for row in band), step)
        blocks = [[v for row in band for v in row[x : x + step]] for x in columns]
        out.append([sum(block) / len(block) for block in blocks])
    return out


def interval(value: float, low: float, high: float, x: Axis, *, label: str, ticks: bool) -> str:
    """An estimate and its confidence interval on a shared axis; ``ticks`` under the last one."""
    height, body = 24, ""
    for tick, _ in x.ticks:
        at = _across(x.at(tick))
        body += f'<line class="grid" x1="{at}" x2="{at}" y1="0" y2="{height}"/>'
    a, b, at = _across(x.at(low)), _across(x.at(high)), _across(x.at(value))
    body += f'<line class="range" x1="{a}" x2="{b}" y1="12" y2="12"/>'
    body += f'<circle class="dot" cx="{at}" cy="12" r="5"/>'
    body += _x_labels(x, height + 15) if ticks else ""
    return _svg(height, label, body, "interval ticks" if ticks else "interval")
