"""What the page says, section by section, ready for the template.

A function a section; it gives None where the run has nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from gossamer.report import (
    curves,
    fewbits,
    layerwise,
    plots,
    promises,
    smaller,
    speed,
    structured,
    tables,
    words,
)

__all__ = ["SECTIONS", "byte_rows"]

Run = Mapping[str, Any]
Section = dict[str, Any]
_MOST_BARS = 60

_PARTS = {
    "positions": "positions",
    "codes": "codes",
    "context": "positions and codes, coded together",
    "codebook": "code books",
    "tables": "coder tables",
    "classes": "column classes",
    "raw": "raw values",
    "scales": "scales of rows or groups",
    "framing": "framing",
    "metadata": "metadata",
    "header": "header",
}


def _key_figures(run: Run) -> Section:
    size, found_of, of = run["bytes"], run.get("evaluation") or {}, words.metric(run)
    facts = [
        ("File", words.size(size["file"]), f"{size['file']:,} bytes"),
        ("Ratio", words.ratio(size["ratio"]), f"from {words.size(size['dense'])}"),
    ]
    name = of.name[:1].upper() + of.name[1:]
    for when in ("before", "after") if found_of else ():
        found = found_of[when]
        counted = "on" if found.get("correct") is None else f"{found['correct']:,} of"
        facts.append(
            (
                f"{name} {when}",
                words.score(of, found["score"]),
                f"{counted} {found['total']:,}",
            )
        )
    weights = _weights(run)
    numel, kept = sum(x["numel"] for x in weights), sum(x["kept"] for x in weights)
    if numel:
        facts.append(("Weights kept", words.percent(kept / numel, 1), f"{kept:,} of {numel:,}"))
        inside = sum(x["bytes"] for x in weights)
        told = f"{words.size(inside)} in {words.count(len(weights), 'layer')}"
        facts.append(("Bits a weight", f"{8 * inside / numel:.2f}", told))
    return {"facts": facts}


def _weights(run: Run) -> list[Mapping[str, Any]]:
    """Matrices and kernels; the other tensors are biases and normalisation."""
    return [x for x in run.get("layers") or [] if len(x["shape"]) >= 2]


def _evaluation(run: Run) -> Section | None:
    if not run.get("evaluation"):
        return None
    of = words.metric(run)
    fraction = of.unit == "%"
    told = [(when, run["evaluation"][when]) for when in ("before", "after")]
    ends = [words.interval(found) or (found["score"], found["score"]) for _, found in told]
    x = plots.axis([v for low_high in ends for v in low_high], percent=fraction)
    rows = []
    for (when, found), (low, high) in zip(told, ends, strict=True):
        shown = f"{100 * low:.2f} to {words.percent(high)}"
        if not fraction:
            shown = f"{low:.4g} to {words.score(of, high)}"
        if words.interval(found) is None:
            shown = "not known"
        value = words.score(of, found["score"])
        label = f"{of.name} {when}: {value}, 95 % interval {shown}"
        label = label[:1].upper() + label[1:]
        svg = plots.interval(found["score"], low, high, x, label=label, ticks=found is told[-1][1])
        rows.append((when.capitalize(), value, shown, Markup(svg)))
    losses = [words.number(found.get("loss")) for _, found in told]
    return {
        "name": of.name,
        "how": "Wilson" if of.name == "accuracy" else "by resampling",
        "rows": rows,
        "total": told[-1][1]["total"],
        "losses": None if None in losses else " before, ".join(f"{v:.4f}" for v in losses),
    }


def _reloaded(run: Run) -> Section:
    back = run["bytes"].get("reloaded") or {}
    return {
        "size": run["bytes"]["file"],
        "checked": "identical" in back,
        "identical": bool(back.get("identical")),
        "fresh": bool(back.get("fresh_process")),
        # files of earlier versions leave out the article
        "elsewhere": str(back.get("evaluated_in")).removeprefix("a ") == "fresh process",
        "evaluated": back.get("evaluated_in"),
    }


def byte_rows(run: Run) -> list[tuple[str, dict[str, int]]]:
    """Where the bytes go: (name, bytes by part) rows that add up to the file exactly.

    Tensors under a half percent of the file that are no weights share a row, and so do the
    smallest ones of very many; header and metadata are the last.
    """
    whole = int(run["bytes"]["file"])
    layers = [x for x in run.get("layers") or [] if x["bytes"]]
    if not layers:
        return []
    large = [x for x in layers if len(x["shape"]) >= 2 or 200 * x["bytes"] >= whole]
    large = sorted(large, key=lambda x: -x["bytes"])[:_MOST_BARS]
    chosen = {id(x) for x in large}
    rows = [(str(x["name"]), _exact(x)) for x in layers if id(x) in chosen]
    rest: dict[str, int] = {}
    for x in layers:
        if id(x) not in chosen:
            for part, count in _exact(x).items():
                rest[part] = rest.get(part, 0) + count
    if rest:
        count = len(layers) - len(chosen)
        rows.append((words.count(count, "small tensor"), rest))
    about = run["bytes"].get("parts") or {}
    tail = {part: int(about[part]) for part in ("metadata", "header") if about.get(part)}
    missing = whole - sum(sum(parts.values()) for _, parts in rows)
    tail["header"] = missing - tail.get("metadata", 0)
    if missing > 0:
        rows.append(("file header", {k: v for k, v in tail.items() if v > 0}))
    return rows


def _exact(layer: Mapping[str, Any]) -> dict[str, int]:
    """A layer's parts; bytes that none of them names count as framing."""
    parts = {str(k): int(v) for k, v in layer["parts"].items() if v}
    missing = int(layer["bytes"]) - sum(parts.values())
    if missing > 0:
        parts["framing"] = parts.get("framing", 0) + missing
    return parts


def _where(run: Run) -> Section | None:
    rows = byte_rows(run)
    if not rows:
        return None
    seen = {part for _, parts in rows for part in parts}
    order = [p for p in _PARTS if p in seen] + sorted(seen - set(_PARTS))
    sums = {part: sum(parts.get(part, 0) for _, parts in rows) for part in order}
    whole, widest = sum(sums.values()), max(sum(parts.values()) for _, parts in rows)

    def bar(name: str, parts: Mapping[str, int], full: int) -> Markup:
        told = [(p, parts[p]) for p in order if parts.get(p)]
        label = f"{name}: " + ", ".join(f"{_PARTS.get(p, p)} {n:,} B" for p, n in told)
        tips = [(_kind(p), n, f"{_PARTS.get(p, p)}: {n:,} B") for p, n in told]
        return Markup(plots.stacked(tips, full, label=label))

    return {
        "whole": whole,
        "total": bar("whole file", sums, whole),
        "legend": [
            (_kind(p), _PARTS.get(p, p), f"{n:,}", f"{100 * n / whole:.1f} %")
            for p, n in sums.items()
        ],
        "rows": [
            (name, f"{sum(parts.values()):,}", bar(name, parts, widest)) for name, parts in rows
        ],
    }


def _kind(part: str) -> str:
    """The CSS class of a part."""
    return f"p-{part}" if part in _PARTS else "p-other"


def _paper(run: Run) -> Section | None:
    layers = run.get("layers") or []
    rows = tables.paper_rows(layers)
    if not rows:
        return None
    left = [tables.layer_name(x) for x in _weights(run) if not x.get("paper")]
    return {"head": tables.PAPER_HEADER, "rows": rows, "left": left}


def _densities(run: Run) -> Section | None:
    weights = _weights(run)
    scan = {str(k): sorted(v) for k, v in (run.get("sensitivity") or {}).items() if v}
    if not scan and all(x["density"] >= 1 for x in weights):
        return None
    rows = [
        (
            tables.layer_name(x),
            words.percent(x["density"], 1),
            f"{x['kept']:,} of {x['numel']:,}",
            Markup(plots.bar(x["density"], label=f"density {words.percent(x['density'], 1)}")),
        )
        for x in weights
    ]
    kept = {str(x["name"]): x["density"] for x in weights}
    section: Section = {"rows": rows, "scan": [], "behind": ""}
    if scan:
        points = [p for curve in scan.values() for p in curve]
        x = plots.axis([p[0] for p in points], log=True, percent=True)
        of = words.metric(run)
        y = plots.axis([p[1] for p in points], percent=of.unit == "%", ticks=3)
        many = len(scan) > 1
        section["behind"] = Markup(plots.shared_lines(scan, x, y, "all-layers")) if many else ""
        for name, curve in scan.items():
            chosen = kept.get(name)
            svg = plots.lines(
                curve,
                x,
                y,
                label=f"{name}: {of.name} goes from {words.score(of, curve[-1][1])} to "
                f"{words.score(of, curve[0][1])} at density {words.percent(curve[0][0], 1)}",
                height=104,
                behind="all-layers" if many else None,
                marks=[chosen] if chosen is not None and chosen < 1 else [],
                small=len(scan) > 9,
            )
            note = "" if chosen is None else f"kept {words.percent(chosen, 1)}"
            section["scan"].append((name.removesuffix(".weight"), note, Markup(svg)))
    return section


def _codebooks(run: Run) -> Section | None:
    small = []
    for layer in run.get("layers") or []:
        pairs = zip(layer.get("codebook") or [], layer.get("histogram") or [], strict=False)
        kept = [(v, c) for v, c in pairs if v]
        if kept:
            values, counts = [v for v, _ in kept], [c for _, c in kept]
            label = (
                f"{tables.layer_name(layer)}: {len(kept)} shared values from {min(values):.3g} to "
                f"{max(values):.3g}, the most used by {max(counts):,} weights"
            )
            svg = plots.histogram(values, counts, label=label)
            small.append((tables.layer_name(layer), f"{len(kept)} values", Markup(svg)))
    return {"small": small} if small else None


def _mask(run: Run) -> Section | None:
    image = run.get("mask_image")
    if not image or not image["counts"]:
        return None
    counts = [v for row in image["counts"] for v in row]
    high, wide = image["shape"]
    label = f"{wide} by {high} pixels, from {min(counts):,} to {max(counts):,} weights kept"
    return {
        "name": image["name"],
        "out": image["out"],
        "high": max(counts),
        "unused": sum(v == 0 for v in counts),
        "pixels": len(counts),
        "plot": Markup(plots.heat(image["counts"], label=label)),
    }


def _stages(run: Run) -> Section | None:
    rows: list[list[str]] = []
    of = words.metric(run)
    for s in run.get("stages") or []:
        # a ticket search's rounds come before what it ended with
        rows += [
            [
                f"{s['stage']}, round {number}",
                words.score(of, part["score"]),
                words.percent(part["density"], 1),
                "–",
                "–",
            ]
            for number, part in enumerate(s.get("tickets") or ())
        ]
        rows.append(
            [
                str(s["stage"]),
                words.score(of, s.get("score")),
                words.percent(s.get("density"), 1),
                f"{s['bytes']:,}" if s.get("bytes") else "–",
                _seconds(s.get("seconds")),
            ]
        )
    if not rows:
        return None
    return {
        "head": ("Stage", f"Validation {of.name}", "Density", "File bytes", "Time"),
        "rows": rows,
    }


def _seconds(value: object) -> str:
    found = words.number(value)
    if found is None:
        return "–"
    return f"{found:.1f} s" if found < 120 else f"{found / 60:.1f} min"


def _tensors(run: Run) -> Section | None:
    layers = run.get("layers") or []
    return {"head": tables.LAYER_HEADER, "rows": tables.tensor_rows(layers)} if layers else None


def _made(run: Run) -> Section | None:
    facts: list[tuple[str, str]] = []
    for key in ("versions", "hardware"):
        facts += [(str(k), str(v)) for k, v in (run.get(key) or {}).items() if v is not None]
    if run.get("seed") is not None:
        facts.append(("seed", str(run["seed"])))
    recipe = run.get("recipe")
    if not (facts or recipe or run.get("command")):
        return None
    return {
        "command": run.get("command"),
        "recipe": str(recipe).rstrip() if recipe else None,
        "facts": facts,
    }


SECTIONS: dict[str, Callable[[Run], Section | None]] = {
    "figures": _key_figures,
    "promises": promises.section,
    "evaluation": _evaluation,
    "reloaded": _reloaded,
    "where": _where,
    "paper": _paper,
    "densities": _densities,
    "few_bits": fewbits.weights,
    "activations": fewbits.activations,
    "fixed_point": fewbits.fixed_point,
    "svd": fewbits.svd,
    "layerwise": layerwise.section,
    "groups": structured.groups,
    "shrink": smaller.shrink,
    "codebooks": _codebooks,
    "curves": curves.section,
    "mask": _mask,
    "latency": speed.latency,
    "stages": _stages,
    "tensors": _tensors,
    "made": _made,
}
"""What the template calls a section, and what makes it."""
