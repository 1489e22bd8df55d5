"""What the stages of a run work on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer import nets
from gossamer.compression import inputs
from gossamer.compression.progress import Reporter
from gossamer.compression.records import parse, rebuild
from gossamer.compression.settings import Training
from gossamer.core import names, nest
from gossamer.core.errors import ArgumentError
from gossamer.core.masks import Masks
from gossamer.core.method import Masked, Method
from gossamer.core.modes import device_of
from gossamer.core.seeds import Seed
from gossamer.datasets import Dataset
from gossamer.training import Evaluation, History, Task, evaluate, load_checkpoint, train
from gossamer.training.tasks import Distilled

if TYPE_CHECKING:
    from gossamer.compression.size import Size

__all__ = ["State", "ends_of"]


def ends_of(history: History) -> dict[str, dict[str, Any]]:
    """The final and the best epoch of a training, with their validation score."""
    rows = {"final": history.epochs[-1], "best": history.best}
    return {
        when: {"epoch": row["epoch"], "score": history.score(row)} for when, row in rows.items()
    }


@dataclass
class State:
    """What the stages work on.

    Attributes:
        model: changed in place, or replaced where a stage changes its modules.
        origin: the network as the user's class makes it, for :func:`rebuild`.
        out: run directory.
        task: what the network is for; all figures and choices are by it.
        masks: what is pruned so far; later training keeps it pruned.
        reference: the state before the first stage that compresses; a distillation's teacher.
        scan: layer -> [[density, score], ...] of the last sensitivity scan.
        curves: a row an epoch, for the report.
        seeds: weights that are still a seed's under a mask, by clean name.
        fixed: tensors of few values (weights, biases on a grid), by clean name: later trainings
            leave them as they are.
        structure: how ``model`` differs from ``origin``, for the file.
        notes: what the present stage reports besides, for its row.
        floor: the validation score before, and what may be lost of it; None before anything
            compresses.
        size: of the file, where the present stage is the one that is told it.
    """

    model: nn.Module
    origin: nn.Module
    data: Dataset
    out: Path
    seed: int
    progress: Reporter
    task: Task
    masks: Masks = field(default_factory=Masks)
    reference: dict[str, Tensor] = field(default_factory=dict)
    scan: dict[str, list[list[float]]] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)
    seeds: dict[str, Seed] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    structure: list[Any] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    floor: tuple[float, float] | None = None
    size: Size | None = None
    number: int = 0
    name: str = ""

    def train(self, settings: Training, methods: list[Method], part: int | None = None) -> History:
        """Train inside a stage, with a checkpoint and metrics of its own."""
        name = self.name if part is None else f"{self.name}-{part}"
        objective, teaching = None, settings.teaching
        if teaching.weight:
            teacher = self.teacher(teaching.teacher)
            objective = Distilled(self.task, teacher, teaching.weight, teaching.temperature)
        with self._held():
            history = train(
                self.model,
                self.data,
                # Another seed in every training: none sees the data in another one's order.
                settings.config(self.seed * 10_000 + self.number * 100 + (part or 0)),
                methods=methods,
                task=self.task,
                objective=objective,
                checkpoint=self.out / f"{name}.train.pt",
                metrics=self.out / "metrics" / f"{name}.jsonl",
                progress=lambda p: self.progress.training(name, p),
            )
        self.curves += [
            {
                "stage": name,
                "epoch": row["epoch"],
                "train_loss": row["train_loss"],
                "score": history.score(row),
            }
            for row in history.epochs
        ]
        return history

    def factored(self, layer: str, bias: str | None = None) -> None:
        """Factors stand for a layer: what earlier stages promised of its weight is void.

        So it is of its bias, but where the same values go on under the name ``bias``.
        """
        self.masks.pop(f"{layer}.weight", None)
        held = {f"{layer}.weight", f"{layer}.bias"} & self.fixed
        self.fixed -= held
        if bias is not None and f"{layer}.bias" in held:
            self.fixed.add(bias)

    def judge(self, model: nn.Module | None = None) -> Evaluation:
        """The task's figures of a network (None: the present one) on the validation split."""
        return evaluate(model or self.model, self.data.validation, task=self.task)

    def keeps_floor(self) -> bool:
        """Whether the present network keeps the run's floor on validation; without one, True."""
        if self.floor is None:
            return True
        judged = self.judge()
        return judged.metric.keeps(self.floor[0], judged.score, self.floor[1])

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Tensors of few values, of earlier stages, get no gradient, and so no step."""
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
        """The network to learn from: ``before``, ``start``, a pretrained one, a file of weights."""
        if which in nets.PRETRAINED:
            return inputs.network(which, self.data, pretrained=True).to(device_of(self.model))
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

    def example(self, count: int = 8) -> Any:
        """The first training inputs, on the model's device, to compare rewritten networks on.

        As :func:`gossamer.core.graph.check_same` takes a batch: several inputs in a tuple of one.
        """
        inputs, _ = self.data.train.batch(torch.arange(min(count, len(self.data.train))))
        inputs = nest.moved(inputs, device_of(self.model))
        return (inputs,) if isinstance(inputs, tuple) else inputs

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
