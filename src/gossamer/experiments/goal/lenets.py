"""LeNets of a given size, by the library's own recipes; test errors, three seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.compression import run
from gossamer.compression.recipe import load
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.recipes import figures, of_recipes

__all__ = ["lenets"]

# recipe -> point, bytes, percent of error
LENETS = {"lenet-300-100-sized": ("goal.3", 8_000, 1.7)}
_QUICK = (
    "subset=2000",
    "stages.train.epochs=1",
    "stages.prune.rounds=1",
    "stages.prune.retrain.epochs=1",
    "stages.rate_aware.retrain.epochs=1",
)


def _figures(recipe: str, seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """One recipe with one seed."""
    plan = load(recipe, [f"seed={seed}", *(_QUICK if quick else ())])
    found = run(plan, None, None, work / f"{recipe}-{seed}")
    return {
        "recipe": recipe,
        "seed": seed,
        "size": found.run["size"],
        "floor": found.run["floor"],
        **figures(found),
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for recipe, (point, most, error) in LENETS.items():
        row = raw["summary"][recipe]
        size, after = row["bytes"]["max"], row["error_after"]["mean"]
        claims += [
            Claim(point, f"{recipe}: the largest file of the seeds, bytes", size, "<=", most),
            Claim(point, f"{recipe}: test error, mean of the seeds, percent", after, "<=", error),
        ]
    return claims


@experiment("sized-lenets", judge=_judge)
def lenets(context: Context) -> dict[str, Any]:
    """Goal 3: LeNet-300-100 in 8,000 bytes, in one run."""
    jobs = [
        (recipe, seed, of_recipes(context.work, recipe), context.quick)
        for recipe in LENETS
        for seed in context.seeds
    ]
    rows = context.map(_figures, jobs)
    summary = {}
    for recipe in LENETS:
        mine = [r for r in rows if r["recipe"] == recipe]
        keys = ("bytes", "ratio", "error_before", "error_after")
        summary[recipe] = {key: spread([r[key] for r in mine]) for key in keys}
        summary[recipe]["file_kb"] = spread([r["bytes"] / 1000 for r in mine])
    return {"summary": summary, "runs": rows}
