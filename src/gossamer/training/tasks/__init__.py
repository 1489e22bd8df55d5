"""Tasks: what a network is for. Nothing above them knows labels or accuracy."""

from gossamer.training.tasks.base import Means, Meter, Task, logits
from gossamer.training.tasks.choice import TASKS, chosen
from gossamer.training.tasks.counts import (
    Classification,
    LanguageModel,
    MultiLabel,
    cross_entropy,
)
from gossamer.training.tasks.distilled import Distilled
from gossamer.training.tasks.own import Custom, task
from gossamer.training.tasks.values import Embedding, Fidelity, Regression

__all__ = [
    "TASKS",
    "Classification",
    "Custom",
    "Distilled",
    "Embedding",
    "Fidelity",
    "LanguageModel",
    "Means",
    "Meter",
    "MultiLabel",
    "Regression",
    "Task",
    "chosen",
    "cross_entropy",
    "logits",
    "task",
]
