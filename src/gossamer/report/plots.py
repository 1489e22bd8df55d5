"""Plots as inline SVG that takes its colours from the page: readable in light and dark.

Every function returns one ``<svg>`` that scales to its container's width; text is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

__all__ = ["bars", "heat", "interval", "lines", "stacked"]

Point = tuple[float, float]
_WIDTH = 640


def _svg(width: float, height: float, label: str, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(label)}" '
        f'preserveAspectRatio="xMinYMin meet"><title>{html.escape(label)}</title>{body}</svg>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "tick") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">'
        f"{html.escape(text)}</text>"
    )


def _nice(low: float, high: float, count: int = 4) -> list[float]:
    """Round tick values that span [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = unit * next(m for m in (1, 2, 2.5, 5, 10) if m * unit >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _shorten(name: str, most: int) -> str:
    return name if len(name) <= most else "…" + name[-(most - 1) :]


def lines(
    series: Mapping[str, Sequence[Point]],
    *,
    label: str,
    x_label: str,
    y_label: str,
    percent: bool = False,
    log_x: bool = False,
) -> str:
    """Lines of (x, y) with a legend below; ``log_x`` for densities."""
    points = [p for s in series.values() for p in s]
    if not points:
        return ""
    width, height, left, bottom, top = _WIDTH, 260, 52, 34, 10
    fx = (lambda v: math.log10(max(v, 1e-9))) if log_x else (lambda v: v)
    xs, ys = [fx(p[0]) for p in points], [p[1] for p in points]
    x0, x1 = min(xs), max(xs)
    y0, y1 = min(ys), max(ys)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1e-6)
    pad = 0.05 * (y1 - y0)
    y0, y1 = y0 - pad, y1 + pad

    def px(x: float) -> float:
        return left + (fx(x) - x0) / (x1 - x0) * (width - left - 12)

    def py(y: float) -> float:
        return top + (y1 - y) / (y1 - y0) * (height - top - bottom)

    body = []
    for tick in _nice(y0, y1):
        shown = f"{100 * tick:.4g} %" if percent else f"{tick:.4g}"
        body.append(f'<path class="grid" d="M{left} {py(tick):.1f}H{width - 12}"/>')
        body.append(_text(left - 6, py(tick) + 4, shown, anchor="end"))
    ticks = sorted({p[0] for p in points}) if log_x else _nice(x0, x1, 6)
    last = -1e9
    for tick in ticks:
        if px(tick) - last > 44:
            last = px(tick)
            shown = f"{100 * tick:.3g} %" if log_x else f"{tick:g}"
            body.append(_text(last, height - bottom + 16, shown, anchor="middle"))
    body.append(_text(width - 12, height - 2, x_label, anchor="end", kind="axis"))
    for i, values in enumerate(series.values()):
        path = "M" + "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in values)
        body.append(f'<path class="line s{i % 6} d{i // 6 % 3}" d="{path}"/>')
    legend = "".join(
        f'<span class="key"><i class="s{i % 6} d{i // 6 % 3}"></i>{html.escape(name)}</span>'
        for i, name in enumerate(series)
    )
    head = f'<p class="ylabel">{html.escape(y_label)}</p>'
    return head + _svg(width, height, label, "".join(body)) + f'<p class="legend">{legend}</p>'


def stacked(rows: Sequence[tuple[str, Mapping[str, float]]], *, label: str) -> str:
    """A horizontal bar a row, stacked by part, in bytes, with a legend below."""
    parts = list(dict.fromkeys(part for _, values in rows for part in values))
    total = max((sum(values.values()) for _, values in rows), default=0) or 1
    left, right, pitch = 190, 70, 22
    body = []
    for i, (name, values) in enumerate(rows):
        y, x = 4 + i * pitch, float(left)
        body.append(_text(left - 8, y + 13, _shorten(name, 28), anchor="end"))
        for part, value in values.items():
            w = value / total * (_WIDTH - left - right)
            if w > 0:
                body.append(
                    f'<rect class="f{parts.index(part) % 8}" x="{x:.2f}" y="{y}" width="{w:.2f}" '
                    f'height="16"><title>{html.escape(f"{name}: {part} {value:,.0f} B")}</title>'
                    "</rect>"
                )
            x += w
        body.append(_text(x + 6, y + 13, f"{sum(values.values()):,.0f} B"))
    legend = "".join(
        f'<span class="key"><b class="f{i % 8}"></b>{html.escape(part)}</span>'
        for i, part in enumerate(parts)
    )
    svg = _svg(_WIDTH, 8 + pitch * len(rows), label, "".join(body))
    return svg + f'<p class="legend">{legend}</p>'


def bars(positions: Sequence[float], counts: Sequence[float], *, label: str) -> str:
    """Counts at shared values: a bar stands where its value lies."""
    if not positions:
        return ""
    width, height = 300.0, 92.0
    low, high = min(positions), max(positions)
    span, most = (high - low) or 1.0, max(counts) or 1.0
    thick = max(1.2, min(8.0, 200 / len(positions)))
    body = []
    for value, count in zip(positions, counts, strict=True):
        x = 10 + (value - low) / span * (width - 20)
        h = count / most * 66
        body.append(
            f'<rect class="f0" x="{x - thick / 2:.2f}" y="{70 - h:.2f}" width="{thick:.2f}" '
            f'height="{h:.2f}"><title>{value:.4g}: {count:,.0f}</title></rect>'
        )
    body.append(f'<path class="grid" d="M6 70.5H{width - 6}"/>')
    body.append(_text(6, 85, f"{low:.3g}"))
    body.append(_text(width - 6, 85, f"{high:.3g}", anchor="end"))
    if low < 0 < high:
        body.append(_text(10 - low / span * (width - 20), 85, "0", anchor="middle"))
    return _svg(width, height, label, "".join(body))


def heat(counts: Sequence[Sequence[float]], *, label: str) -> str:
    """A picture of counts; the darker, the more."""
    rows, columns = len(counts), len(counts[0]) if counts else 0
    most = max((v for row in counts for v in row), default=0) or 1
    body = [
        f'<rect class="f0" x="{x}" y="{y}" width="1.02" height="1.02" opacity="{v / most:.3f}"/>'
        for y, row in enumerate(counts)
        for x, v in enumerate(row)
        if v
    ]
    frame = f'<rect class="frame" x="0" y="0" width="{columns}" height="{rows}"/>'
    return _svg(columns, rows, label, "".join(body) + frame)


def interval(rows: Sequence[tuple[str, float, float, float]], *, label: str) -> str:
    """Estimates with their confidence intervals, as percentages: (name, value, low, high)."""
    low, high = min(r[2] for r in rows), max(r[3] for r in rows)
    margin = 0.15 * (high - low) or 0.001
    low, high = low - margin, high + margin
    left, pitch = 76, 30

    def px(v: float) -> float:
        return left + (v - low) / (high - low) * (_WIDTH - left - 90)

    body = []
    bottom = pitch * len(rows) + 4
    for tick in _nice(low, high, 5):
        body.append(f'<path class="grid" d="M{px(tick):.1f} 0V{bottom}"/>')
        body.append(_text(px(tick), bottom + 14, f"{100 * tick:.4g} %", anchor="middle"))
    for i, (name, value, least, most) in enumerate(rows):
        y = 18 + i * pitch
        body.append(_text(left - 8, y + 4, name, anchor="end"))
        body.append(f'<path class="line s{i}" d="M{px(least):.1f} {y}H{px(most):.1f}"/>')
        body.append(f'<circle class="f{i}" cx="{px(value):.1f}" cy="{y}" r="5"/>')
        body.append(_text(px(most) + 8, y + 4, f"{100 * value:.2f} %"))
    return _svg(_WIDTH, bottom + 20, label, "".join(body))
