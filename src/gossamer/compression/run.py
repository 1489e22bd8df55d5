"""Run a recipe: stage by stage, resumable to the same bytes, ending in a file and a report.

The run directory holds ``run-key.json`` (what is being run), ``recipe.yaml``, ``stage-N.pt`` (the
network after each stage), the training checkpoint of the present stage, ``metrics/*.jsonl``,
``model.gsm``, ``run.json`` (every figure) and ``report.html``. Choices look at the validation
split; the test split is evaluated before and after, and decides nothing.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gossamer import datasets, report
from gossamer.compression import (
    coverage,
    door,
    floor,
    folder,
    fresh,
    inputs,
    measure,
    proof,
    records,
    saved,
    trust,
)
from gossamer.compression import recipe as recipes
from gossamer.compression import threads as threading
from gossamer.compression.progress import Reporter, shown
from gossamer.compression.recipe import Recipe
from gossamer.compression.result import Result
from gossamer.compression.state import State
from gossamer.core import names
from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.core.plain import copied
from gossamer.datasets import Dataset, contents
from gossamer.pack import Archive, pack, pack_bytes
from gossamer.quantize.emulated import Emulated
from gossamer.report import promises
from gossamer.training import (
    Evaluation,
    Fidelity,
    Task,
    evaluate,
    load_checkpoint,
    save_atomic,
)
from gossamer.training.tasks import chosen

__all__ = ["GENTLE", "WHY_GENTLE", "Result", "compress", "run"]

GENTLE = "post-training"
WHY_GENTLE = (
    f"no recipe was named: {GENTLE}, which needs inputs alone, no labels and no training; others "
    "train and get smaller (gossamer recipes)"
)
"""The recipe where none is named, and why."""

_ESTIMATED = 1 << 19  # up to so many tensor entries the packed size is known after every stage


def compress(
    model: nn.Module | str,
    dataset: Any,
    *,
    recipe: str | Path | Mapping[str, Any] | Sequence[Any] | Recipe | None = None,
    out: str | Path,
    overrides: tuple[str, ...] | list[str] = (),
    restart: bool = False,
    progress: Reporter | bool | None = None,
    max_drop: float | None = None,
    task: Task | str | None = None,
    classes: int | None = None,
) -> Result:
    """Compress a network in one call.

    Args:
        model: a trained network, which is left as it is; or a name for
            :func:`gossamer.nets.build`, ``module:function`` or ``file.py:function`` among them.
        dataset: a dataset, a name for :func:`gossamer.datasets.load`, or what
            :func:`gossamer.datasets.as_dataset` takes: tensors, batches, a ``DataLoader``, a
            dataset of torch or Hugging Face, with labels or without.
        recipe: a built-in recipe's name, a YAML file, the same as a mapping, or its list of stages.
            None: ``post-training``, which needs neither labels nor training.
        out: run directory; started again, a killed run goes on from it, to the same bytes.
        overrides: ``KEY=VALUE``, such as ``stages.prune.density=0.05``.
        restart: throw an older run in ``out`` away.
        progress: None shows how far it is on a terminal and in a notebook, and nothing elsewhere;
            False nothing, True always; or a :class:`gossamer.compression.progress.Reporter` of
            one's own.
        max_drop: in place of the recipe's: what the whole run may cost on the validation split,
            a fraction (0.005: half a point of accuracy, or half a percent of a loss). Rounds of
            pruning that end below go back; where the file is below all the same,
            :attr:`Result.problems` says so, with a warning.
        task: what the network is for: a :class:`gossamer.training.Task` or a name of
            :data:`gossamer.training.tasks.TASKS`; None: the recipe's, else the dataset's, else by
            the targets; without any it is fidelity, agreement with the network as it is.
        classes: of data that are no dataset yet: the outputs are logits of so many.

    A recipe's own ``model`` and ``dataset`` are not looked at here, so no code that it names runs.

    Raises :class:`ArgumentError` when ``out`` holds another run, naming what differs;
    :class:`~gossamer.core.errors.RecipeError` for a recipe that does not fit, before anything is
    done; and what the stages raise: finished stages stay on disk.
    """
    given = [] if max_drop is None else [f"max_drop={max_drop!r}"]
    plan = recipes.load(GENTLE if recipe is None else recipe, [*overrides, *given])
    if not isinstance(dataset, (Dataset, str)):
        dataset = datasets.as_dataset(dataset, classes=classes, seed=plan.seed)
    with shown(progress) as show:
        notes = (WHY_GENTLE,) if recipe is None else ()
        result = run(
            plan, model, dataset, out, restart=restart, progress=show, task=task, notes=notes
        )
    for problem in result.problems:
        warnings.warn(f"{result.out}: {problem}", stacklevel=2)
    return result


def run(
    recipe: Recipe,
    model: nn.Module | str | None,
    dataset: Dataset | str | None,
    out: str | Path,
    *,
    command: str | None = None,
    restart: bool = False,
    progress: Reporter | None = None,
    threads: int | Literal["auto"] | None = None,
    trust_recipe_code: bool = False,
    task: Task | str | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """Run a recipe; as :func:`compress`, but model and dataset may be the recipe's own.

    ``command``: the command line, for the report. ``threads``: torch threads, for bits hang on
    them; ``auto``: :func:`gossamer.compression.threads.chosen`; None: those the process has. A run
    that is gone on with keeps the number that it began with. ``trust_recipe_code``: run functions
    that a recipe from outside the current folder's tree names
    (:func:`gossamer.compression.trust.check`). ``task``: as for :func:`compress`.
    ``notes``: what is to be said besides, on the page as well.
    """
    trust.check(recipe, model=model is None, dataset=dataset is None, trusted=trust_recipe_code)
    say = progress or Reporter()
    source = recipe.model if model is None else model
    data_source = recipe.dataset if dataset is None else dataset
    if source is None or data_source is None:
        what = "model" if source is None else "dataset"
        raise ArgumentError(f"recipe {recipe.name!r} names no {what}; give one (--{what})")
    if isinstance(source, str):
        door.check_trained(recipe, source)
        inputs.plain(recipe.weights)
    data = (
        data_source
        if isinstance(data_source, Dataset)
        else datasets.load(data_source, subset=recipe.subset)
    )
    door.check_data(data)
    aim, told = chosen(task or recipe.task, data)
    door.check_labels(recipe, data, aim)
    builder, taken = proof.taken(recipe, source, data)
    taken = [*notes, *data.notes, *told, *taken]
    network = copied(builder.origin)
    door.check_fit(network, data, aim)
    door.check_patterns(recipe, network)
    key = {
        "recipe": recipe.model_dump(mode="json"),
        "model": source if isinstance(source, str) else type(source).__name__,
        # a function may train its network anew each time: the first one is kept, not compared
        "weights": fresh.digest(names.clean_state_dict(network))
        if isinstance(source, nn.Module) or recipe.weights
        else None,
        "dataset": contents.identity(data),
        "task": aim.settings(),
    }
    out = Path(out)
    job = _Job(recipe, network, data, aim, out, key, command, say, builder=builder, notes=taken)
    with folder.held(out):
        resumed = folder.look(out, key, restart) and (out / "stage-0.pt").exists()
        began = load_checkpoint(out / "stage-0.pt").get("threads") if resumed else None
        with threading.kept(threading.settled(threads, began, network, data, say)):
            if not resumed:
                job.notes += proof.preflight(builder, data, job.aimed(network), recipe, say)
            for note in job.notes:
                say.say(f"note: {note}")
            job.begin(restart)
            return job.finish(job.stages(), data_source)


@dataclass
class _Job:
    """One run: its directory and its parts, in order."""

    recipe: Recipe
    model: nn.Module
    data: Dataset
    task: Task
    out: Path
    key: dict[str, Any]
    command: str | None
    progress: Reporter
    builder: proof.Builder | None = None
    notes: list[str] = field(default_factory=list)
    validation: float = 0.0  # score of the network before the first stage that compresses

    def aimed(self, network: nn.Module) -> Task:
        """The task; fidelity is that to the network as the run began with it."""
        task = self.task
        if isinstance(task, Fidelity) and task.reference is None:
            return task.of(copied(network))
        return task

    def begin(self, restart: bool) -> None:
        """Begin, or go on with, the run that the directory is of."""
        out = self.out
        folder.begin(out, self.key, restart)
        folder.write_text(out / "recipe.yaml", recipes.dump(self.recipe))
        # What the run started from: a user's function may give another network the next time.
        start = out / "stage-0.pt"
        if start.exists():
            found = load_checkpoint(start)
            self.model.load_state_dict(found["model"])
            self.notes = found.get("notes", [])
        else:
            found = {"model": self.model.state_dict(), "threads": torch.get_num_threads()}
            save_atomic({**found, "notes": self.notes}, start)

    def stages(self) -> tuple[State, list[dict[str, Any]], dict[str, Any]]:
        """Do what is not done yet: the state, a row a stage, and the figures before."""
        origin = copied(self.model)
        self.task = self.aimed(self.model)
        state = State(
            self.model, origin, self.data, self.out, self.recipe.seed, self.progress, self.task
        )
        rows: list[dict[str, Any]] = []
        before: dict[str, Any] = {}
        count = len(self.recipe.work)
        for number, stage in enumerate(self.recipe.work, 1):
            if not before and stage.compresses:
                before = self._reference(state)
            path = self.out / f"stage-{number}.pt"
            state.number, state.name = number, f"{number}-{stage.stage}"
            if path.exists():
                rows.append(saved.restore(state, path))
                self.progress.say(f"stage {number}/{count} {stage.stage}: done before")
                continue
            self.progress.say(f"stage {number}/{count} {stage.stage}")
            begun, covered = time.monotonic(), coverage.of_stage(state.model, stage)
            if covered is not None:
                self.progress.say(f"  {promises.covers(covered)}")
            state.notes = {} if covered is None else {"coverage": covered}
            stage.run(state)
            state.forget_seeds()
            rows.append(self._row(state, time.monotonic() - begun) | state.notes)
            saved.save(state, rows[-1], path)
            for checkpoint in self.out.glob(f"{number}-*.train.pt"):
                checkpoint.unlink()
        return state, rows, before or self._reference(state)

    def _row(self, state: State, seconds: float) -> dict[str, Any]:
        infinite = proof.infinite_buffers(state.model)  # refuses NaN where it came up
        found = state.judge()
        row = {
            "stage": state.name,
            "score": found.score,
            "density": measure.density(state.model),
            "bytes": None,
            "seconds": round(seconds, 2),
        }
        entries = sum(t.numel() for t in state.model.state_dict().values() if torch.is_tensor(t))
        size = ""
        if entries <= _ESTIMATED:
            row["bytes"] = len(
                pack_bytes(
                    state.model,
                    profile=self.recipe.pack.profile,
                    metadata=records.metadata(state.structure),
                    seeds=state.seeds,
                    allow_nonfinite=infinite,
                )
            )
            size = f", {row['bytes']:,} bytes packed"
        self.progress.say(
            f"  validation {found.metric.name} {found.metric.show(found.score)}, density "
            f"{row['density']:.4f}{size}, {seconds:.1f} s"
        )
        return row

    def _reference(self, state: State) -> dict[str, Any]:
        """Remember the network before the first stage that compresses it, with test figures."""
        path = self.out / "reference.pt"
        if not path.exists():
            reference = {
                "model": state.model.state_dict(),
                "test": self._test(state.model).as_dict(),
                "validation": state.judge().score,
            }
            save_atomic(reference, path)
        found = load_checkpoint(path)
        state.reference = found["model"]
        self.validation = found["validation"]
        state.floor = found["validation"], self.recipe.max_drop
        test: dict[str, Any] = found["test"]
        metric = self.task.metric
        self.progress.say(f"before: test {metric.name} {metric.show(Evaluation.of(test).score)}")
        return test

    def _test(self, model: nn.Module) -> Evaluation:
        return evaluate(model, self.data.test, task=self.task)

    def finish(
        self,
        done: tuple[State, list[dict[str, Any]], dict[str, Any]],
        data_source: Any,
    ) -> Result:
        """Pack, decode in a fresh process, measure, and write run.json and the report."""
        state, rows, before = done
        begun, file = time.monotonic(), self.out / "model.gsm"
        self.progress.say("pack")
        with pack(
            state.model,
            file,
            profile=self.recipe.pack.profile,
            metadata=records.metadata(state.structure),
            seeds=state.seeds,
            allow_nonfinite=proof.infinite_buffers(state.model),
            progress=lambda name, done, total: self.progress.count("pack", done, total, name),
        ):
            pass
        self.progress.say("decode and evaluate in a fresh process")
        builder = self.builder or proof.Builder(None, {}, state.origin)
        reloaded, after = proof.proved(
            builder, file, state.model, self.data, self.task, data_source
        )
        decoded, problems = state.model, []
        with Archive(file, max_bytes=1 << 62, keep=True) as archive:
            try:
                decoded = records.load(archive, copied(state.origin))
            except GossamerError as e:
                reloaded["not_proved"] = reloaded["not_proved"] or f"the file does not load: {e}"
            # of a network with other modules the file's tensors are not those that there were
            whole = measure.tensor_bytes(state.origin) if state.structure else None
            size, layer_rows, picture = measure.file_figures(archive, self.data, whole)
        after = after or self._test(decoded).as_dict()
        size["reloaded"] = reloaded
        if reloaded["not_proved"]:
            problems.append(f"NOT PROVED: {reloaded['not_proved']}")
        score = _score(rows[-1]) if rows else state.judge(decoded).score
        rows.append(
            {
                "stage": f"{len(self.recipe.work) + 1}-pack",
                "score": score,
                "density": measure.density(decoded),
                "bytes": size["file"],
                "seconds": round(time.monotonic() - begun, 2),
            }
        )
        timing = macs = None
        if self.recipe.evaluate.latency:
            dense = copied(state.origin)
            dense.load_state_dict(state.reference)
            try:
                timing, more = measure.latency(
                    dense, decoded, self.data, planned=self.recipe.evaluate.plan, task=self.task
                )
                self.notes += more
                macs, more = measure.operations(dense, decoded, self.data)
                self.notes += more
            except (RuntimeError, ValueError) as e:  # the user's network, with one example
                self.notes.append(f"latency was not measured: {str(e)[:200]}")
        held = floor.verdict(self.validation, score, self.recipe.max_drop, self.task.metric)
        if not held["kept"]:
            problems.append(promises.keeps(held, self.task.metric))
        versions, hardware = measure.environment()
        figures: dict[str, Any] = {
            "name": self.recipe.name,
            "command": self.command or f"gossamer.compress(..., out={str(self.out)!r})",
            "versions": versions,
            "hardware": hardware,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seed": self.recipe.seed,
            "recipe": recipes.dump(self.recipe),
            "model": self.key["model"],
            "dataset": data_source if isinstance(data_source, str) else self.data.name,
            "task": self.task.settings(),
            "evaluation": {"before": before, "after": after},
            "floor": held,
            "problems": problems,
            "notes": self.notes,
            "coverage": coverage.of_recipe(state.origin, self.recipe),
            "stages": rows,
            "bytes": size,
            "layers": layer_rows,
            "latency": timing,
            "macs": macs,
            "integer": measure.integer_figures(decoded, self.data.test)
            if isinstance(decoded, Emulated)
            else None,
            "sensitivity": state.scan,
            "curves": state.curves,
            "mask_image": picture,
        }
        folder.write_text(self.out / "run.json", json.dumps(figures, indent=1) + "\n")
        page = report.write(figures, self.out / "report.html")
        return Result(
            out=self.out,
            file=file,
            report=page,
            bytes=size["file"],
            dense_bytes=size["dense"],
            before=Evaluation.of(before),
            after=Evaluation.of(after),
            model=decoded,
            run=figures,
        )


def _score(row: Mapping[str, Any]) -> float:
    """Of a stage's row; those of a run begun by an earlier version say accuracy."""
    found: float = row["score"] if "score" in row else row["accuracy"]
    return found
