"""Run a recipe: stage by stage, resumable to the same bytes, ending in a file and a report.

The run directory holds ``run-key.json`` (what is being run), ``recipe.yaml``, ``stage-N.pt`` (the
network after each stage), the training checkpoint of the present stage, ``metrics/*.jsonl``,
``model.gsm``, ``run.json`` (every figure) and ``report.html``. Choices look at the validation
split; the test split is evaluated before and after, and decides nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gossamer import datasets
from gossamer.compression import door, folder, fresh, inputs, proof, trust
from gossamer.compression import recipe as recipes
from gossamer.compression import threads as threading
from gossamer.compression.job import Job
from gossamer.compression.progress import Reporter, shown
from gossamer.compression.recipe import Recipe
from gossamer.compression.result import Result
from gossamer.core import names, timing
from gossamer.core.errors import ArgumentError
from gossamer.core.plain import copied
from gossamer.datasets import Dataset, contents
from gossamer.training import Task, load_checkpoint
from gossamer.training.tasks import chosen

__all__ = ["GENTLE", "WHY_GENTLE", "Result", "compress", "run"]

GENTLE = "post-training"
WHY_GENTLE = (
    f"no recipe was named: {GENTLE}, which needs inputs alone, no labels and no training; others "
    "train and get smaller (gossamer recipes)"
)
"""The recipe where none is named, and why."""


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
    max_bytes: int | None = None,
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
        max_bytes: what the file may take: the recipe's last stage that sets a price of bits finds
            the price whose file comes within 2 % below. Where none does, the smallest file is
            written, and :attr:`Result.problems` says so.
        task: what the network is for: a :class:`gossamer.training.Task` or a name of
            :data:`gossamer.training.tasks.TASKS`; None: the recipe's, else the dataset's, else by
            the targets; without any it is fidelity, agreement with the network as it is.
        classes: of data that are no dataset yet: the outputs are logits of so many.

    A recipe's own ``model`` and ``dataset`` are not looked at here, so no code that it names runs.

    Raises :class:`ArgumentError` when ``out`` holds another run, naming what differs;
    :class:`~gossamer.core.errors.RecipeError` for a recipe that does not fit, before anything is
    done; and what the stages raise: finished stages stay on disk.
    """
    limits = {"max_drop": max_drop, "max_bytes": max_bytes}
    given = [f"{key}={value!r}" for key, value in limits.items() if value is not None]
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
        # a limit that is not set is no part of it: older runs knew none
        "recipe": recipe.model_dump(
            mode="json", exclude={"max_bytes"} if recipe.max_bytes is None else None
        ),
        "model": source if isinstance(source, str) else type(source).__name__,
        # a function may train its network anew each time: the first one is kept, not compared
        "weights": fresh.digest(names.clean_state_dict(network))
        if isinstance(source, nn.Module) or recipe.weights
        else None,
        "dataset": contents.identity(data),
        "task": aim.settings(),
    }
    out = Path(out)
    job = Job(recipe, network, data, aim, out, key, command, say, builder=builder, notes=taken)
    with folder.held(out):
        resumed = folder.look(out, key, restart) and (out / "stage-0.pt").exists()
        began = load_checkpoint(out / "stage-0.pt").get("threads") if resumed else None
        with timing.threads(threading.settled(threads, began, network, data, say)):
            if not resumed:
                job.notes += proof.preflight(builder, data, job.aimed(network), recipe, say)
            for note in job.notes:
                say.say(f"note: {note}")
            job.begin(restart)
            return job.finish(job.stages(), data_source)
