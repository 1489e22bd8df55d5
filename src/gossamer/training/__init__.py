"""Training, evaluation and checkpoints: one plain loop that methods attach to."""

from gossamer.training.checkpoints import load_checkpoint, save_atomic
from gossamer.training.config import History, Progress, TrainConfig
from gossamer.training.distill import soft_targets
from gossamer.training.evaluation import Evaluation, evaluate
from gossamer.training.loop import train
from gossamer.training.metric import Metric
from gossamer.training.tasks import Custom, Fidelity, Task, task
from gossamer.training.workers import Workers

__all__ = [
    "Custom",
    "Evaluation",
    "Fidelity",
    "History",
    "Metric",
    "Progress",
    "Task",
    "TrainConfig",
    "Workers",
    "evaluate",
    "load_checkpoint",
    "save_atomic",
    "soft_targets",
    "task",
    "train",
]
