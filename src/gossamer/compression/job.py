"""One run of a recipe: its directory, its stages in order, and how it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import report
from gossamer.compression import (
    coverage,
    floor,
    folder,
    measure,
    packing,
    proof,
    records,
    saved,
    size,
    undone,
)
from gossamer.compression import recipe as recipes
from gossamer.compression.progress import Reporter
from gossamer.compression.recipe import Recipe
from gossamer.compression.result import Result
from gossamer.compression.stage import aiming
from gossamer.compression.state import State
from gossamer.core.errors import GossamerError
from gossamer.core.plain import copied
from gossamer.datasets import Dataset
from gossamer.pack import Archive, pack
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

__all__ = ["Job"]

_ESTIMATED = 1 << 19  # up to so many tensor entries the packed size is known after every stage


@dataclass
class Job:
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
        told = None if self.recipe.max_bytes is None else aiming(self.recipe.work)
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
            promised = undone.Promises(state)
            state.size = self._size(number) if told == number - 1 else None
            stage.run(state)
            state.forget_seeds()
            if lost := promised.lost(state):
                state.notes["undone"] = lost
                for sentence in lost:
                    self.progress.say(f"  {sentence}")
            rows.append(self._row(state, time.monotonic() - begun) | state.notes)
            saved.save(state, rows[-1], path)
            for checkpoint in self.out.glob(f"{number}-*.train.pt"):
                checkpoint.unlink()
        return state, rows, before or self._reference(state)

    def _size(self, number: int) -> size.Size:
        """What the file may have, as stage ``number`` is told it."""
        assert self.recipe.max_bytes is not None
        later = self.recipe.work[number:]
        return size.Size(self.recipe.max_bytes, later, self.recipe.pack.profile)

    def _row(self, state: State, seconds: float) -> dict[str, Any]:
        packing.infinite_buffers(state.model)  # refuses NaN where it came up
        found = state.judge()
        row = {
            "stage": state.name,
            "score": found.score,
            "density": measure.density(state.model),
            "bytes": None,
            "seconds": round(seconds, 2),
        }
        entries = sum(t.numel() for t in state.model.state_dict().values() if torch.is_tensor(t))
        takes = ""
        if entries <= _ESTIMATED:
            row["bytes"] = packing.packed(state, self.recipe.pack.profile)
            takes = f", {row['bytes']:,} bytes packed"
        self.progress.say(
            f"  validation {found.metric.name} {found.metric.show(found.score)}, density "
            f"{row['density']:.4f}{takes}, {seconds:.1f} s"
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
        self._pack(state, file)
        decoded, after, of_file, problems = self._decoded(state, file, data_source)
        score = _score(rows[-1]) if rows else state.judge(decoded).score
        rows.append(
            {
                "stage": f"{len(self.recipe.work) + 1}-pack",
                "score": score,
                "density": measure.density(decoded),
                "bytes": of_file["bytes"]["file"],
                "seconds": round(time.monotonic() - begun, 2),
            }
        )
        timing, macs = self._timed(state, decoded)
        held = floor.verdict(self.validation, score, self.recipe.max_drop, self.task.metric)
        if not held["kept"]:
            problems.append(promises.keeps(held, self.task.metric))
        asked = None
        if self.recipe.max_bytes is not None:
            asked = size.verdict(self.recipe.max_bytes, of_file["bytes"]["file"])
            if not asked["kept"]:
                problems.append(promises.fits(asked))
            elif asked["bytes"] < size.NEAR * asked["most"]:
                self.notes.append(
                    f"the file takes {asked['bytes']:,} of the {asked['most']:,} bytes that it may "
                    "have: the lowest price makes it no larger; a finer step or a higher density "
                    "would use the rest"
                )
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
            "size": asked,
            "problems": problems,
            "notes": [
                *self.notes,
                *(f"{row['stage']}: {told}" for row in rows for told in row.get("undone", ())),
            ],
            "coverage": coverage.of_recipe(state.origin, self.recipe),
            "stages": rows,
            **of_file,
            "latency": timing,
            "macs": macs,
            "integer": measure.integer_figures(decoded, self.data.test)
            if isinstance(decoded, Emulated)
            else None,
            "sensitivity": state.scan,
            "curves": state.curves,
        }
        folder.write_text(self.out / "run.json", json.dumps(figures, indent=1) + "\n")
        page = report.write(figures, self.out / "report.html")
        return Result(
            out=self.out,
            file=file,
            report=page,
            bytes=of_file["bytes"]["file"],
            dense_bytes=of_file["bytes"]["dense"],
            before=Evaluation.of(before),
            after=Evaluation.of(after),
            model=decoded,
            run=figures,
        )

    def _pack(self, state: State, file: Path) -> None:
        self.progress.say("pack")
        with pack(
            state.model,
            file,
            profile=self.recipe.pack.profile,
            metadata=records.metadata(state.structure),
            seeds=state.seeds,
            allow_nonfinite=packing.infinite_buffers(state.model),
            progress=lambda name, done, total: self.progress.count("pack", done, total, name),
        ):
            pass

    def _decoded(
        self, state: State, file: Path, data_source: Any
    ) -> tuple[nn.Module, dict[str, Any], dict[str, Any], list[str]]:
        """The file's network, its test figures, the file's parts in bytes, and what was wrong."""
        self.progress.say("decode and evaluate in a fresh process")
        builder = self.builder or proof.Builder(None, {}, state.origin)
        reloaded, after = proof.proved(
            builder, file, state.model, self.data, self.task, data_source
        )
        decoded = state.model
        with Archive(file, max_bytes=1 << 62, keep=True) as archive:
            try:
                decoded = records.load(archive, copied(state.origin))
            except GossamerError as e:
                reloaded["not_proved"] = reloaded["not_proved"] or f"the file does not load: {e}"
            # of a network with other modules the file's tensors are not those that there were
            whole = measure.tensor_bytes(state.origin) if state.structure else None
            takes, layers, picture = measure.file_figures(archive, self.data, whole)
        after = after or self._test(decoded).as_dict()
        takes["reloaded"] = reloaded
        problems = [f"NOT PROVED: {reloaded['not_proved']}"] if reloaded["not_proved"] else []
        return decoded, after, {"bytes": takes, "layers": layers, "mask_image": picture}, problems

    def _timed(
        self, state: State, decoded: nn.Module
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Latency and multiply-adds, where the recipe asks and the network takes one example."""
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
        return timing, macs


def _score(row: Mapping[str, Any]) -> float:
    """Of a stage's row; those of a run begun by an earlier version say accuracy."""
    found: float = row["score"] if "score" in row else row["accuracy"]
    return found
