"""LeNets on MNIST through the library's own recipes: one run a network and seed, shared by all.

The settings stand in the recipes of the networks' names alone. Choices were made on the
validation split; the test split is only ever evaluated.
"""

from __future__ import annotations

from pathlib import Path

from gossamer import datasets, nets
from gossamer.compression import run, saved
from gossamer.compression.progress import Reporter
from gossamer.compression.recipe import Recipe, load
from gossamer.compression.state import State
from gossamer.core.plain import copied
from gossamer.datasets import Dataset
from gossamer.experiments import Context
from gossamer.experiments.shared.recipes import of_recipes
from gossamer.training import Evaluation
from gossamer.training.tasks import Classification

__all__ = ["NETS", "after", "compressed", "error", "lenets_folder", "mnist", "recipe"]

NETS = ("lenet-300-100", "lenet-5")


def recipe(net: str, seed: int, quick: bool) -> Recipe:
    """The network's recipe with a seed; a smoke run's has 2,000 images and a short scan."""
    short = ["subset=2000", "stages.sensitivity.densities=[1, 0.1]"] if quick else []
    return load(net, [f"seed={seed}", *short])


def lenets_folder(context: Context) -> Path:
    """Where the runs of all these experiments lie; named by this module and the recipes."""
    return of_recipes(context.beside("lenets", __name__), *NETS)


def mnist(quick: bool) -> Dataset:
    """MNIST, 55,000 / 5,000 / 10,000; a smoke run takes 2,000 images."""
    return datasets.load("mnist", subset=2000 if quick else None)


def compressed(net: str, seed: int, work: Path, quick: bool) -> Path:
    """The directory of the recipe's run, which is done once."""
    out = work / f"{net}-{seed}"
    if not (out / "run.json").exists():
        run(recipe(net, seed, quick), None, None, out)
    return out


def after(stage: str, net: str, seed: int, work: Path, quick: bool) -> State:
    """The recipe's run as it was after a stage: the network, its masks, the next stage's number."""
    out, names = compressed(net, seed, work, quick), [s.stage for s in recipe(net, 0, quick).work]
    number, origin = names.index(stage) + 1, nets.build(net, seed=seed)
    data, task = mnist(quick), Classification()
    state = State(copied(origin), origin, data, out, seed, Reporter(), task, number=number + 1)
    saved.restore(state, out / f"stage-{number}.pt")
    return state


def error(result: Evaluation) -> float:
    """Percent of the examples got wrong."""
    return 100 * (1 - result.accuracy)
