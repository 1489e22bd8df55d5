"""What a run knows of its file: tried before any work, and proved at the end.

Before: the untouched network is run on a batch, packed, built anew, loaded and compared, so that
what would fail after all the training fails in seconds. At the end: the same with the file; what
cannot be proved by then is said, and the file, the figures and the page are left.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import datasets, nets
from gossamer.compression import fresh, inputs
from gossamer.compression.packing import infinite_buffers
from gossamer.compression.progress import Reporter
from gossamer.compression.recipe import Recipe
from gossamer.compression.stage import trainings
from gossamer.core import names, nest
from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.core.plain import copied, plain, unwrapped
from gossamer.datasets import Dataset, Split
from gossamer.pack import pack
from gossamer.training import Task, evaluate

__all__ = ["Builder", "preflight", "proved", "taken"]

_LONG = 20.0  # seconds of building a network after which it is built again only once, at the end
FRESH, HERE = "a fresh process", "this process"
"""Where a file's network was evaluated: ``run.json``'s ``bytes.reloaded.evaluated_in``."""


@dataclass
class Builder:
    """How the network of a run is made again.

    Attributes:
        source: the name or function that builds it, with the options it takes; None for a network
            that only exists as an object.
        origin: the network as it was before any stage.
        seconds: that building it took.
        config: the configuration of a network of transformers that only exists as an object: its
            class makes the buffers that no file of it holds.
    """

    source: str | None
    options: Mapping[str, Any]
    origin: nn.Module
    seconds: float = 0.0
    config: Any = None


@dataclass
class _Found:
    """What became of the attempts to prove a file."""

    figures: dict[str, Any]
    where: str = FRESH
    notes: list[str] = field(default_factory=list)

    @property
    def problem(self) -> str | None:
        """Why the file is not proved; None where it is."""
        if failed := self.figures.get("failed"):
            return f"the network from the file does not run: {failed}"
        if self.figures.get("same") is False:
            largest = self.figures.get("difference")
            told = "its shape or an error" if largest is None else f"up to {largest:.3g}"
            return (
                f"a network built anew and loaded from the file gives other outputs ({told}): it "
                "computes with something that its state_dict() does not hold"
            )
        if carried := self.figures.get("carried"):
            return (
                "the network computes with tensors that no file of it holds, and they had to be "
                f"carried over: {_some(carried)}; give model as module:function or "
                "file.py:function, so that it can be built anew, or make them persistent buffers"
            )
        return None


def _some(found: list[str]) -> str:
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return ", ".join(found[:4]) + more


def taken(recipe: Recipe, source: nn.Module | str, data: Dataset) -> tuple[Builder, list[str]]:
    """The run's own network, how it is made again, and what was taken off it, in words."""
    if isinstance(source, nn.Module):
        inner, told = unwrapped(source)  # first: a process group cannot be copied
        network, more = plain(copied(inner))
        return Builder(None, {}, network, config=_config(network)), [*told, *more]
    begun = time.monotonic()
    given: dict[str, Any] = {"seed": recipe.seed, "pretrained": recipe.pretrained}
    network, told = plain(
        inputs.network(source, data, **given, weights=recipe.weights, key=recipe.weights_key)
    )
    options = inputs.build_options(source, data, **given)
    if not nets.is_own(source):
        options["pretrained"] = False  # all values come from the file
    return Builder(source, options, network, time.monotonic() - begun), told


def _config(network: nn.Module) -> Any:
    """The configuration that a network of transformers was made of; None for any other."""
    package = type(network).__module__.partition(".")[0]
    if package != "transformers" or not hasattr(network, "config"):
        return None
    config: Any = copy.deepcopy(network.config)
    config.architectures = [type(network).__name__]
    return config


def preflight(
    builder: Builder, data: Dataset, task: Task, recipe: Recipe, progress: Reporter
) -> list[str]:
    """Try the end of a run with the untouched network; what is to be said of it, in words.

    In a fresh process where the recipe trains, so that this is worth its seconds now.

    Raises :class:`ArgumentError` for a network that cannot take the data, be copied, packed,
    built anew or loaded, or whose outputs its file would not give.
    """
    model, few, trains = (
        builder.origin,
        data.test.take(slice(0, 64)),
        any(trainings(stage) for stage in recipe.work),
    )
    kind = type(model).__name__
    try:
        expected = fresh.outputs(model, few, task)
        evaluate(model, few, task=task)
    except ArgumentError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
        raise ArgumentError(
            f"the network ({kind}) cannot be evaluated on {data.name!r} (inputs "
            f"{nest.shown(few.one()[0])}, task {task.name!r}): {reason}"
        ) from e
    fresh.skeleton(model)  # copies it, and refuses extra state that no file holds
    with tempfile.TemporaryDirectory(prefix="gossamer-") as place:
        file = Path(place, "untouched.gsm")
        pack(model, file, profile="fast", allow_nonfinite=infinite_buffers(model)).close()
        if trains:
            progress.say("check: the untouched network is packed, built anew and compared")
        elsewhere = trains or builder.config is not None
        found = _attempts(
            builder, file, few, few, task, expected,
            elsewhere=elsewhere, call=builder.seconds < _LONG,
        )  # fmt: skip
    steady = _same_twice(model, few, task, expected)
    if found.problem and not found.figures.get("carried") and steady:
        raise ArgumentError(
            f"a file of this network would not give it back, found before any work: "
            f"{found.problem}; keep what it computes with in parameters or buffers"
        )
    notes = [*found.notes]
    if found.figures.get("carried"):
        notes.append(found.problem or "")
    return notes


def proved(
    builder: Builder,
    file: Path,
    live: nn.Module,
    data: Dataset,
    task: Task,
    data_source: Any,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Decode and evaluate the file of a compressed network: ``reloaded`` for run.json, and figures.

    The first dictionary holds ``identical`` (every tensor, decoded in a fresh process),
    ``fresh_process``, ``evaluated_in``, ``built`` (by what), ``same_outputs``, ``notes`` and
    ``not_proved`` (None, or why). The second is the test figures; None where it could not be run.
    """
    split: Split | str = data.test
    if isinstance(data_source, str) and data_source in datasets.DATASETS:
        split = data_source
    expected = fresh.outputs(live, data.test, task)
    wanted = fresh.digest(names.clean_state_dict(live))
    found = _attempts(builder, file, split, data.test, task, expected, elsewhere=True, call=True)
    problem, same = found.problem, found.figures.get("same")
    if same is False and not _same_twice(live, data.test, task, expected):
        problem, same = None, None
        found.notes.append("outputs were not compared: they differ from call to call")
    identical = found.figures.get("digest") == wanted
    if not identical:
        problem = "the file does not decode to the tensors that were packed; please report this"
    reloaded = {
        "fresh_process": True,
        "identical": identical,
        "evaluated_in": found.where,
        "built": found.figures["built"],
        "same_outputs": same,
        "notes": found.notes,
        "not_proved": problem,
    }
    return reloaded, found.figures.get("test")


def _same_twice(model: nn.Module, split: Split, task: Task, expected: list[Tensor]) -> bool:
    again = fresh.outputs(model, split, task)
    return all(
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        for a, b in zip(again, expected, strict=True)
    )


def _attempts(
    builder: Builder,
    file: Path,
    split: Split | str,
    own: Split,
    task: Task,
    expected: list[Tensor],
    *,
    elsewhere: bool,
    call: bool,
) -> _Found:
    """By name in a fresh process, else its modules without values there, else those here.

    ``own``: the split as an object; ``elsewhere``: a fresh process is tried at all; ``call``: the
    source is called again.
    """
    notes: list[str] = []
    kinds: list[str | nn.Module] = [builder.source] if builder.source and call else []
    digest: str | None = None
    for made in [*kinds, builder.origin] if elsewhere else ():
        options = builder.options if isinstance(made, str) else None
        try:
            figures = fresh.check(
                file,
                made,
                split,
                task=task,
                threads=torch.get_num_threads(),
                model_options=options,
                expected=expected,
            )
        except GossamerError as e:
            return _Found({"failed": str(e), "built": "not built"}, notes=notes)
        digest = figures["digest"]
        if unsent := figures.get("unsent"):
            notes.append(f"data and task could not be sent to another process: {unsent}")
            break
        if not figures.get("unbuilt"):
            what = made if isinstance(made, str) else "its modules, without any value"
            done = _Found({**figures, "built": what}, notes=notes)
            if figures.get("carried") and builder.config is not None:
                return _by_class(builder, file, split, task, expected, done)
            return done
        what = f"{made} cannot be called" if isinstance(made, str) else "the network cannot be made"
        notes.append(f"{what} in another process: {figures['unbuilt']}")
    here: dict[str, Any] = {"built": "its modules, without any value"}
    if digest is not None:
        here["digest"] = digest
    try:
        here |= fresh.prove(file, fresh.skeleton(builder.origin), own, task, expected)
    except Exception as e:  # the user's network may raise anything
        here["failed"] = f"{type(e).__name__}: {str(e)[:300]}"
    return _Found(here, HERE, notes)


def _by_class(
    builder: Builder,
    file: Path,
    split: Split | str,
    task: Task,
    expected: list[Tensor],
    otherwise: _Found,
) -> _Found:
    """What its class makes of its configuration, in a fresh process; where that fails, as it was.

    The network may have been changed since it was made, so that a failure says nothing of the file.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
            builder.config.save_pretrained(folder)
            figures = fresh.check(
                file,
                "gossamer.nets.sources:blank",
                split,
                task=task,
                threads=torch.get_num_threads(),
                model_options={"folder": folder},
                expected=expected,
            )
    except (GossamerError, OSError, TypeError, ValueError):  # what is no JSON among them
        return otherwise
    what = f"{type(builder.origin).__name__} of transformers, by its configuration"
    found = _Found({**figures, "built": what}, notes=otherwise.notes)
    good = "test" in figures and found.problem is None
    return found if good else otherwise
