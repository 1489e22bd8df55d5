"""One stage ``obs`` on a network in memory, as a recipe's run has it, and the plain ways."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import datasets
from gossamer.compression.progress import Reporter
from gossamer.compression.stages.obs import Obs
from gossamer.compression.state import State
from gossamer.core import names
from gossamer.core.obs import factor, solve
from gossamer.datasets import Dataset, Split
from gossamer.prune import prune
from gossamer.quantize.obs import Rounded, inputs_together
from gossamer.training.tasks import chosen

__all__ = ["begun", "calibrated", "first", "obs", "plainly"]


def first(split: Split, count: int) -> Split:
    """Its first examples."""
    return Split(split.stored[:count], split.targets[:count], mean=split.mean, std=split.std)


def calibrated(quick: bool) -> Dataset:
    """CIFAR-10, of which a stage looks at a few training images without their labels."""
    return datasets.load("cifar10", subset=500 if quick else None)


def begun(model: nn.Module, data: Dataset, folder: Path, seed: int) -> State:
    """What stages work on: ``model`` itself. ``folder``: where they keep what is half done."""
    state = State(
        model, copy.deepcopy(model), data, folder, seed, Reporter(), chosen(None, data)[0]
    )
    state.number, state.name = 1, "1-obs"
    return state


def obs(state: State, **settings: Any) -> dict[str, Any]:
    """Run the stage. Its layers, processor seconds (one thread), and seconds on the clock."""
    busy, began = time.process_time(), time.monotonic()
    Obs(**settings).run(state)
    row = {
        **state.notes["obs"],
        "processor_seconds": time.process_time() - busy,
        "seconds": time.monotonic() - began,
    }
    for path in state.out.glob(f"{state.name}-*.train.pt"):
        path.unlink()
    return row


@torch.no_grad()
def plainly(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """A copy of the network, pruned by magnitude or rounded to nearest, layer by layer.

    On the grids of the stage's: steps of least squared error, one for each output or ``group``.
    """
    plain = copy.deepcopy(model)
    weights = names.weights(plain)
    if "density" in settings:
        together = inputs_together(settings.get("sparsity", "unstructured"))
        # the layers that the stage prunes
        fits = [n for n, w in weights.items() if w[0].numel() % together == 0]
        masks = prune(plain, dict.fromkeys(fits, settings["density"]))
        for name in fits:
            weights[name].masked_fill_(~masks[name], 0.0)
    else:
        for w in weights.values():
            matrix = w.reshape(len(w), -1)
            upper = factor(torch.eye(matrix.shape[1]), 0.0)  # nothing is carried on
            found = solve(matrix, upper, Rounded(settings["bits"], settings.get("group")))
            w.copy_(found.weight.reshape(w.shape))
    return plain
