"""Commands that deploy: export, compile, and bench of networks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.measure import bench
from gossamer.cli.options import (
    MODEL,
    AsJson,
    Examples,
    Key,
    Pretrained,
    Shape,
    Weights,
    example,
)
from gossamer.cli.program import app
from gossamer.compression.progress import console
from gossamer.core.errors import ArgumentError
from gossamer.core.files import picture

if TYPE_CHECKING:
    from torch import nn

    from gossamer.datasets import Dataset
    from gossamer.runtime.engines import Subject

__all__ = ["bench_networks", "compile_", "export_"]

SUBJECT = f"A .gsm file of a run, or: {MODEL}"
_OF_FILE = "Of a .gsm file: the network that it is of; left out: what run.json beside it says."
Given = Annotated[str | None, typer.Option("--model", "-m", help=_OF_FILE)]


@app.command("export")
def export_(
    network: Annotated[str, typer.Argument(help=SUBJECT)],
    to: Annotated[Path, typer.Option("--to", help="The .onnx, .xml, .pte or .gguf file to write.")],
    dataset: Examples = None,
    shape: Shape = None,
    int8: Annotated[bool, typer.Option("--int8", help="Eight bits, calibrated on --data.")] = False,
    int8_weights: Annotated[
        str, typer.Option(help="int7 (fast everywhere), uint8 (exact grids of 8 bits) or auto.")
    ] = "auto",
    floor: Annotated[
        float, typer.Option(min=0, max=1, help="The least cosine of int8 outputs with torch's.")
    ] = 0.98,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Of .gguf: weights that need not be ternary, by name or pattern."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    model: Given = None,
    weights: Weights = None,
    key: Key = None,
    pretrained: Pretrained = False,
    as_json: AsJson = False,
) -> None:
    """Write a network for onnxruntime, OpenVINO, ExecuTorch, or ternary weights for llama.cpp.

    The file is run there and compared with torch before it is written: float32 to 1e-4 of the
    largest output, int8 to the floor; else nothing is written. A .gguf file holds tensors alone,
    ternary weights in TQ2_0, which are read back and compared.
    """
    from gossamer.runtime.export import export

    if model is not None and Path(network).suffix != ".gsm":
        raise ArgumentError(f"network {network!r} and --model {model!r}: give one of them")
    found, data = _named(network, model, weights, dataset).build(pretrained, key)
    made = export(
        found,
        example(data, shape),
        to,
        precision="int8" if int8 else "float32",
        calibration=data.train if int8 and data is not None else None,
        weights=int8_weights,  # type: ignore[arg-type]  # checked there
        floor=floor,
        exclude=exclude or None,
        overwrite=overwrite,
    )
    print(json.dumps(asdict(made), default=str) if as_json else made)


@app.command("compile")
def compile_(
    network: Annotated[str, typer.Argument(help=SUBJECT)],
    to: Annotated[
        Path | None, typer.Option("--to", help="A .plan file to write, which runs without torch.")
    ] = None,
    dataset: Examples = None,
    shape: Shape = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples a call.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of each kernel.")] = 1,
    engine: Annotated[
        str,
        typer.Option(
            help="auto, plan (a kernel for each layer), own (of this library alone), onnxruntime, "
            "openvino, numpy or torch."
        ),
    ] = "auto",
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Layers in eight bits where faster, calibrated on --data."),
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="At most, of each candidate.")] = 30,
    small: Annotated[
        bool, typer.Option("--small", help="Pack the file of --to: entropy-coded, for transport.")
    ] = False,
    model: Given = None,
    weights: Weights = None,
    key: Key = None,
    pretrained: Pretrained = False,
    as_json: AsJson = False,
) -> None:
    """Choose the fastest kernel of every layer on this machine, by measuring; show the plan.

    The plan is compared with torch on the example inputs; that of a .gsm file is kept beside it.
    With --int8, what each layer and the whole network lose on the calibration inputs is shown.
    """
    from gossamer.compression.compiled import compile

    if model is not None and Path(network).suffix != ".gsm":
        raise ArgumentError(f"network {network!r} and --model {model!r}: give one of them")
    if small and to is None:
        raise ArgumentError("--small packs the file of --to, which is left out; give it")
    named = _named(network, model, weights, dataset)
    packed = named.file is not None and named.file.suffix == ".gsm"
    base, data = (replace(named, file=None) if packed else named).build(pretrained, key)
    with console() as show:
        plan = compile(
            named.file if packed and named.file is not None else base,
            example(data, shape, batch),
            model=base if packed else None,
            engine=engine,  # type: ignore[arg-type]  # checked there
            precision="int8" if int8 else "float32",
            calibration=data.train if int8 and data is not None else None,
            threads=threads,
            rounds=rounds,
            say=show.say,
        )
    if to is not None:
        plan.save(to, small=small)
    print(json.dumps(vars(plan.facts)) if as_json else plan.explain())


@bench.command("networks")
def bench_networks(
    networks: Annotated[list[str], typer.Argument(help=SUBJECT)],
    against: Annotated[
        str | None,
        typer.Option(
            help="The dense network, or its file; left out: of a .gsm file its network as built, "
            "else the first network."
        ),
    ] = None,
    dataset: Examples = None,
    shape: Shape = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="Only these; all that are installed by default.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Examples a call, such as 1,32.")] = "1",
    threads: Annotated[str, typer.Option(help="Of each engine, such as 1,2.")] = "1",
    rounds: Annotated[int, typer.Option(min=1, help="At most, of each combination.")] = 100,
    seconds: Annotated[float, typer.Option(min=0, help="For each combination.")] = 20.0,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG to draw.")] = None,
    model: Given = None,
    pretrained: Pretrained = False,
    as_json: AsJson = False,
) -> None:
    """Size and milliseconds of networks in every engine, against the dense one in the same engine.

    Everything is timed in one run, call by call in turn. Engines: torch, torch.compile (where
    named), onnxruntime and openvino in float32 and int8, gossamer (a plan), executorch.
    """
    from gossamer.analysis.plots import bars
    from gossamer.runtime.bench import bench as measure

    if plot is not None:
        picture(plot)
    subjects = _subjects(networks, against, model, pretrained, dataset, shape)
    with console() as show:
        found = measure(
            subjects,
            engines=engine,
            batches=_numbers(batch, "--batch"),
            threads=_numbers(threads, "--threads"),
            rounds=rounds,
            seconds=seconds,
            say=show.say,
        )
    if plot is not None:
        groups: dict[str, dict[str, float]] = {}
        for t in found.timings:
            group = f"{t.engine}, batch {t.batch}, {t.threads} thr."
            groups.setdefault(group, {})[t.network] = t.ms
        bars(groups, plot, xlabel=f"milliseconds, median ({found.processor})")
    print(json.dumps(found.as_dict()) if as_json else found.table())


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as e:
        raise ArgumentError(f"{option} {text!r} holds no whole numbers such as 1,32") from e


def _subjects(
    networks: list[str],
    against: str | None,
    model: str | None,
    pretrained: bool,
    dataset: str | None,
    shape: str | None,
) -> list[Subject]:
    """The dense network, then the others."""
    from gossamer.runtime.engines import Subject

    found = [_named(n, model, None, dataset) for n in networks]
    if against is not None:
        found.insert(0, _named(against, model, None, dataset))
    elif found[0].file is not None:
        found.insert(0, replace(found[0], file=None))
    made: list[Subject] = []
    shared = next((one.dataset for one in found if one.dataset is not None), None)
    for one in found:
        network, data = replace(one, dataset=shared).build(pretrained and one.file is None, None)
        batch = example(data, shape, 4)
        calibration = []
        if data is not None and shape is None:
            last = min(len(data.train), 128)
            parts = [slice(i, min(i + 32, last)) for i in range(0, last, 32)]
            calibration = [data.train.batch(part)[0] for part in parts]
        name = one.network if one.file is None else one.file.name
        if any(name == other.name for other in made):
            name = str(one.file or f"{name} ({len(made)})")
        size = None if one.file is None else one.file.stat().st_size
        made.append(Subject(name, network, batch, calibration, size))
    return made


@dataclass(frozen=True)
class _Named:
    """What a command line names: a network, a file of its weights, and data."""

    network: str
    file: Path | None
    dataset: str | None

    def build(self, pretrained: bool, key: str | None) -> tuple[nn.Module, Dataset | None]:
        """The network, in the shape of the data where there are any."""
        from gossamer import datasets, nets
        from gossamer.compression import inputs

        if self.dataset is not None:
            data = datasets.load(self.dataset)
            given: dict[str, Any] = {"pretrained": pretrained, "weights": self.file, "key": key}
            return inputs.network(self.network, data, **given), data
        built = nets.build(self.network, pretrained=pretrained)
        return (built if self.file is None else inputs.load_weights(built, self.file, key)), None


def _named(network: str, model: str | None, weights: Path | None, dataset: str | None) -> _Named:
    if Path(network).suffix != ".gsm":
        return _Named(network, weights, dataset)
    if weights is not None:
        raise ArgumentError(f"{network} is a file of weights: leave --weights {weights} out")
    if not Path(network).is_file():
        raise ArgumentError(f"there is no file {network}")
    known = _beside(Path(network))
    given = model or known.get("model")
    if given is None:
        raise ArgumentError(f"{network} holds tensors; say of which network they are: --model NAME")
    return _Named(given, Path(network), dataset or known.get("dataset"))


def _beside(file: Path) -> dict[str, Any]:
    """Network and data that the run.json beside a file names; only those that run no code."""
    from gossamer import datasets, nets

    try:
        run = json.loads((file.parent / "run.json").read_text())
        found = {key: run[key] for key in ("model", "dataset") if isinstance(run[key], str)}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    own = {"model": nets.is_own, "dataset": lambda name: name not in datasets.DATASETS}
    return {key: value for key, value in found.items() if not own[key](value)}
