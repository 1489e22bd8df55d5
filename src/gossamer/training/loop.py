"""One plain training loop for the command line and the experiments.

Methods attach to its optimizer and work inside it; a killed run resumes to the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import hooks
from gossamer.core.errors import ArgumentError, DatasetError, GossamerError
from gossamer.core.method import Method
from gossamer.core.modes import device_of, modes_kept
from gossamer.datasets import Dataset, Split, check, check_split
from gossamer.training.config import History, Progress, TrainConfig
from gossamer.training.distill import soft_targets
from gossamer.training.run import Run
from gossamer.training.tasks import Classification, Distilled, Fidelity, Task, chosen, cross_entropy
from gossamer.training.tasks.distilled import classes_of
from gossamer.training.workers import Workers

__all__ = ["train"]


def train(
    model: nn.Module,
    dataset: Dataset,
    config: TrainConfig,
    *,
    methods: Sequence[Method] = (),
    optimizer: torch.optim.Optimizer | None = None,
    task: Task | str | None = None,
    objective: Task | None = None,
    loss: Callable[..., Tensor] | None = None,
    teacher: Callable[[Any], Any] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 20.0,
    metrics: str | Path | None = None,
    tensorboard: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    evaluate_every: int = 1,
    evaluate_every_steps: int | None = None,
    monitor: Mapping[str, Split] | None = None,
    workers: Workers | None = None,
) -> History:
    """Train ``model`` in place, on the device it is on; its modules keep their modes.

    Args:
        methods: attached to the optimizer here unless they are already, in this order; their
            hooks are removed at the end, but ``finish()`` is the caller's.
        optimizer: the caller's own, over this model's parameters; each group's learning rate
            follows the schedule relative to ``config.lr``. None: made from ``config``.
        task: what the network is for; None: the dataset's own, else by its targets
            (:func:`gossamer.training.tasks.chosen`).
        objective: a task whose loss is minimised in place of the task's own, such as
            :class:`gossamer.training.tasks.Distilled`.
        loss: mean loss of a batch, ``loss(outputs, targets)``; None: the task's. With a
            teacher ``loss(outputs, targets, teacher_outputs)``; None:
            :func:`gossamer.training.distill.soft_targets`.
        teacher: inputs -> outputs, run without gradients; a module in evaluation mode.
        checkpoint: resumed from where the file exists, wherever the run was killed; a completed
            one loads the model and returns at once. On a CPU with the same number of threads the
            result has the same bits as an unbroken run's; on CUDA where torch's deterministic
            algorithms are on.
        checkpoint_every: seconds between two saves; epochs longer than a second are saved at
            their end, too.
        metrics: JSON lines, one row an evaluation; appended to, without duplicate or missing rows
            after a resume.
        tensorboard: folder for TensorBoard (the ``tensorboard`` extra).
        progress: called with a :class:`Progress`.
        evaluate_every: epochs between two evaluations on the validation split; the last epoch is
            always evaluated.
        evaluate_every_steps: evaluate every so many steps besides (early-stopping metrics).
        monitor: more splits to evaluate, by name; never used for a choice.
        workers: the processes that train together: every batch of ``config.batch_size`` is shared
            among them, and only the first writes files and tells of progress. All read the
            checkpoint, so all must see the folder. ``train_loss`` is of the first one's share.

    Raises :class:`ArgumentError` for a checkpoint of another configuration, naming the field that
    differs; :class:`~gossamer.core.errors.FormatError` for a corrupt one;
    :class:`~gossamer.core.errors.DatasetError` for unsound data (:func:`gossamer.datasets.check`;
    with a loss of one's own, only what is no tensor and lengths that differ);
    :class:`~gossamer.core.errors.GossamerError` when the loss is no longer finite.
    """
    if evaluate_every < 1 or (evaluate_every_steps is not None and evaluate_every_steps < 1):
        raise ArgumentError(
            f"evaluate_every={evaluate_every}, evaluate_every_steps={evaluate_every_steps}: "
            "must be at least 1"
        )
    if not isinstance(dataset, Dataset):
        raise DatasetError(
            f"dataset is of type {type(dataset).__name__}; make one of it with "
            "gossamer.as_dataset(data)"
        )
    if not isinstance(config, TrainConfig):
        raise ArgumentError(
            f"config is of type {type(config).__name__}; give gossamer.TrainConfig(epochs=...)"
        )
    for part in ("train", "validation", "test"):
        check_split(getattr(dataset, part), f"dataset {dataset.name!r}, {part}")
    task, _ = chosen(task, dataset)
    aim = objective or task
    if isinstance(aim, Fidelity) and aim.reference is None and loss is None:
        raise DatasetError(
            f"dataset {dataset.name!r} has no labels, so there is nothing to train on; give "
            "targets, or task=gossamer.Fidelity(network) to learn from a network"
        )
    if config.label_smoothing and not isinstance(aim, (Classification, Distilled)):
        raise ArgumentError(
            f"label_smoothing={config.label_smoothing} is for class indices, and the task is "
            f"{aim.name!r}; leave it out"
        )
    if loss is None:  # the caller's own judges other values
        check(dataset)
    if workers is not None and workers.rank:
        metrics = tensorboard = progress = None
    device = device_of(model)
    cuda = [device] if device.type == "cuda" else []
    # Dropout and the like draw from torch's global generator: seeded here, given back after.
    with torch.random.fork_rng(devices=cuda), contextlib.ExitStack() as stack:
        torch.manual_seed(config.seed)
        stack.enter_context(modes_kept(model))
        if isinstance(teacher, nn.Module):
            stack.enter_context(modes_kept(teacher))
            teacher.eval()
        if optimizer is None:
            optimizer = _make_optimizer(model, config)
        optimizer = hooks.unwrap(optimizer)
        for method in methods:
            stack.enter_context(_attached(method, model, optimizer))
        run = Run(
            model=model,
            dataset=dataset,
            config=config,
            methods=methods,
            optimizer=optimizer,
            task=task,
            loss=_loss(config, objective or task, loss, teacher),
            monitor=dict(monitor or {}),
            checkpoint=None if checkpoint is None else Path(checkpoint),
            checkpoint_every=checkpoint_every,
            metrics=None if metrics is None else Path(metrics),
            progress=progress,
            evaluate_every=evaluate_every,
            evaluate_every_steps=evaluate_every_steps,
            device=device,
            workers=workers,
        )
        run.resume()
        if not run.complete:
            if tensorboard is not None:
                run.writer = stack.enter_context(_tensorboard(tensorboard, run.step))
            try:
                run.go()
            finally:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"]
        return run.history


def _make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ArgumentError("model has no parameter that requires a gradient; nothing to train")
    if config.optimizer == "adam":
        return torch.optim.Adam(trained, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(
        trained,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


@contextlib.contextmanager
def _attached(method: Method, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    if not method._attached:
        method.attach(model, optimizer)
        try:
            yield
        finally:
            method.detach()
        return
    if method.model is not model or method.optimizer not in (None, optimizer):
        raise ArgumentError(
            f"{type(method).__name__} is attached to another model or optimizer; detach() it "
            "first, or pass that optimizer"
        )
    handles = []
    if method.optimizer is None:  # attached without one: its hooks are ours to call
        method.optimizer = optimizer
        handles = hooks.on_steps(method, optimizer)
    try:
        yield
    finally:
        if handles:
            method.optimizer = None
        for handle in handles:
            handle.remove()


def _loss(
    config: TrainConfig,
    task: Task,
    loss: Callable[..., Tensor] | None,
    teacher: Callable[[Any], Any] | None,
) -> Callable[[Any, Any, Any], Tensor]:
    # (inputs, outputs, targets) -> mean loss
    if teacher is not None:
        guide, own = teacher, loss

        def guided(inputs: Any, outputs: Any, targets: Any) -> Tensor:
            with torch.no_grad():
                soft = task.feed(guide, inputs) if isinstance(guide, nn.Module) else guide(inputs)
            if own is not None:
                return own(outputs, targets, soft)
            # as the task reads them: shifted labels, classes on the second axis
            found = classes_of(task, outputs, soft, targets, inputs)
            return soft_targets(*(found or (outputs, targets, soft)))

        return guided
    if loss is not None:
        plain = loss
        return lambda inputs, outputs, targets: plain(outputs, targets)
    smoothing = config.label_smoothing
    if isinstance(task, Classification) and smoothing:
        counts = task
        return lambda inputs, outputs, targets: cross_entropy(
            *counts.pair(outputs, targets, inputs), smoothing
        )
    return lambda inputs, outputs, targets: task.loss(outputs, targets, inputs)


@contextlib.contextmanager
def _tensorboard(folder: str | Path, step: int) -> Iterator[Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise GossamerError(
            f"tensorboard={str(folder)!r} needs the tensorboard extra: "
            "pip install 'gossamer[tensorboard]'"
        ) from e
    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
    try:
        yield writer
    finally:
        writer.close()
