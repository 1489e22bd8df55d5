"""The state of one training run: its loop, its rows, its checkpoints and its resuming."""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gossamer.core import names, nest
from gossamer.core.errors import ArgumentError, FormatError, GossamerError
from gossamer.core.graph import undisturbed
from gossamer.core.method import Method
from gossamer.datasets import Dataset, Split, contents
from gossamer.training.checkpoints import load_checkpoint, save_atomic
from gossamer.training.config import History, Progress, TrainConfig
from gossamer.training.evaluation import evaluate
from gossamer.training.tasks import Task
from gossamer.training.workers import Workers, share

__all__ = ["Run"]

_FORMAT = 1  # of the checkpoint; raised when its meaning changes
_BEFORE = {"config.precision": "float32"}  # of checkpoints from before there was a choice
_CHECK = 100  # steps between two looks at the loss, which synchronise an accelerator


@dataclass
class Run:
    """The state of one run; `go` is the loop, the rest keeps it resumable."""

    model: nn.Module
    dataset: Dataset
    config: TrainConfig
    methods: Sequence[Method]
    optimizer: torch.optim.Optimizer
    task: Task
    loss: Callable[[Any, Any, Any], Tensor]
    monitor: dict[str, Split]
    checkpoint: Path | None
    checkpoint_every: float
    metrics: Path | None
    progress: Callable[[Progress], None] | None
    evaluate_every: int
    evaluate_every_steps: int | None
    device: torch.device
    workers: Workers | None = None
    writer: Any = None

    def __post_init__(self) -> None:
        self.history = History(metric=self.task.metric)
        self.epoch = 0  # completed
        self.batch = 0  # completed inside the current epoch
        self.seconds = 0.0  # of training, in earlier sessions
        self.offset = 0  # bytes in the metrics file before this run's rows
        self.started = self.saved = time.monotonic()
        self.split = self.dataset.train.to(self.device)
        size = self.config.batch_size
        self.batches = (len(self.split) + size - 1) // size
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.augmenting = torch.Generator().manual_seed(self.config.seed)
        self.rate = self.config.rate(self.batches)
        self.complete = False  # already, in an earlier session
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # the convention of torch's schedulers

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.epoch * self.batches + self.batch

    def go(self) -> None:
        """Train from where the run is to its end."""
        config, model, optimizer, split = self.config, self.model, self.optimizer, self.split
        workers = self.workers
        network = model if workers is None else workers.wrap(model)
        size, augment, every = config.batch_size, self.dataset.augment, self.evaluate_every_steps
        decayed = list(names.weights(model).values()) if config.l1 else []
        trained = [p for g in optimizer.param_groups for p in g["params"]]
        fresh = 0.0
        half = torch.autocast(
            self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"
        )
        self._try_one()
        model.train()
        while self.epoch < config.epochs:
            began = time.monotonic()
            # One generator an epoch: the order is known again after a resume without its state.
            order = torch.randperm(
                len(split),
                generator=torch.Generator().manual_seed(
                    (config.seed * 1_000_003 + self.epoch) % (1 << 63)
                ),
            ).to(self.device)
            while self.batch < self.batches:
                step = self.step
                rate = self.rate(step) / config.lr
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * rate
                first = self.batch * size
                inputs, targets = split.batch(order[first : first + size], augment, self.augmenting)
                inputs, targets = nest.moved(inputs, self.device), nest.moved(targets, self.device)
                if config.precision == "bfloat16":
                    inputs = nest.mapped(_channels_last, inputs)
                count, weight = len(order[first : first + size]), 1.0
                if workers is not None:
                    inputs, targets, weight = share(inputs, targets, workers.rank, workers.size)
                    # Dropout differs from rank to rank, and is known again after a resume.
                    torch.manual_seed(
                        ((config.seed * 1_000_003 + step) * workers.size + workers.rank) % (1 << 63)
                    )
                optimizer.zero_grad(set_to_none=True)
                with half:
                    value = self.loss(inputs, self.task.feed(network, inputs), targets)
                (value if weight == 1.0 else value * weight).backward()
                if decayed:
                    for p in decayed:
                        if p.grad is not None:
                            p.grad.add_(p.detach().sign(), alpha=config.l1)
                if config.grad_clip is not None:
                    nn.utils.clip_grad_norm_(trained, config.grad_clip)
                optimizer.step()
                self.total.add_(value.detach(), alpha=count)
                self.batch += 1
                if (step + 1) % _CHECK == 0:
                    self._check()
                if every is not None and (step + 1) % every == 0:
                    self._row("step")
                now = time.monotonic()
                if self.progress is not None and now - fresh >= 0.1:
                    fresh = now
                    self._tell()
                if now - self.saved >= self.checkpoint_every and self.batch < self.batches:
                    self._save()
            self._check()
            self._end_epoch(time.monotonic() - began)
        self._save()

    def _try_one(self) -> None:
        """Batch-norm has no statistics of one value: told now, not at the end of an epoch."""
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules())
        size = self.config.batch_size
        if self.workers is not None or not norms or len(self.split) % size != 1:
            return
        inputs = nest.moved(self.split.batch(torch.tensor([0]))[0], self.device)
        try:
            with undisturbed(self.model, training=True):
                self.task.feed(self.model, inputs)
        except ValueError as e:
            raise ArgumentError(
                f"the last batch of {len(self.split)} examples has one, and the network does not "
                f"train on one ({e}); take another batch_size than {size}, or an example less"
            ) from e

    def _end_epoch(self, seconds: float) -> None:
        if (self.epoch + 1) % self.evaluate_every == 0 or self.epoch + 1 == self.config.epochs:
            self._row("epoch")
        self.epoch, self.batch = self.epoch + 1, 0
        self.total.zero_()
        if self.epoch < self.config.epochs and (
            time.monotonic() - self.saved >= min(1.0, self.checkpoint_every)
        ):
            self._save()

    def _seen(self) -> int:
        return min(self.batch * self.config.batch_size, len(self.split))

    def _check(self) -> None:
        # A loss that was NaN or infinite once leaves the running sum so.
        if not math.isfinite(self.total.item()):
            self._diverged("training loss")

    def _diverged(self, what: str) -> NoReturn:
        raise GossamerError(
            f"the {what} is no longer finite, seen at step {self.step} (epoch {self.epoch + 1}, "
            f"learning rate {self.rate(max(0, self.step - 1)):.3g}; looked at every {_CHECK} "
            "steps). Lower lr, set grad_clip or warmup, and check the inputs for NaN"
        )

    def _tell(self, row: dict[str, Any] | None = None) -> None:
        if self.progress is not None:
            self.progress(
                Progress(
                    epoch=self.epoch + 1,
                    epochs=self.config.epochs,
                    step=self.step,
                    steps=self.config.epochs * self.batches,
                    loss=float(self.total) / max(1, self._seen()),
                    lr=self.rate(max(0, self.step - 1)),
                    seconds=time.monotonic() - self.started,
                    row=row,
                )
            )

    def _row(self, event: str) -> None:
        row: dict[str, Any] = {"event": event, "epoch": self.epoch + 1, "step": self.step}
        if event == "epoch":
            row["train_loss"] = float(self.total) / self._seen()
        splits = {"validation": self.dataset.validation, **self.monitor}
        if not len(self.dataset.validation):
            del splits["validation"]
        if self.workers is not None:
            self.workers.settle(self.model)
        for name, split in splits.items():
            found = evaluate(self.model, split, task=self.task)
            if not math.isfinite(found.loss):
                self._diverged(f"{name} loss")
            row[f"{name}_loss"] = found.loss
            if found.correct is not None:
                row[f"{name}_accuracy"] = found.accuracy
            if found.value is not None:
                row[f"{name}_score"] = found.score
        row["lr"] = self.rate(self.step - 1)
        row["seconds"] = self.seconds + time.monotonic() - self.started
        (self.history.epochs if event == "epoch" else self.history.steps).append(row)
        if self.metrics is not None:
            with open(self.metrics, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        if self.writer is not None:
            for key, value in row.items():
                if isinstance(value, float):
                    self.writer.add_scalar(key, value, row["step"])
        self._tell(row)

    # Resuming: everything below.

    def _fingerprint(self) -> dict[str, Any]:
        data, train = self.dataset, self.dataset.train
        return {
            **{f"config.{k}": v for k, v in asdict(self.config).items()},
            "model": [f"{n} {tuple(t.shape)}" for n, t in _state(self.model).items()],
            "optimizer": type(self.optimizer).__name__,
            # the learning rate follows the schedule; the rest would be overwritten in silence
            "optimizer.settings": {
                k: v if v is None or isinstance(v, (bool, int, float, str)) else repr(v)
                for k, v in self.optimizer.defaults.items()
                if k != "lr"
            },
            "methods": [{"kind": type(m).__name__, **m.settings()} for m in self.methods],
            "evaluate_every": self.evaluate_every,
            "evaluate_every_steps": self.evaluate_every_steps,
            "monitor": sorted(self.monitor),
            "workers.size": None if self.workers is None else self.workers.size,
            "workers.about": None if self.workers is None else self.workers.about,
            "dataset.name": data.name,
            "dataset.train": [len(train), nest.shown(train.stored)]
            if not isinstance(train.stored, Tensor)
            else [*train.stored.shape],
            # Another seed or subset holds other examples, in as many rows.
            "dataset.targets": zlib.crc32(train.targets.cpu().numpy().tobytes())
            if isinstance(train.targets, Tensor)
            else None,
            "task": self.task.settings(),
            "dataset.contents": self._contents,
        }

    @cached_property
    def _contents(self) -> str:
        """Of the training examples: other inputs may have the same targets. Hashed once a run."""
        return json.dumps(contents.of_split(self.dataset.train))

    def _save(self) -> None:
        if self.checkpoint is None or (self.workers is not None and self.workers.rank):
            return
        self._check()
        self.saved = time.monotonic()
        save_atomic(
            {
                "gossamer_checkpoint": _FORMAT,
                "fingerprint": self._fingerprint(),
                "epoch": self.epoch,
                "batch": self.batch,
                "total": self.total,
                "seconds": self.seconds + self.saved - self.started,
                "history": {"epochs": self.history.epochs, "steps": self.history.steps},
                "metrics_offset": self.offset,
                "model": _state(self.model),
                "optimizer": self.optimizer.state_dict(),
                "methods": [m.state_dict() for m in self.methods],
                "workers": None if self.workers is None else self.workers.state_dict(),
                "augmenting": self.augmenting.get_state(),
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device)
                if self.device.type == "cuda"
                else None,
            },
            self.checkpoint,
        )

    def resume(self) -> None:
        """Load the checkpoint where there is one, else write the first."""
        if self.metrics is not None:
            self.metrics.parent.mkdir(parents=True, exist_ok=True)
        if self.checkpoint is not None and self.checkpoint.exists():
            self._load(self.checkpoint)
            self.complete = self.epoch >= self.config.epochs
            if not self.complete:
                self._rewrite_metrics()
            return
        if self.metrics is not None and self.metrics.exists():
            self.offset = self.metrics.stat().st_size
        # Before the first row: a run killed early must find where its rows began, and the weights
        # it started from.
        self._save()

    def _load(self, path: Path) -> None:
        state = load_checkpoint(path)
        advice = f"delete {path} to start again, or give another path"
        if not isinstance(state, dict) or state.get("gossamer_checkpoint") != _FORMAT:
            raise FormatError(f"{path} is no training checkpoint of this version; {advice}")
        mine = self._fingerprint()
        theirs = state.get("fingerprint", {})
        for name, value in mine.items():
            if name in ("dataset.contents", "optimizer.settings", "task") and name not in theirs:
                continue  # a checkpoint from before they were kept
            before = theirs.get(name, _BEFORE.get(name))
            if before != value:
                if name == "workers.size" and theirs.get(name):
                    advice = f"start {theirs[name]} processes again, {advice}"
                raise ArgumentError(
                    f"checkpoint {path} is of another run: {name} was "
                    f"{_short(before)}, now it is {_short(value)}; {advice}"
                )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for method, saved in zip(self.methods, state["methods"], strict=True):
                method.load_state_dict(saved)
            if self.workers is not None:
                self.workers.load_state_dict(state["workers"])
            self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
            self.total.copy_(state["total"])
            self.seconds = float(state["seconds"])
            self.offset = int(state["metrics_offset"])
            self.history = History(**state["history"], metric=self.task.metric)
            self.augmenting.set_state(state["augmenting"])
            torch.set_rng_state(state["cpu"])
            if state["cuda"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise FormatError(
                f"checkpoint {path} is incomplete or inconsistent: {e}; {advice}"
            ) from e

    def _rewrite_metrics(self) -> None:
        # The file holds the rows of this run up to the checkpoint, each once, whatever a killed
        # session wrote after it; what stood before this run stays.
        if self.metrics is None:
            return
        rows = sorted(self.history.steps + self.history.epochs, key=lambda r: r["step"])
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with open(self.metrics, "ab") as f:
            self.offset = min(self.offset, f.tell())
            f.truncate(self.offset)
            f.write(text)
            f.flush()
            os.fsync(f.fileno())


def _state(model: nn.Module) -> dict[str, Any]:
    return {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}


def _channels_last(tensor: Tensor) -> Tensor:
    # maps of bfloat16 are convolved faster so
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."
