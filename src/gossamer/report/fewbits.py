"""What the page says of few bits: weights, activations, fixed point, factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from gossamer.report import plots, tables, words
from gossamer.training.metric import Metric

__all__ = ["activations", "ends", "fixed_point", "noted", "svd", "weights"]

Run = Mapping[str, Any]
Section = dict[str, Any]

_HEAD = (
    "Layer", "Weights", "Values", "Bits", "Bits in the file", "Not zero", "Smallest to largest",
)  # fmt: skip


def noted(run: Run, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The stages that left notes under a key."""
    for stage in run.get("stages") or []:
        if stage.get(key):
            yield str(stage["stage"]), stage[key]


def ends(run: Run, notes: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Final and best epoch, where there was a training."""
    of = words.metric(run)
    return [
        (when, f"{of.name} {words.score(of, notes[when]['score'])}", notes[when]["epoch"])
        for when in ("final", "best")
        if when in notes
    ]


def weights(run: Run) -> Section | None:
    """One block a ``quantize`` stage: its layers, and the way of their values."""
    sizes = {str(x["name"]): x for x in run.get("layers") or []}
    blocks = []
    for stage, notes in noted(run, "quantize"):
        rows = []
        for x in notes["layers"]:
            now = sizes.get(x["name"])
            # a later stage may have given the layer other values
            same = now and now["numel"] and now["distinct"] == x["values"]
            stored = f"{8 * now['bytes'] / now['numel']:.2f}" if now and same else "–"
            rows.append(
                [
                    tables.layer_name(x),
                    f"{x['weights']:,}",
                    f"{x['values']:,}",
                    f"{x['bits']:.3g}",
                    stored,
                    words.percent(x["density"], 1),
                    f"{x['low']:.3g} to {x['high']:.3g}".replace("-", "−"),
                ]
            )
        count = sum(x["weights"] for x in notes["layers"])
        dense = sum(x["weights"] * x["density"] for x in notes["layers"]) / max(1, count)
        blocks.append(
            {
                "title": f"{stage}: {notes['method']}",
                "density": words.percent(dense, 1),
                "weights": f"{count:,}",
                "epochs": ends(run, notes),
                "warnings": notes.get("warnings") or [],
                "head": _HEAD,
                "rows": rows,
                "small": _trajectories(notes.get("trajectory") or [], stage),
            }
        )
    return {"blocks": blocks} if blocks else None


def _trajectories(rows: list[Mapping[str, Any]], stage: str) -> list[tuple[str, str, Markup]]:
    """Largest value in colour, size of the smallest in grey, over the steps, a plot a layer."""
    if len(rows) < 2:
        return []
    x = plots.Axis(0, rows[-1]["step"], plots.axis([0, rows[-1]["step"]], ticks=3).ticks)
    small = []
    for i, name in enumerate(rows[0]["high"]):
        high = [(r["step"], r["high"][name]) for r in rows]
        low = [(r["step"], -r["low"][name]) for r in rows]
        y = plots.axis([v for _, v in high + low], ticks=3)
        ident = f"low-{stage}-{i}"
        behind = plots.shared_lines({name: low}, x, y, ident, second=True)
        layer = name.removesuffix(".weight")
        label = (
            f"{layer}: largest value from {high[0][1]:.3g} to {high[-1][1]:.3g}, size of the "
            f"smallest from {low[0][1]:.3g} to {low[-1][1]:.3g}"
        )
        svg = plots.lines(
            high, x, y, label=label, height=104, behind=ident, small=len(rows[0]["high"]) > 9
        )
        note = f"{words.percent(rows[-1]['density'][name], 1)} not zero"
        small.append((layer, note, Markup(behind + svg)))
    return small


def activations(run: Run) -> Section | None:
    """Levels of the quantized ReLUs, a block a stage."""
    blocks = []
    for stage, notes in noted(run, "activations"):
        top = 2 ** notes["bits"] - 1
        blocks.append(
            {
                "title": stage,
                "bits": notes["bits"],
                "estimator": notes["estimator"],
                "epochs": ends(run, notes),
                "head": ("Activation", "Alpha at the start", "Alpha", "Largest level"),
                "rows": [
                    [
                        x["name"],
                        f"{x['start']:.4g}",
                        f"{x['alpha']:.4g}",
                        f"{top * x['alpha']:.4g}",
                    ]
                    for x in notes["layers"]
                ],
            }
        )
    return {"blocks": blocks} if blocks else None


def fixed_point(run: Run) -> Section | None:
    """Lengths by layer, the integer-only pass, and dynamic against static."""
    for _, notes in noted(run, "fixed_point"):
        rows = [
            [x["name"], *("–" if x[k] is None else f"{x[k]}" for k in _LENGTHS)]
            for x in notes["layers"]
        ]
        integer = run.get("integer") or notes["integer"]
        compared = notes.get("compare")
        return {
            "mode": notes["mode"],
            "bits": notes["activation_bits"],
            "input": notes["input_length"],
            "integer": {
                "identical": integer["identical"],
                "correct": f"{integer['correct']:,} of {integer['total']:,}"
                if integer.get("correct") is not None
                else None,
                "split": "test" if run.get("integer") else "validation",
            },
            "head": ("Layer", "Weight bits", "Weight length", "Bias length", "Output length"),
            "rows": [[cell.replace("-", "−") for cell in row] for row in rows],
            "compare": _compared(compared, notes["float_score"], words.metric(run))
            if compared
            else None,
        }
    return None


_LENGTHS = ("bits", "weight", "bias", "output")


def _compared(rows: list[Mapping[str, Any]], whole: float, of: Metric) -> Section:
    rows = sorted(rows, key=lambda r: r["bits"])
    values = [r[mode] for r in rows for mode in ("dynamic", "static")]
    # evenly apart: few bits are where they differ
    x = plots.Axis(0, len(rows) - 1, tuple((i, f"{r['bits']}") for i, r in enumerate(rows)))
    y = plots.axis([*values, whole], percent=of.unit == "%")
    curves = {m: [(i, r[m]) for i, r in enumerate(rows)] for m in ("dynamic", "static")}
    told = ", ".join(
        f"{r['bits']} bits {words.score(of, r['dynamic'])} against {words.score(of, r['static'])}"
        for r in rows
    )
    behind = plots.shared_lines({"": curves["static"]}, x, y, "static-lengths", second=True)
    svg = plots.lines(
        curves["dynamic"],
        x,
        y,
        label=f"Validation {of.name} by bits, dynamic against static: {told}",
        behind="static-lengths",
    )
    return {
        "name": of.name,
        "whole": words.score(of, whole),
        "plot": Markup(behind + svg),
        "head": ("Bits", "Dynamic", "Static"),
        "rows": [
            [str(r["bits"]), words.score(of, r["dynamic"]), words.score(of, r["static"])]
            for r in reversed(rows)
        ],
    }


def svd(run: Run) -> Section | None:
    """Ranks and sizes of the factorized layers, a block a stage."""
    blocks = []
    for stage, notes in noted(run, "svd"):
        rows = [
            [
                x["name"],
                f"{x['rank']:,}",
                f"{x['before']:,}",
                f"{x['after']:,}",
                words.ratio(x["before"] / x["after"]),
            ]
            for x in notes["layers"]
        ]
        blocks.append(
            {
                "title": stage,
                "text": "Linear layers as products of two, cut to their largest singular values.",
                "epochs": ends(run, notes),
                "head": ("Layer", "Rank", "Weights before", "Weights after", "Ratio"),
                "rows": rows,
            }
        )
    blocks += [_low_rank(run, stage, notes) for stage, notes in noted(run, "low_rank")]
    return {"blocks": blocks} if blocks else None


def _low_rank(run: Run, stage: str, notes: Mapping[str, Any]) -> Section:
    """Ranks, energies, multiply-adds and measured milliseconds of a stage's layers."""
    (macs, fewer), (parameters, less) = notes["macs"], notes["parameters"]
    rows = [
        [
            x["name"],
            x["form"],
            " ".join(f"{r:,}" for r in x["ranks"]),
            words.percent(x["energy"]),
            *(f"{n:,}" for n in (*x["macs"], *x["parameters"])),
            *(f"{ms:.3g}" for ms in x["ms"]),
        ]
        for x in notes["layers"]
    ]
    return {
        "title": f"{stage}: {notes['kind']}",
        "text": f"Layers as factors of low rank: {macs:,} multiply-adds of all layers became "
        f"{fewer:,}, {parameters:,} parameters {less:,}. Milliseconds are of the layer alone, "
        "batch 1, in torch.",
        "epochs": ends(run, notes),
        "head": (
            *("Layer", "Form", "Ranks", "Energy", "Multiply-adds", "after", "Parameters"),
            *("after", "ms", "after"),
        ),
        "rows": rows,
    }
