"""The page: run.json in, one self-contained HTML file out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gossamer.errors import ArgumentError
from gossamer.report import plots

__all__ = ["render", "write"]

Section = dict[str, Any]
_NEEDED = ("name", "model", "dataset", "accuracy", "bytes")


def _size(count: float) -> str:
    """Bytes for people; KB is 1000 bytes."""
    if count < 1000:
        return f"{count:.0f} B"
    if count < 1e6:
        return f"{count / 1e3:.2f} KB" if count < 1e4 else f"{count / 1e3:.1f} KB"
    return f"{count / 1e6:.2f} MB"


def _percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f} %"


def _verdict(before: Mapping[str, Any], after: Mapping[str, Any], ratio: float) -> tuple[str, str]:
    """What came of it, said plainly, and its colour."""
    change = 100 * (after["accuracy"] - before["accuracy"])
    if ratio <= 1:
        return f"No gain: the file is not smaller than the dense weights ({ratio:.2f}x).", "bad"
    if after["accuracy"] < before["low"]:
        return (
            f"Accuracy fell by {-change:.2f} points, below the 95 % interval it had before.",
            "bad",
        )
    if change < 0:
        return (
            f"Accuracy changed by {change:+.2f} points, within the 95 % interval of what it was.",
            "good",
        )
    return f"No accuracy lost ({change:+.2f} points).", "good"


def _table(head: list[str], rows: list[list[str]], total: list[str] | None = None) -> Section:
    cells = [{"cells": row, "total": False} for row in rows]
    if total is not None:
        cells.append({"cells": total, "total": True})
    return {"head": head, "rows": cells}


def _accuracy(run: Mapping[str, Any]) -> Section:
    rows = [
        (name, figures["accuracy"], figures["low"], figures["high"])
        for name, figures in (
            ("before", run["accuracy"]["before"]),
            ("after", run["accuracy"]["after"]),
        )
    ]
    total = run["accuracy"]["after"]["total"]
    return {
        "title": "Accuracy before and after",
        "note": f"On {total:,} held-back test examples; bars are 95 % confidence intervals "
        "(Wilson).",
        "plot": Markup(plots.interval(rows, label="Accuracy before and after")),
    }


def _where(run: Mapping[str, Any]) -> Section | None:
    layers = [layer for layer in run.get("layers") or [] if layer["bytes"]]
    if not layers:
        return None
    told = sum(layer["bytes"] for layer in layers)
    rows = [(layer["name"], layer["parts"]) for layer in layers]
    rest = run["bytes"]["file"] - told
    if rest > 0:
        rows.append(("header and metadata", {"header": rest}))
    return {
        "title": "Where the bytes go",
        "note": f"All {run['bytes']['file']:,} bytes of the file, by tensor and part.",
        "plot": Markup(plots.stacked(rows, label="Bytes of the file by tensor and part")),
    }


def _layers(run: Mapping[str, Any]) -> Section | None:
    layers = run.get("layers") or []
    if not layers:
        return None
    rows = [
        [
            layer["name"],
            " × ".join(map(str, layer["shape"])) or "scalar",
            f"{layer['numel']:,}",
            _percent(layer["density"], 1),
            f"{layer['distinct']:,}",
            layer["codec"],
            f"{layer['bytes']:,}",
            f"{layer['bits_per_weight']:.2f}",
        ]
        for layer in layers
    ]
    head = ["tensor", "shape", "values", "density", "distinct", "codec", "bytes", "bits a value"]
    return {"title": "Tensors", "table": _table(head, rows)}


def _paper(run: Mapping[str, Any]) -> Section | None:
    told = [(x["name"], x["paper"]) for x in run.get("layers") or [] if x.get("paper")]
    if not told:
        return None
    rows = [
        [
            name,
            f"{p['weights']:,}",
            f"{p['kept_percent']:.1f} %",
            f"{p['weight_bits']:.0f}",
            f"{p['weight_bits_huffman']:.1f}",
            f"{p['index_bits']:.0f}",
            f"{p['index_bits_huffman']:.1f}",
            f"{p['rate_pq_percent']:.2f} %",
            f"{p['rate_pqh_percent']:.2f} %",
        ]
        for name, p in told
    ]
    weights = sum(p["weights"] for _, p in told) or 1

    def mean(key: str) -> float:
        return float(sum(p[key] * p["weights"] for _, p in told)) / weights

    total = [
        "total", f"{weights:,}", f"{mean('kept_percent'):.1f} %", "", "", "", "",
        f"{mean('rate_pq_percent'):.2f} %", f"{mean('rate_pqh_percent'):.2f} %",
    ]  # fmt: skip
    head = [
        "layer", "weights", "kept (P)", "weight bits (P+Q)", "(P+Q+H)", "index bits (P+Q)",
        "(P+Q+H)", "rate (P+Q)", "rate (P+Q+H)",
    ]  # fmt: skip
    return {
        "title": "Deep Compression's table",
        "note": "P pruned, Q shared values, H Huffman coded. Computed with the paper's own coding "
        "(fixed-width position differences, filler zeros), whatever the file itself uses.",
        "table": _table(head, rows, total),
    }


def _densities(run: Mapping[str, Any]) -> Section | None:
    scan = run.get("sensitivity") or {}
    if not scan:
        return None
    series = {name: [(d, a) for d, a in sorted(points)] for name, points in scan.items()}
    return {
        "title": "Sensitivity",
        "note": "Accuracy when one layer alone is pruned to a density, before any retraining.",
        "plot": Markup(
            plots.lines(
                series,
                label="Accuracy against density, one layer at a time",
                x_label="density of the layer",
                y_label="validation accuracy",
                percent=True,
                log_x=True,
            )
        ),
    }


def _codebooks(run: Mapping[str, Any]) -> Section | None:
    small = []
    for layer in run.get("layers") or []:
        book, counts = layer.get("codebook") or [], layer.get("histogram") or []
        kept = [(v, c) for v, c in zip(book, counts, strict=True) if v]
        if kept:
            values, heights = [v for v, _ in kept], [c for _, c in kept]
            caption = f"{layer['name']}: {len(kept)} values"
            small.append((caption, Markup(plots.bars(values, heights, label=caption))))
    if not small:
        return None
    return {
        "title": "Shared values",
        "note": "How many kept weights take each shared value; zero is left out.",
        "small": small,
    }


def _curves(run: Mapping[str, Any]) -> Section | None:
    rows = run.get("curves") or []
    series: dict[str, list[plots.Point]] = {}
    for i, row in enumerate(rows):
        series.setdefault(row["stage"], []).append((i + 1, row["validation_accuracy"]))
    if not series:
        return None
    return {
        "title": "Training",
        "plot": Markup(
            plots.lines(
                series,
                label="Validation accuracy over all epochs",
                x_label="epoch, over all stages",
                y_label="validation accuracy",
                percent=True,
            )
        ),
    }


def _mask(run: Mapping[str, Any]) -> Section | None:
    image = run.get("mask_image")
    if not image:
        return None
    return {
        "title": "What the first layer looks at",
        "note": f"For each input pixel, how many of the {image['out']:,} units of "
        f"{image['name']} kept their weight; the darker, the more.",
        "kind": "picture",
        "plot": Markup(plots.heat(image["counts"], label="Weights kept for each input pixel")),
    }


def _latency(run: Mapping[str, Any]) -> Section | None:
    found = run.get("latency")
    if not found:
        return None
    faster = found["ratio"] >= 1.1
    said = f"{found['ratio']:.2f}x faster." if faster else "No speed-up."
    rows = [
        ["dense", f"{found['dense_ms']:.3f} ms"],
        ["decoded from the file", f"{found['compressed_ms']:.3f} ms"],
    ]
    return {
        "title": "Latency",
        "note": f"{said} {found.get('note') or ''} {found['engine']}, batch {found['batch']}, "
        "least of interleaved runs.",
        "table": _table(["network", "one forward pass"], rows),
    }


def _stages(run: Mapping[str, Any]) -> Section | None:
    rows = [
        [
            s["stage"],
            _percent(s["accuracy"]),
            _percent(s["density"], 1),
            f"{s['bytes']:,}" if s.get("bytes") else "",
            f"{s['seconds']:.1f} s",
        ]
        for s in run.get("stages") or []
    ]
    if not rows:
        return None
    head = ["stage", "validation accuracy", "density", "file bytes", "time"]
    return {"title": "Stages", "table": _table(head, rows)}


def _how(run: Mapping[str, Any]) -> Section:
    lines = [f"$ {run['command']}"] if run.get("command") else []
    for key in ("versions", "hardware"):
        if run.get(key):
            lines.append(f"{key}: " + ", ".join(f"{k} {v}" for k, v in run[key].items()))
    if run.get("recipe"):
        lines += ["", "recipe:", str(run["recipe"]).rstrip()]
    return {"title": "How it was made", "pre": "\n".join(lines)}


_SECTIONS: tuple[Callable[[Mapping[str, Any]], Section | None], ...] = (
    _accuracy,
    _where,
    _paper,
    _densities,
    _codebooks,
    _mask,
    _curves,
    _latency,
    _stages,
    _layers,
    _how,
)


def render(run: Mapping[str, Any]) -> str:
    """The page of a run as HTML text; absent sections are left out.

    Raises :class:`ArgumentError` when ``run`` lacks what every run has.
    """
    missing = [key for key in _NEEDED if key not in run]
    if missing:
        raise ArgumentError(f"run lacks {', '.join(missing)}: this is no run.json of ours")
    before, after = run["accuracy"]["before"], run["accuracy"]["after"]
    size = run["bytes"]
    headline = (
        f"{run['model']} on {run['dataset']}: {_size(size['dense'])} became {_size(size['file'])}, "
        f"{size['ratio']:.1f}x smaller, at {_percent(after['accuracy'])} accuracy"
    )
    verdict, kind = _verdict(before, after, size["ratio"])
    weights = [x for x in run.get("layers") or [] if len(x["shape"]) >= 2]
    numel = sum(x["numel"] for x in weights)
    facts = [
        ("File", _size(size["file"]), f"{size['file']:,} bytes"),
        ("Smaller by", f"{size['ratio']:.1f}x", f"from {_size(size['dense'])}"),
        (
            "Accuracy before",
            _percent(before["accuracy"]),
            f"{before['correct']:,}/{before['total']:,}",
        ),
        ("Accuracy after", _percent(after["accuracy"]), f"{after['correct']:,}/{after['total']:,}"),
    ]
    if numel:
        kept = sum(x["kept"] for x in weights)
        facts.append(("Weights kept", _percent(kept / numel, 1), f"{kept:,} of {numel:,}"))
    back = size.get("reloaded") or {}
    if back.get("identical"):
        where = "decoded in a fresh process" if back.get("fresh_process") else "decoded again"
        facts.append(("Lossless", "yes", f"{where}, every bit the same"))
    sections = [s for s in (make(run) for make in _SECTIONS) if s is not None]
    environment = Environment(
        loader=PackageLoader("gossamer.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    full = {"note": None, "plot": None, "small": None, "table": None, "pre": None, "kind": ""}
    return environment.get_template("report.html.j2").render(
        title=headline,
        headline=headline,
        verdict=verdict,
        verdict_kind=kind,
        facts=facts,
        sections=[{**full, **s} for s in sections],
        run={"created": None, **run},
    )


def write(run: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page of a run, atomically: one file that needs no network.

    Raises :class:`ArgumentError` as :func:`render` does.
    """
    path = Path(path)
    text = render(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
