"""What the stages of a run work on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.compression import inputs
from gossamer.compression.progress import Reporter
from gossamer.compression.records import parse, rebuild
from gossamer.compression.settings import Training
from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.core.method import Masked, Method
from gossamer.core.seeds import Seed
from gossamer.datasets import Dataset
from gossamer.training import History, load_checkpoint, soft_targets, train

__all__ = ["State", "ends_of"]


def ends_of(history: History) -> dict[str, dict[str, Any]]:
    """The final and the best epoch of a training, with their validation accuracy."""
    keys = ("epoch", "validation_accuracy")
    rows = {"final": history.epochs[-1], "best": history.best}
    return {when: {key: row[key] for key in keys} for when, row in rows.items()}


@dataclass
class State:
    """What the stages work on.

    Attributes:
        model: changed in place, or replaced where a stage changes its modules.
        origin: the network as the user's class makes it, for :func:`rebuild`.
        out: run directory.
        masks: what is pruned so far; later training keeps it pruned.
        reference: the state before the first stage that compresses; a distillation's teacher.
        scan: layer -> [[density, accuracy], ...] of the last sensitivity scan.
        curves: a row an epoch, for the report.
        seeds: weights that are still a seed's under a mask, by clean name.
        fixed: few-bit weights, by clean name: later trainings leave them as they are.
        structure: how ``model`` differs from ``origin``, for the file.
        notes: what the present stage reports besides, for its row.
        floor: validation accuracy that the run has to keep; None before anything compresses.
    """

    model: nn.Module
    origin: nn.Module
    data: Dataset
    out: Path
    seed: int
    progress: Reporter
    masks: Masks = field(default_factory=Masks)
    reference: dict[str, Tensor] = field(default_factory=dict)
    scan: dict[str, list[list[float]]] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)
    seeds: dict[str, Seed] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    structure: list[Any] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    floor: float | None = None
    number: int = 0
    name: str = ""

    def train(self, settings: Training, methods: list[Method], part: int | None = None) -> History:
        """Train inside a stage, with a checkpoint and metrics of its own."""
        name = self.name if part is None else f"{self.name}-{part}"
        loss, teacher, teaching = None, None, settings.teaching
        if teaching.weight:
            teacher = self.teacher(teaching.teacher)

            def loss(outputs: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
                return soft_targets(
                    outputs,
                    targets,
                    wanted,
                    temperature=teaching.temperature,
                    weight=teaching.weight,
                )

        with self._held():
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
        return history

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Few-bit weights of earlier stages get no gradient, and so no step."""
        held = [p for n, p in names.parameters(self.model).items() if n in self.fixed]
        held = [p for p in held if p.requires_grad]
        try:
            for p in held:
                p.requires_grad_(False)
            yield
        finally:
            for p in held:
                p.requires_grad_(True)

    def teacher(self, which: str) -> nn.Module:
        """The network to learn from: ``before``, ``start`` or a file of weights."""
        made = copy.deepcopy(self.origin)
        if which == "start":
            saved = load_checkpoint(self.out / f"stage-{self.number - 1}.pt")
            made = rebuild(made, parse(saved.get("structure", [])))
            made.load_state_dict(saved["model"])
        elif which != "before":
            return inputs.load_weights(made, which)
        elif self.reference:
            made.load_state_dict(self.reference)
        else:
            raise ArgumentError(
                f"stage {self.name}: nothing has been compressed yet, so there is no network "
                "before it to learn from; name a file as distill's teacher"
            )
        return made

    def change(self, model: nn.Module, record: Any) -> None:
        """Go on with a network whose modules differ as the record says."""
        self.model = model
        self.structure = [*self.structure, record]

    def example(self, count: int = 8) -> Tensor:
        """The first training inputs, on the model's device, to compare rewritten networks on."""
        inputs, _ = self.data.train.batch(torch.arange(min(count, len(self.data.train))))
        return inputs.to(next((p.device for p in self.model.parameters()), inputs.device))

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
        known = names.cleaned(self.origin)
        return {known[n]: t for n, t in saved.items()}

    def to_initial(self) -> None:
        """Set the model to them."""
        self.model.load_state_dict(load_checkpoint(self.out / "stage-0.pt")["model"])

    def forget_seeds(self) -> None:
        """Drop the seeds of weights that a stage has changed."""
        weights = names.parameters(self.model)
        self.seeds = {
            n: s for n, s in self.seeds.items() if n in weights and s.gives(weights[n].detach())
        }
