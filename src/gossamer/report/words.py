"""Numbers as people read them, and what came of a run in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

__all__ = [
    "change",
    "count",
    "headline",
    "interval",
    "number",
    "percent",
    "ratio",
    "size",
    "speed",
    "verdict",
]

Figures = Mapping[str, Any]
_FASTER = 1.1  # ratios of timings below this are noise
_NONE = "–"


def number(value: object) -> float | None:
    """A finite number, or None for anything else (JSON may hold null and NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def size(count: float) -> str:
    """Bytes for people; KB is 1000 bytes, and stays the unit up to 10 MB as in the papers.

    >>> [size(n).replace("\\xa0", " ") for n in (812, 5529, 26_940, 1_066_440, 232_000_000)]
    ['812 B', '5.53 KB', '26.9 KB', '1,066 KB', '232 MB']
    """
    if count < 1000:
        return f"{count:.0f}\N{NO-BREAK SPACE}B"
    scaled, unit = (count / 1e3, "KB") if count < 1e7 else (count / 1e6, "MB")
    digits = 2 if scaled < 10 else 1 if scaled < 100 else 0
    return f"{scaled:,.{digits}f}\N{NO-BREAK SPACE}{unit}"


def count(number_of: int, noun: str) -> str:
    """How many of something.

    >>> count(1, "epoch"), count(2_000, "epoch")
    ('1 epoch', '2,000 epochs')
    """
    return f"{number_of:,} {noun}" + ("" if number_of == 1 else "s")


def percent(value: object, digits: int = 2) -> str:
    """A fraction in percent; a dash where there is none."""
    found = number(value)
    return _NONE if found is None else f"{100 * found:.{digits}f}\N{NO-BREAK SPACE}%"


def change(points: float) -> str:
    """A difference in percentage points, with its sign.

    >>> change(-0.05), change(0.0)
    ('−0.05', '±0.00')
    """
    shown = f"{abs(points):.2f}"
    return ("±" if float(shown) == 0 else "+" if points > 0 else "−") + shown


def interval(figures: Figures) -> tuple[float, float]:
    """The 95 % interval of an accuracy; Wilson's, computed when it is not given.

    >>> low, high = interval({"accuracy": 0.9, "total": 100})
    >>> round(low, 4), round(high, 4)
    (0.8256, 0.9448)
    """
    low, high = number(figures.get("low")), number(figures.get("high"))
    if low is not None and high is not None:
        return low, high
    p, n = float(figures["accuracy"]), max(1, int(figures["total"]))
    z = NormalDist().inv_cdf(0.975)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def ratio(value: float) -> str:
    """A factor, with its sign."""
    return f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def headline(run: Figures) -> str:
    """Model, data, bytes, ratio and accuracy in one sentence."""
    sizes = run["bytes"]
    told = (
        f"{run['model']} on {run['dataset']}: {size(sizes['dense'])} → {size(sizes['file'])}, "
        + (f"{ratio(sizes['ratio'])} smaller" if sizes["ratio"] > 1 else "not smaller")
    )
    accuracy = run.get("accuracy")
    if not accuracy:
        return f"{told}."
    before, after = accuracy["before"], accuracy["after"]
    return f"{told}, accuracy {percent(before['accuracy'])} → {percent(after['accuracy'])}."


def verdict(run: Figures) -> list[tuple[str, bool]]:
    """What came of it: sentences, each with whether it is bad news."""
    told = []
    if float(run["bytes"]["ratio"]) <= 1:
        told.append(("No gain: the file is no smaller than the dense weights.", True))
    accuracy = run.get("accuracy")
    if not accuracy:
        told.append(("Accuracy was not measured.", True))
    else:
        told.append(_accuracy(accuracy["before"], accuracy["after"]))
    latency = run.get("latency")
    if latency:
        gain = float(latency["ratio"])
        if gain >= _FASTER:
            told.append((f"It also runs {ratio(gain)} faster.", False))
        elif gain * _FASTER > 1:
            told.append(("It runs no faster: smaller on disk, the same work.", False))
        else:
            told.append((f"It runs slower: {ratio(1 / gain)} the time.", True))
    return told


def _accuracy(before: Figures, after: Figures) -> tuple[str, bool]:
    points = 100 * (after["accuracy"] - before["accuracy"])
    low, high = interval(before)
    margin = f"±{50 * (high - low):.2f} points on {int(before['total']):,} test examples"
    if after["accuracy"] < low:
        return (
            f"Accuracy fell by {abs(points):.2f} points, beyond the 95 % confidence interval "
            f"({margin}): a real loss.",
            True,
        )
    if points < 0:
        return (
            f"The change of {change(points)} points lies within the 95 % confidence interval "
            f"({margin}): no loss that this test can show.",
            False,
        )
    beyond = "beyond" if after["accuracy"] > high else "within"
    return (
        f"No accuracy was lost: {change(points)} points, {beyond} the 95 % confidence interval "
        f"({margin}).",
        False,
    )


def speed(latency: Figures) -> str:
    """The measured latency in one honest sentence."""
    gain = float(latency["ratio"])
    if gain >= _FASTER:
        return f"The network from the file is {ratio(gain)} faster than the dense one."
    if gain * _FASTER > 1:
        return "No speed-up: both take the same time, within the noise of the clock."
    return f"Slower: the network from the file takes {ratio(1 / gain)} the time."
