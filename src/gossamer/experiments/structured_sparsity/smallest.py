"""LeNet-5 on MNIST shrunk first, then trained under a price for bits: how small does it get?

The recipe ``lenet-5-shrunk``, as a user runs it: filters and hidden units of a trained network go
and the rest is taken out; what is left is trained on a grid under a price for every bit, taught by
the network before. So no bits are spent on where in a large matrix the few weights stand.
Training images are shifted by up to two pixels (:func:`shifted`), for the small network too.
Settings were chosen on validation images with seed 0; the test images are evaluated, and decide
nothing. Size, error and milliseconds are those of run.json: of the file, decoded in a fresh
process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.compression import run
from gossamer.compression.recipe import load
from gossamer.experiments import Claim, Context, experiment, spread
from gossamer.experiments.shared.lenets import mnist
from gossamer.experiments.shared.recipes import figures as of_run
from gossamer.experiments.shared.recipes import of_recipes

__all__ = ["RECIPE", "figures", "shifted", "shrunk_lenet"]

RECIPE = "lenet-5-shrunk"
_QUICK = (
    "stages.train.epochs=2", "stages.prune.retrain.epochs=1",
    "stages.rate_aware.retrain.epochs=2", "max_drop=1",
)  # fmt: skip


def shifted(images: Tensor, generator: torch.Generator, *, most: int = 2) -> Tensor:
    """Each image moved by up to so many pixels down and to the side; (N, C, H, W)."""
    n, _, h, w = images.shape
    at = torch.randint(0, 2 * most + 1, (2, n), generator=generator, device=generator.device)
    ground = float(images.min())  # what is behind the digits
    padded = torch.nn.functional.pad(images, (most,) * 4, value=ground)
    crops = padded.unfold(2, h, 1).unfold(3, w, 1)  # a view: (N, C, dy, dx, H, W)
    return crops[torch.arange(n), :, at[0], at[1]]


def figures(seed: int, work: Path, quick: bool) -> dict[str, Any]:
    """The recipe with one seed."""
    overrides = [f"seed={seed}", *(_QUICK if quick else ())]
    data = replace(mnist(quick), augment=shifted)
    done = run(load(RECIPE, overrides), None, data, work / f"{RECIPE}-{seed}")
    told = done.run
    return {
        "seed": seed,
        **of_run(done),
        "macs": [told["macs"][when]["macs"] for when in ("before", "after")],
        "latency": told["latency"]["rows"],
    }


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    page, rows = "structured-sparsity.beyond", raw["runs"]
    error = spread([r["error_after"] for r in rows])["mean"]
    return [
        Claim(page, "LeNet-5 shrunk, then rate-aware: largest file of the seeds, KB",
              max(r["bytes"] for r in rows) / 1000, "<=", 4.0),
        Claim(page, f"its test error, %, mean of {len(rows)}", error, "<=", 0.8),
    ]  # fmt: skip


@experiment("smallest-shrunk-lenet", seeds=(0,), judge=_judge)
def shrunk_lenet(context: Context) -> dict[str, Any]:
    """Structured sparsity: LeNet-5 shrunk, then trained under a price for bits, on MNIST."""
    # one after the other: each ends with milliseconds
    folder = of_recipes(context.work, RECIPE)
    rows = context.alone(figures, [(s, folder, context.quick) for s in context.seeds])
    return {"recipe": RECIPE, "runs": rows}
