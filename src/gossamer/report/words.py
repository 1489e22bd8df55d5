"""Numbers as people read them, and what came of a run in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gossamer.training.metric import Metric, wilson

__all__ = [
    "change",
    "count",
    "headline",
    "interval",
    "metric",
    "number",
    "percent",
    "ratio",
    "score",
    "size",
    "speed",
    "trained",
    "verdict",
]

Figures = Mapping[str, Any]
# Where a network's tensors lie in memory changes its speed by as much, in every pair of runs.
_PLACEMENT = 0.01
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


def score(of: Metric, value: object) -> str:
    """A score with its unit; a dash where there is none."""
    found = number(value)
    return _NONE if found is None else of.show(found).replace(" ", "\N{NO-BREAK SPACE}")


def change(points: float) -> str:
    """A difference in percentage points, with its sign.

    >>> change(-0.05), change(0.0)
    ('−0.05', '±0.00')
    """
    shown = f"{abs(points):.2f}"
    return ("±" if float(shown) == 0 else "+" if points > 0 else "−") + shown


def metric(run: Figures) -> Metric:
    """What the scores of a run are; accuracy where an earlier version does not say."""
    return Metric.of((run.get("task") or {}).get("metric"))


def interval(figures: Figures) -> tuple[float, float] | None:
    """The 95 % interval of a score, None where none is known; of an accuracy Wilson's.

    >>> low, high = interval({"accuracy": 0.9, "total": 100})
    >>> round(low, 4), round(high, 4)
    (0.8256, 0.9448)
    """
    low, high = number(figures.get("low")), number(figures.get("high"))
    if low is not None and high is not None:
        return low, high
    fraction = number(figures.get("accuracy"))
    if fraction is None:
        return None
    total = max(1, int(figures["total"]))
    return wilson(fraction * total, total)


def ratio(value: float) -> str:
    """A factor, with its sign."""
    return f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def headline(run: Figures) -> str:
    """Model, data, bytes, ratio and score in one sentence."""
    sizes = run["bytes"]
    told = (
        f"{run['model']} on {run['dataset']}: {size(sizes['dense'])} → {size(sizes['file'])}, "
        + (f"{ratio(sizes['ratio'])} smaller" if sizes["ratio"] > 1 else "not smaller")
    )
    found = run.get("evaluation")
    if not found:
        return f"{told}."
    before, after = (score(metric(run), found[when]["score"]) for when in ("before", "after"))
    return f"{told}, {metric(run).name} {before} → {after}."


def verdict(run: Figures) -> list[tuple[str, bool]]:
    """What came of it: sentences, each with whether it is bad news."""
    told = []
    if float(run["bytes"]["ratio"]) <= 1:
        told.append(("No gain: the file is no smaller than the dense weights.", True))
    found = run.get("evaluation")
    if not found:
        told.append(("Accuracy was not measured.", True))
    else:
        told.append(_score(metric(run), found["before"], found["after"], trained(run)))
        if metric(run).name != "loss":
            told += _loss(found["before"], found["after"])
    latency = run.get("latency")
    if latency:
        ends = _compared(latency)
        if ends is not None:
            low, high, gain = ends
            if low > 1 + _PLACEMENT:
                between = f"95 %: {ratio(low)} to {ratio(high)}"
                told.append((f"It also runs {ratio(gain)} faster ({between}).", False))
            elif high < 1 - _PLACEMENT:
                between = _slower(low, high)
                told.append((f"It runs slower: {ratio(1 / gain)} the time ({between}).", True))
    return told


def trained(run: Figures) -> dict[str, int]:
    """Epochs of each stage that trained after the figures before were taken, by stage name.

    These are taken before the first stage that is neither ``train`` nor ``sensitivity``.
    """
    leading = set()
    for stage in run.get("stages") or ():
        name = str(stage["stage"])
        if name.partition("-")[2] not in ("train", "sensitivity"):
            break
        leading.add(name)
    epochs: dict[str, int] = {}
    for row in run.get("curves") or ():
        stage = "-".join(str(row["stage"]).split("-")[:2])  # "2-prune-1" is a part of "2-prune"
        if stage not in leading:
            epochs[stage] = epochs.get(stage, 0) + 1
    return epochs


def _score(
    of: Metric, before: Figures, after: Figures, epochs: Mapping[str, int]
) -> tuple[str, bool]:
    drop = of.drop(before["score"], after["score"])
    lost = of.show_drop(drop)
    ends = interval(before)
    known = ends is not None
    low, high = ends or (before["score"], before["score"])
    unit = "" if of.unit != "%" else " points"
    half = f"±{50 * (high - low):.2f}" if of.unit == "%" else f"±{(high - low) / 2:.3g}"
    margin = f"{half}{unit} on {int(before['total']):,} test examples"
    if not known:
        margin = f"not known, on {int(before['total']):,} test examples"
    name = of.name[:1].upper() + of.name[1:]
    beside = ""
    if epochs:
        each = ", ".join(f"{name} {number:,}" for name, number in epochs.items())
        beside = (
            f" Between the two figures lie {count(sum(epochs.values()), 'epoch')} of training "
            f"({each}), and no network was trained as long without compression: what the training "
            "gave and what the compression took are not told apart."
        )
    fell, rose = ("fell", "rose") if of.higher_is_better else ("rose", "fell")
    worse = after["score"] < low if of.higher_is_better else after["score"] > high
    if worse:
        return (
            f"{name} {fell} by {lost}, beyond the 95 % confidence interval "
            f"({margin}): a real loss.{beside}",
            True,
        )
    signed = change(-100 * drop) + " points"
    if of.unit != "%":
        signed = f"{after['score'] - before['score']:+.3g} {of.unit}".rstrip().replace("-", "−")
    if drop > 0:
        return (
            f"The change of {signed} lies within the 95 % confidence interval "
            f"({margin}): no loss that this test can show.{beside}",
            False,
        )
    outside = after["score"] > high if of.higher_is_better else after["score"] < low
    beyond = "beyond" if outside else "within"
    if epochs:
        moved = f"{name} {rose} by {lost}" if drop else f"{name} is what it was"
        return (f"{moved}, {beyond} the 95 % confidence interval ({margin}).{beside}", False)
    return (
        f"No {of.name} was lost: {signed}, {beyond} the 95 % confidence interval ({margin}).",
        False,
    )


def _loss(before: Figures, after: Figures) -> list[tuple[str, bool]]:
    """A sentence where the mean test loss rose, in the digits that are shown."""
    old, new = number(before.get("loss")), number(after.get("loss"))
    if old is not None and new is None and "loss" in after:
        return [(f"Test loss was {old:.4f} and is no finite number any more.", True)]
    if old is None or new is None or float(f"{new:.4f}") <= float(f"{old:.4f}"):
        return []
    return [(f"Test loss rose: {old:.4f} → {new:.4f}.", True)]


def _compared(latency: Figures) -> tuple[float, float, float] | None:
    """Low and high end of the ratio's interval and the ratio; None where nothing was compared.

    Runs of the same operations, and those that recorded no interval, were not compared.
    """
    gain, ends = number(latency.get("ratio")), latency.get("interval")
    if latency.get("same_operations") or gain is None or gain <= 0 or not ends:
        return None
    low, high = number(ends[0]), number(ends[1])
    return None if low is None or high is None or not 0 < low <= high else (low, high, gain)


def _slower(low: float, high: float) -> str:
    return f"95 %: {ratio(1 / high)} to {ratio(1 / low)}"


def speed(latency: Figures) -> str:
    """The measured latency in one honest sentence: a verdict only where the interval excludes 1."""
    if latency.get("same_operations"):
        return "The same operations as before, so no speed is compared."
    ends = _compared(latency)
    if ends is None:
        return "No verdict on speed: the timings give no interval of their ratio."
    low, high, gain = ends
    if low > 1 + _PLACEMENT:
        return (
            f"The network from the file is {ratio(gain)} faster than the dense one "
            f"(95 %: {ratio(low)} to {ratio(high)})."
        )
    if high < 1 - _PLACEMENT:
        return (
            f"Slower: the network from the file takes {ratio(1 / gain)} the time "
            f"({_slower(low, high)})."
        )
    return (
        f"No difference that these timings can show: the ratio's 95 % interval is {ratio(low)} to "
        f"{ratio(high)}."
    )
