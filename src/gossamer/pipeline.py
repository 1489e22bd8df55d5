"""Run a recipe: stage by stage, resumable to the same bytes, ending in a file and a report.

The run directory holds ``recipe.json`` (what is being run), ``stage-N.pt`` (the network after
each stage), the training checkpoints inside a stage, ``metrics/*.jsonl``, ``model.gsm``,
``run.json`` (every figure) and ``report.html``. Choices look at the validation split; the test
split is evaluated before and after only.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gossamer
from gossamer import datasets, fresh, names, nets, recipe, report
from gossamer.curvature import hessian_diagonal
from gossamer.datasets import Dataset
from gossamer.errors import ArgumentError, GossamerError
from gossamer.masks import Masks, keep_top
from gossamer.method import Masked, Method
from gossamer.pack import Archive, load_into, pack, unpack
from gossamer.prune import magnitude, obd, sensitivity
from gossamer.quantize import SharedWeights, absorb_batchnorm, quantize_biases, share_model
from gossamer.quantize.rate_aware import RateAware
from gossamer.report import tables
from gossamer.training import (
    Evaluation,
    Progress,
    evaluate,
    load_checkpoint,
    save_atomic,
    soft_targets,
    train,
)

__all__ = ["Result", "compress", "run"]

# Patterns per Hessian diagonal: its noise falls with the square root, its cost is linear.
_CURVATURE_PATTERNS = 4096


@dataclass(frozen=True)
class Result:
    """What a run leaves: paths, bytes and figures (accuracies as ``Evaluation.as_dict``)."""

    out: Path
    file: Path
    report: Path
    bytes: int
    dense_bytes: int
    accuracy_before: dict[str, Any]
    accuracy_after: dict[str, Any]
    run: dict[str, Any]

    @property
    def ratio(self) -> float:
        """Dense bytes over file bytes."""
        return self.dense_bytes / self.bytes


@dataclass
class _Run:
    """The state a stage works on."""

    model: nn.Module
    data: Dataset
    out: Path
    seed: int
    say: Callable[[str], None]
    progress: Callable[[str, Progress], None] | None
    masks: Masks = field(default_factory=Masks)
    reference: dict[str, Tensor] = field(default_factory=dict)
    scan: dict[str, list[list[float]]] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)

    def train(
        self, name: str, settings: recipe.Training, methods: tuple[Method, ...] = (), salt: int = 0
    ) -> None:
        """Train inside a stage, with a checkpoint of its own."""
        if not settings.epochs and not methods:
            return
        folder = self.out / "metrics"
        folder.mkdir(exist_ok=True)
        progress = self.progress
        tell = None if progress is None else lambda p: progress(name, p)
        loss, teacher = None, None
        if settings.distill:
            teacher = copy.deepcopy(self.model)
            teacher.load_state_dict(self.reference)
            weight = settings.distill

            def loss(outputs: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
                return soft_targets(outputs, targets, wanted, weight=weight)

        history = train(
            self.model,
            self.data,
            settings.config(self.seed + salt),
            methods=methods,
            loss=loss,
            teacher=teacher,
            checkpoint=self.out / f"train-{name}.pt",
            metrics=folder / f"{name}.jsonl",
            progress=tell,
        )
        for row in history.epochs:
            self.curves.append(
                {
                    "stage": name,
                    "epoch": row["epoch"],
                    "train_loss": row["train_loss"],
                    "validation_accuracy": row["validation_accuracy"],
                }
            )


def _stage_train(run: _Run, stage: recipe.Train, name: str) -> None:
    run.train(name, stage)


def _stage_sensitivity(run: _Run, stage: recipe.Sensitivity, name: str) -> None:
    found = sensitivity.scan(
        run.model,
        run.data.validation,
        densities=stage.densities,
        include=stage.include,
        exclude=stage.exclude,
    )
    run.scan = found.as_dict()


def _scores(run: _Run, stage: recipe.Prune) -> dict[str, Tensor]:
    if stage.method == "random":
        generator = torch.Generator().manual_seed(run.seed)
        return magnitude.random_scores(
            run.model, generator, include=stage.include, exclude=stage.exclude
        )
    if stage.method == "obd":
        patterns = run.data.train.take(torch.arange(min(_CURVATURE_PATTERNS, len(run.data.train))))
        weights = names.weights(run.model, include=stage.include, exclude=stage.exclude)
        diagonal = hessian_diagonal(run.model, patterns)
        return obd.saliency(weights, {n: diagonal[n] for n in weights})
    return magnitude.scores(run.model, include=stage.include, exclude=stage.exclude)


def _stage_prune(run: _Run, stage: recipe.Prune, name: str) -> None:
    chosen = names.weights(run.model, include=stage.include, exclude=stage.exclude)
    within = Masks({n: m for n, m in run.masks.items() if n in chosen}) or None
    dropout = {m: m.p for m in run.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)}
    final: float | dict[str, float]
    if stage.density == "auto":
        found = sensitivity.scan(
            run.model, run.data.validation, include=stage.include, exclude=stage.exclude
        )
        run.scan = found.as_dict()
        final = found.suggest(stage.max_drop)
    elif isinstance(stage.density, float) and stage.scope == "global":
        final = stage.density
    elif stage.density is not None:
        final = magnitude.densities_for(chosen, stage.density)
    else:
        final = {}
    try:
        for number in range(1, stage.rounds + 1):
            if stage.quality is not None:
                masks = magnitude.threshold_masks(
                    run.model,
                    stage.quality,
                    within=within,
                    include=stage.include,
                    exclude=stage.exclude,
                )
            else:
                part = number / stage.rounds
                budget: float | dict[str, float] = (
                    {n: d**part for n, d in final.items()}
                    if isinstance(final, dict)
                    else final**part
                )
                masks = keep_top(
                    _scores(run, stage),
                    budget,
                    scope=stage.scope,
                    within=within,
                    floor=stage.floor,
                )
                magnitude.warn_empty(masks)
            within = masks
            for module, rate in dropout.items():
                module.p = rate if stage.dropout is None else stage.dropout
            magnitude.rescale_dropout(run.model, masks)
            last = number == stage.rounds
            settings = stage.retrain if last else stage.between or stage.retrain
            if settings is None:
                masks.apply_(run.model)
                continue
            run.train(
                f"{name}-{number}" if stage.rounds > 1 else name,
                settings,
                (Masked(masks),),
                salt=100 * number,
            )
            masks.apply_(run.model)
    finally:
        for module, rate in dropout.items():
            module.p = rate
    if within is not None:
        run.masks.update(within)


def _stage_share(run: _Run, stage: recipe.Share, name: str) -> None:
    found = share_model(
        run.model,
        bits=stage.bits,
        init=stage.init,
        include=stage.include,
        exclude=stage.exclude,
        generator=torch.Generator().manual_seed(run.seed),
    )
    if stage.finetune is not None:
        method = SharedWeights(found)
        run.train(name, stage.finetune, (method,), salt=10_000)
        method.finish()
        return
    parameters = names.parameters(run.model)
    with torch.no_grad():
        for weight, quantized in found.items():
            parameters[weight].copy_(quantized.dequantize())


def _stage_rate_aware(run: _Run, stage: recipe.RateAwareStage, name: str) -> None:
    method = RateAware.relative(
        run.model,
        step=stage.step,
        lam=stage.lam,
        masks=run.masks,
        include=stage.include,
        exclude=stage.exclude,
    )
    run.train(name, stage.train, (method,), salt=20_000)
    method.finish()
    run.masks.update(
        Masks.of(names.weights(run.model, include=stage.include, exclude=stage.exclude))
    )


def _stage_quantize_biases(run: _Run, stage: recipe.QuantizeBiases, name: str) -> None:
    quantize_biases(run.model, bits=stage.bits)


def _stage_absorb_batchnorm(run: _Run, stage: recipe.AbsorbBatchnorm, name: str) -> None:
    absorb_batchnorm(run.model)


_RUNNERS: dict[str, Callable[[_Run, Any, str], None]] = {
    "train": _stage_train,
    "sensitivity": _stage_sensitivity,
    "prune": _stage_prune,
    "share": _stage_share,
    "rate_aware": _stage_rate_aware,
    "quantize_biases": _stage_quantize_biases,
    "absorb_batchnorm": _stage_absorb_batchnorm,
}


def _density(model: nn.Module) -> float:
    weights = names.weights(model)
    total = sum(w.numel() for w in weights.values())
    return sum(int((w != 0).sum()) for w in weights.values()) / max(1, total)


def _write(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)


def _check_directory(out: Path, identity: dict[str, Any], restart: bool) -> None:
    """Begin, or go on with, the run that this directory is of."""
    marker = out / "recipe.json"
    if restart and marker.exists():
        shutil.rmtree(out)
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise ArgumentError(f"out={out} is not empty and is no run directory; name another one")
    out.mkdir(parents=True, exist_ok=True)
    if marker.exists():
        old = json.loads(marker.read_text())
        for key, value in identity.items():
            if old.get(key) != value:
                raise ArgumentError(
                    f"{out} holds a run with another {key}: {json.dumps(old.get(key))[:300]}, "
                    f"now {json.dumps(value)[:300]}; start anew with restart (--restart), or "
                    "name another directory"
                )
    else:
        _write(marker, identity)


def _latency(dense: nn.Module, decoded: nn.Module, data: Dataset) -> dict[str, Any]:
    """Batch-1 milliseconds of both networks in the same engine, runs interleaved."""
    example = data.test.inputs[:1]
    best = [float("inf"), float("inf")]
    with torch.inference_mode():
        dense.eval()
        decoded.eval()
        for _ in range(30):
            for i, network in enumerate((dense, decoded)):
                start = time.perf_counter()
                network(example)
                best[i] = min(best[i], time.perf_counter() - start)
    return {
        "dense_ms": best[0] * 1e3,
        "compressed_ms": best[1] * 1e3,
        "ratio": best[0] / best[1],
        "engine": "torch eager",
        "batch": 1,
        "note": "The file decodes to dense tensors: it is smaller on disk, not faster to run.",
    }


def run(
    source: recipe.Recipe,
    model: nn.Module,
    data: Dataset,
    out: str | Path,
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    command: str | None = None,
    restart: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, Progress], None] | None = None,
) -> Result:
    """Run a recipe on a model, which ends as the file decodes.

    Args:
        source: the recipe.
        model: trained, or to be trained by the recipe's first stage; changed in place.
        data: validation decides, test reports.
        out: run directory; a killed run goes on from it, to the same bytes.
        model_name, dataset_name: with both, a fresh process rebuilds the network and evaluates
            the file; without, it decodes the file and the accuracy is measured in this one.
        model_options: keyword arguments for :func:`gossamer.nets.build` beside the name.
        command: the command line, for the report.
        restart: throw an older run in ``out`` away.
        say: receives progress lines; ``progress`` the training loop's, with the stage's name.

    Raises :class:`ArgumentError` when ``out`` holds another run, naming what differs, and what
    the stages raise; finished stages stay on disk.
    """
    out = Path(out)
    started = time.time()
    identity = {
        "recipe": source.model_dump(mode="json"),
        "model": model_name or type(model).__name__,
        "dataset": dataset_name or data.name,
        "initial": fresh.digest(names.clean_state_dict(model)),
    }
    _check_directory(out, identity, restart)
    state = _Run(model, data, out, source.seed, say, progress)
    trained_until = 0
    while source.stages[trained_until].stage == "train":
        trained_until += 1
    rows: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    reference = copy.deepcopy(model)
    for number, stage in enumerate(source.stages[:-1]):
        name = f"{number + 1}-{stage.stage}"
        saved = out / f"stage-{number + 1}.pt"
        if number == trained_until:
            before = _reference(state, out)
            reference.load_state_dict(state.reference)
        if saved.exists():
            found = load_checkpoint(saved)
            model.load_state_dict(found["model"])
            state.masks = Masks(found["masks"])
            state.scan, state.curves = found["scan"], found["curves"]
            rows.append(found["row"])
            continue
        begun = time.monotonic()
        say(f"stage {name}")
        _RUNNERS[stage.stage](state, stage, name)
        figures = evaluate(model, data.validation)
        rows.append(
            {
                "stage": name,
                "accuracy": figures.accuracy,
                "density": _density(model),
                "bytes": None,
                "seconds": round(time.monotonic() - begun, 2),
            }
        )
        say(f"  validation accuracy {figures.accuracy:.4f}, density {rows[-1]['density']:.4f}")
        save_atomic(
            {
                "model": model.state_dict(),
                "masks": dict(state.masks),
                "scan": state.scan,
                "curves": state.curves,
                "row": rows[-1],
            },
            saved,
        )
    if not before:
        before = _reference(state, out)
        reference.load_state_dict(state.reference)
    file = out / "model.gsm"
    last = source.stages[-1]
    assert isinstance(last, recipe.Pack)  # for the type checker: the recipe's validator says so
    pack(model, file, profile=last.profile, metadata={"recipe": source.name})
    wanted = fresh.digest(unpack(file))
    rows.append(
        {
            "stage": f"{len(source.stages)}-pack",
            "accuracy": rows[-1]["accuracy"] if rows else before["accuracy"],
            "density": _density(model),
            "bytes": file.stat().st_size,
            "seconds": round(time.time() - started, 2),
        }
    )
    say("decoding the file in a fresh process")
    known = model_name if model_name and dataset_name else None
    back = fresh.check(file, known, dataset_name, model_options=model_options)
    if not _identical(model, file) or back["digest"] != wanted:
        raise GossamerError(f"{file} does not decode to the network that was packed; please report")
    decoded = copy.deepcopy(model)
    load_into(file, decoded)
    after = back.get("test") or evaluate(decoded, data.test).as_dict()
    return _finish(
        state,
        source,
        identity,
        rows,
        before,
        after,
        file,
        command,
        _latency(reference, decoded, data),
    )


def _identical(model: nn.Module, file: Path) -> bool:
    back = unpack(file)
    return all(torch.equal(back[n], v.cpu()) for n, v in names.clean_state_dict(model).items())


def _reference(state: _Run, out: Path) -> dict[str, Any]:
    """Remember the network before the first stage that compresses it, and its test figures."""
    path = out / "reference.pt"
    if not path.exists():
        figures: Evaluation = evaluate(state.model, state.data.test)
        state.say(f"before: test accuracy {figures.accuracy:.4f}")
        save_atomic({"model": state.model.state_dict(), "test": figures.as_dict()}, path)
    found = load_checkpoint(path)
    state.reference = found["model"]
    test: dict[str, Any] = found["test"]
    return test


def _finish(
    state: _Run,
    source: recipe.Recipe,
    identity: dict[str, Any],
    rows: list[dict[str, Any]],
    before: dict[str, Any],
    after: dict[str, Any],
    file: Path,
    command: str | None,
    latency: dict[str, Any],
) -> Result:
    """Write run.json and the report."""
    with Archive(file) as archive:
        layers = tables.layer_rows(archive.rows(), archive.tensors())
        dense, parts = archive.dense_bytes, archive.parts()
    size = file.stat().st_size
    figures: dict[str, Any] = {
        "name": source.name,
        "command": command or "gossamer.pipeline.run(...)",
        "versions": {
            "gossamer": gossamer.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": recipe.dump(source),
        "model": identity["model"],
        "dataset": identity["dataset"],
        "accuracy": {"before": before, "after": after},
        "stages": rows,
        "bytes": {
            "dense": dense,
            "file": size,
            "ratio": dense / size,
            "parts": parts,
            "reloaded": {"fresh_process": True, "identical": True},
        },
        "layers": layers,
        "latency": latency,
        "sensitivity": state.scan,
        "curves": state.curves,
        "mask_image": tables.first_layer_image(unpack(file), state.data.in_shape),
    }
    _write(state.out / "run.json", figures)
    page = report.write(figures, state.out / "report.html")
    return Result(state.out, file, page, size, dense, before, after, figures)


def compress(
    model: nn.Module | str,
    dataset: Dataset | str,
    *,
    recipe: str | Path | recipe.Recipe = "deep-compression",  # type: ignore[valid-type]
    out: str | Path,
    overrides: tuple[str, ...] = (),
    restart: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """Compress a network in one call: model and data by object or by name.

    ``recipe``: a built-in name, a YAML file, or a :class:`gossamer.recipe.Recipe`. See
    :func:`run` for the rest.
    """
    return _compress(model, dataset, recipe, out, overrides, restart, say)


def _compress(
    model: nn.Module | str,
    dataset: Dataset | str,
    source: str | Path | recipe.Recipe,
    out: str | Path,
    overrides: tuple[str, ...],
    restart: bool,
    say: Callable[[str], None],
) -> Result:
    plan = source if isinstance(source, recipe.Recipe) else recipe.load(source, overrides)
    data = datasets.load(dataset) if isinstance(dataset, str) else dataset
    options: dict[str, Any] = {"pretrained": plan.pretrained} if plan.pretrained else {}
    network = nets.build(model, seed=plan.seed, **options) if isinstance(model, str) else model
    return run(
        plan,
        network,
        data,
        out,
        model_name=model if isinstance(model, str) else None,
        dataset_name=dataset if isinstance(dataset, str) else None,
        restart=restart,
        say=say,
    )
