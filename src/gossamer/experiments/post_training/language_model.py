"""The language model that post-training is tried on: a transformer trained on characters.

Trained once and shared by the seeds, as a published network would be; its folder is named by this
file, so that a changed experiment does not train it again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from gossamer import datasets, nets
from gossamer.datasets import Dataset
from gossamer.training import TrainConfig, train

__all__ = ["BITS", "NETWORK", "language_model", "shakespeare"]

NETWORK: dict[str, Any] = {"context": 64, "width": 160, "layers": 4, "heads": 5, "tied": False}
_SMALL = {**NETWORK, "width": 32, "layers": 2, "heads": 2}
BITS = 1 / math.log(2)
"""Bits of a nat. Tiny Shakespeare is ASCII, so bits per character are bits per byte."""
_EPOCHS = 2


def shakespeare(quick: bool) -> Dataset:
    """Windows of 64 characters."""
    return datasets.load("text:tiny-shakespeare", bptt=64, subset=256 if quick else None)


def language_model(folder: Path, quick: bool) -> nn.Module:
    """The trained network, 1.27 M parameters, from ``folder`` where it is done or under way."""
    data = shakespeare(quick)
    model = nets.build("gpt", classes=data.classes, seed=0, **(_SMALL if quick else NETWORK))
    config = TrainConfig(
        1 if quick else _EPOCHS,
        batch_size=16,
        lr=1e-3,
        optimizer="adam",
        schedule="cosine",
        grad_clip=1.0,
    )
    train(model, data, config, checkpoint=folder / "language-model.pt")
    return model
