"""What the page says of the time that a network takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from gossamer.report import plots, words

__all__ = ["latency"]

Run = Mapping[str, Any]
Section = dict[str, Any]


def latency(run: Run) -> Section | None:
    """Milliseconds of a forward pass, two bars where two were compared."""
    found = run.get("latency")
    if not found:
        return None
    pairs: tuple[tuple[str, str], ...] = (("Dense", "dense_ms"), ("From the file", "compressed_ms"))
    if found.get("same_operations"):  # two bars would read as a comparison
        pairs = (("Before and after", "compressed_ms"),)
    slowest = max(found[key] for _, key in pairs) or 1
    rows = []
    for name, key in pairs:
        label = f"{found[key]:.3f} ms"
        rows.append((name, label, Markup(plots.bar(found[key] / slowest, label=label))))
    return {
        "said": words.speed(found) + _eight_bits(run, found.get("eight_bits")),
        "note": found.get("note"),
        "engine": found.get("engine"),
        "batch": found.get("batch"),
        "pairs": found.get("pairs"),
        "rows": rows,
        "engines": {
            "head": ("Engine", "Before and after", "Times as fast"),
            "rows": [_engine(row) for row in found.get("rows") or ()],
        },
        "macs": _macs(run.get("macs")),
    }


def _eight_bits(run: Run, found: Mapping[str, Any] | None) -> str:
    """What the plan scores that may take eight bits, in a sentence."""
    if not found:
        return ""
    of = words.metric(run)
    told = f" The plan's test {of.name}: {words.score(of, found['score'])}"
    return f"{told} ({found['of']:,} examples); {found['check']}."


def _engine(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """An engine's line: where, milliseconds before and after, and how many times as fast."""
    times = f"{row['before_ms']:.3f} → {row['after_ms']:.3f} ms"
    gain, ends = words.number(row.get("ratio")), row.get("interval") or (None, None)
    low, high = (words.number(end) for end in ends)
    told = "–" if gain is None else words.ratio(gain)
    if gain is not None and low is not None and high is not None:
        told += f" (95 %: {words.ratio(low)} to {words.ratio(high)})"
    threads = words.count(row["threads"], "thread")
    return f"{row['engine']}, batch {row['batch']}, {threads}", times, told


def _macs(found: Mapping[str, Any] | None) -> str:
    """Operations before and after in a sentence."""
    if not found:
        return ""
    before, after = found["before"], found["after"]
    told = f"{before['macs']:,.0f} multiplications an example before, {after['macs']:,.0f} after"
    if after["nonzero"] < after["macs"]:
        told += (
            f", of which {after['nonzero']:,.0f} by weights that are not zero and "
            f"{after['live']:,.0f} left without dead rows and columns"
        )
    return f"{told}."
