"""The file of :mod:`gossamer.experiments.inference.cifar_half_second`: a recipe's run.

It takes an hour or two of training, and is a module of its own so that timings can be changed and
repeated without it: the folder that it works in is named by this module's source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gossamer.compression import run
from gossamer.compression.recipe import load

__all__ = ["RECIPE", "made"]

RECIPE = "resnet-20-fast-smallest"
_QUICK = (
    "subset=500",
    "stages.prune.rounds=1",
    "stages.prune.retrain.epochs=1",
    "stages.rate_aware.retrain.epochs=1",
)


def made(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """The recipe's run with one seed, below ``work``: where its file lies there, and its figures.

    Killed, it resumes; finished, it reads what it wrote.
    """
    folder = f"{RECIPE}-{seed}"
    overrides = [f"seed={seed}", *(_QUICK if quick else ())]
    result = run(load(RECIPE, overrides), None, None, work / folder)
    return {
        "file": f"{folder}/model.gsm",
        "seed": seed,
        "bytes": result.bytes,
        "before": result.before.as_dict(),
        "after": result.after.as_dict(),
        "stages": result.run["stages"],
        "layers": [
            {k: row[k] for k in ("name", "shape", "density", "distinct", "codec", "bytes")}
            for row in result.run["layers"]
        ],
    }
