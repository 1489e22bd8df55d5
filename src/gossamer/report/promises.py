"""What a run promised, in words: its floor, the proof of its file, how much of it was touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossamer.report import words
from gossamer.training.metric import ACCURACY, Metric

__all__ = ["covers", "fits", "keeps", "section"]

_MOST = 4  # kinds of modules that are named


def keeps(floor: Mapping[str, Any], metric: Metric = ACCURACY) -> str:
    """The verdict on the floor of a run.

    >>> keeps({"max_drop": 0.005, "reference": 0.88, "score": 0.7525, "kept": False})
    'FLOOR NOT KEPT: validation accuracy 88.00 % to 75.25 %, 12.75 points of at most 0.50 lost'
    """
    before, after = floor["reference"], floor["score"]
    lost = metric.show_drop(metric.drop(before, after))
    most = metric.show_drop(floor["max_drop"])
    change = f"validation {metric.name} {metric.show(before)} to {metric.show(after)}"
    if not floor["kept"]:
        number, _, unit = lost.partition(" ")
        least = most.partition(" ")[0]
        return f"FLOOR NOT KEPT: {change}, {number} {unit} of at most {least} lost"
    return f"floor kept: {change}, at most {most} may be lost"


def fits(asked: Mapping[str, Any]) -> str:
    """The verdict on the size of a file.

    >>> fits({"most": 3000, "bytes": 3120, "kept": False})
    'SIZE NOT KEPT: the file has 3,120 bytes of at most 3,000'
    """
    told = f"the file has {asked['bytes']:,} bytes of at most {asked['most']:,}"
    return told if asked["kept"] else f"SIZE NOT KEPT: {told}"


def covers(found: Mapping[str, Any]) -> str:
    """How much of a network stages act on, and what is outside.

    >>> outside = {"Embedding": [4, 90], "Conv1D": [12, 7]}
    >>> covers({"parameters": 100, "covered": 3, "outside": outside})
    'covers 3.0 % of the parameters; 97.0 % are outside: 4 Embedding, 12 Conv1D'
    """
    total = max(1, found["parameters"])
    text = f"covers {100 * found['covered'] / total:.1f} % of the parameters"
    rows = list(found["outside"].items())
    if not rows:
        return text
    parts = [f"{row[0]} {kind}" for kind, row in rows[:_MOST]]
    if len(rows) > _MOST:
        parts.append(words.count(len(rows) - _MOST, "more kind"))
    left = 100 * (found["parameters"] - found["covered"]) / total
    return f"{text}; {left:.1f} % are outside: {', '.join(parts)}"


def section(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Sentences, each with whether it is bad news, and a row for each stage that acts on layers."""
    told: list[tuple[str, bool]] = []
    floor = run.get("floor")
    if floor:
        kept = keeps(floor, words.metric(run))
        told.append((kept[:1].upper() + kept[1:] + ".", not floor["kept"]))
    if asked := run.get("size"):
        told.append((f"{fits(asked)[:1].upper()}{fits(asked)[1:]}.", not asked["kept"]))
    back = run["bytes"].get("reloaded") or {}
    if back.get("not_proved"):
        told.append((f"Not proved: {back['not_proved']}.", True))
    elif back.get("same_outputs"):
        told.append(
            (
                f"The file was proved with a network built anew from {back.get('built')}, "
                f"evaluated in {back.get('evaluated_in')}: its outputs are those of the network "
                "that was packed.",
                False,
            )
        )
    stages = run.get("stages") or []
    for stage in stages:
        if rolled := stage.get("rolled_back"):
            told.append(
                (
                    f"{stage['stage']} went back to round {rolled['round']} of {rolled['rounds']}, "
                    f"density {rolled['density']:.4f} in place of {rolled['asked']:.4f}: later "
                    "rounds cost more than the whole run may.",
                    True,
                )
            )
    told += [
        (f"{note}.", False) for note in (*(run.get("notes") or ()), *(back.get("notes") or ()))
    ]
    if run.get("coverage"):
        told.append((f"The recipe {covers(run['coverage'])}.", False))
    rows = [(str(s["stage"]), covers(s["coverage"])) for s in stages if s.get("coverage")]
    if not told and not rows:
        return None
    return {"told": told, "head": ("Stage", "Of the network"), "rows": rows}
