"""The sparse ResNet-20 of :mod:`gossamer.experiments.inference.networks`: a recipe's run.

A module of its own, so that timings can be changed and repeated without the training: the folder
that it works in is named by this module's source.
"""

from __future__ import annotations

from pathlib import Path

from gossamer.compression import run
from gossamer.compression.recipe import load

__all__ = ["RECIPE", "made"]

RECIPE = "resnet-20-sparse"
_QUICK = ("subset=500", "stages.obs.calibration=16", "stages.train.epochs=1")


def made(seed: int, work: Path, quick: bool) -> str:
    """The recipe's run with one seed, below ``work``: where its file lies there.

    Killed, it resumes; finished, it reads what it wrote.
    """
    folder = f"{RECIPE}-{seed}"
    overrides = [f"seed={seed}", *(_QUICK if quick else ())]
    run(load(RECIPE, overrides), None, None, work / folder)
    return f"{folder}/model.gsm"
