"""Settings of trained ternary quantization and of TWN, chosen on the validation split.

What :mod:`gossamer.experiments.ttq.ttq` runs on the test split is the best of these. Both methods
have their pick of learning rates; TTQ also of the fraction of weights that are not zero. The
gradients of its scales are sums over a layer: under SGD they have a rate of their own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gossamer.experiments import Context, experiment
from gossamer.experiments.ttq.ttq import LENET_5, RESNET_20, Setting, only_float, retrained

__all__ = ["search"]

SCALES = 2e-4  # learning rate of Wp and Wn under SGD


def _tried() -> list[tuple[str, Setting]]:
    few = replace(RESNET_20, retrain=replace(RESNET_20.retrain, epochs=2), rates=None)
    ternary = [
        (0.5, 0.05, SCALES), (0.57, 0.02, SCALES), (0.57, 0.05, SCALES), (0.57, 0.1, SCALES),
        (0.57, 0.05, 5 * SCALES),
    ]  # fmt: skip
    return [
        *(("ttq", _set(LENET_5, LENET_5.retrain.lr, d, 1.0)) for d in (0.4, 0.5, 0.6)),
        *(("ttq", _set(few, lr, d, scales / lr)) for d, lr, scales in ternary),
        *(("twn", _set(few, lr, 0.5, 1.0)) for lr in (0.02, 0.05, 0.1)),
    ]


def _set(setting: Setting, lr: float, density: float, factor: float) -> Setting:
    return replace(
        setting,
        retrain=replace(setting.retrain, lr=lr),
        options={"density": density, "start": "fit", "lr_factor": factor},
        rates=None,
        tag=f"-{lr:g}-{density:g}-{factor:g}",
    )


def _one(kind: str, setting: Setting, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """A setting's error on the validation split; what it is on the test split stays unread."""
    row = retrained(setting, kind, seed, work, quick)
    return {
        "net": setting.name,
        "kind": kind,
        "lr": setting.retrain.lr,
        "density": setting.options["density"] if kind == "ttq" else None,
        "lr_factor": setting.options["lr_factor"] if kind == "ttq" else None,
        "epochs": setting.retrain.epochs,
        "validation": row["validation"],
    }


@experiment("ttq-search", seeds=(0,), judge=lambda raw: [])
def search(context: Context) -> dict[str, Any]:
    """TTQ 3, 4: settings of TTQ and TWN by validation error, for ttq-lenet and ttq-resnet20."""
    (seed,) = context.seeds
    # before several jobs want it
    context.map(only_float, [(LENET_5, seed, context.work, context.quick)])
    rows = context.map(_one, [(k, s, seed, context.work, context.quick) for k, s in _tried()])
    return {"tried": rows, "used_over_least": _over(rows, seed)}


def _over(rows: list[dict[str, Any]], seed: int) -> dict[str, float]:
    """Validation error of the setting that is used over the least one tried, points."""
    found = {}
    for kind, used in (("ttq", LENET_5), ("ttq", RESNET_20), ("twn", RESNET_20)):
        of_both = [r for r in rows if (r["net"], r["kind"]) == (used.name, kind)]
        same: dict[str, Any] = {"lr": used.budget(kind, seed).lr}
        if kind == "ttq":
            same |= {key: used.options.get(key) for key in ("density", "lr_factor")}
        errors = [r["validation"] for r in of_both if all(r[k] == v for k, v in same.items())]
        least = min(r["validation"] for r in of_both)
        found[f"{used.name}, {kind}"] = min(errors, default=float("nan")) - least
    return found
