"""What the stages of a run work on."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import names
from gossamer.datasets import Dataset
from gossamer.masks import Masks
from gossamer.method import Masked, Method
from gossamer.progress import Reporter
from gossamer.recipe import Training
from gossamer.seeded import Seed
from gossamer.training import load_checkpoint, soft_targets, train

__all__ = ["State"]


@dataclass
class State:
    """What the stages work on.

    Attributes:
        model: changed in place.
        out: run directory.
        masks: what is pruned so far; later training keeps it pruned.
        reference: the state before the first stage that compresses; a distillation's teacher.
        scan: layer -> [[density, accuracy], ...] of the last sensitivity scan.
        curves: a row an epoch, for the report.
        seeds: weights that are still a seed's under a mask, by clean name.
        notes: what the present stage reports besides, for its row.
    """

    model: nn.Module
    data: Dataset
    out: Path
    seed: int
    progress: Reporter
    masks: Masks = field(default_factory=Masks)
    reference: dict[str, Tensor] = field(default_factory=dict)
    scan: dict[str, list[list[float]]] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)
    seeds: dict[str, Seed] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    number: int = 0
    name: str = ""

    def train(self, settings: Training, methods: list[Method], part: int | None = None) -> None:
        """Train inside a stage, with a checkpoint and metrics of its own."""
        name = self.name if part is None else f"{self.name}-{part}"
        loss, teacher = None, None
        if settings.distill:
            teacher = copy.deepcopy(self.model)
            teacher.load_state_dict(self.reference)
            weight = settings.distill

            def loss(outputs: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
                return soft_targets(outputs, targets, wanted, weight=weight)

        history = train(
            self.model,
            self.data,
            # Another seed in every training: none sees the data in another one's order.
            settings.config(self.seed * 10_000 + self.number * 100 + (part or 0)),
            methods=methods,
            loss=loss,
            teacher=teacher,
            checkpoint=self.out / f"{name}.train.pt",
            metrics=self.out / "metrics" / f"{name}.jsonl",
            progress=lambda p: self.progress.training(name, p),
        )
        keys = ("epoch", "train_loss", "validation_accuracy")
        self.curves += [{"stage": name, **{k: row[k] for k in keys}} for row in history.epochs]

    def generator(self, part: int = 0) -> torch.Generator:
        """Randomness of the present stage."""
        return torch.Generator().manual_seed(self.seed * 10_000 + self.number * 100 + part)

    def others(self, handled: Any) -> list[Method]:
        """What keeps the masks of layers that the stage's own method does not handle."""
        left = Masks({n: m for n, m in self.masks.items() if n not in handled})
        return [Masked(left)] if left else []

    def initial(self) -> names.Tensors:
        """The weights that the run began with, by clean name."""
        saved = load_checkpoint(self.out / "stage-0.pt")["model"]
        return {names.clean(n): t for n, t in saved.items()}

    def to_initial(self) -> None:
        """Set the model to them."""
        self.model.load_state_dict(load_checkpoint(self.out / "stage-0.pt")["model"])

    def forget_seeds(self) -> None:
        """Drop the seeds of weights that a stage has changed."""
        weights = names.parameters(self.model)
        self.seeds = {n: s for n, s in self.seeds.items() if s.gives(weights[n].detach())}
