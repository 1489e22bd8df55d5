"""The command line: thin, no logic of its own."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gossamer import datasets, nets, pipeline, recipe, report, reproduce, training
from gossamer.errors import ArgumentError, GossamerError
from gossamer.pack import Archive, load_into
from gossamer.pack import pack as write_pack
from gossamer.pack import unpack as read_pack
from gossamer.pack.writer import PROFILES
from gossamer.prune import sensitivity as sensitivities
from gossamer.training import TrainConfig, evaluate, load_checkpoint

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From a trained PyTorch network to a small file and a fast network.",
)
console = Console()
_state: dict[str, Any] = {"debug": False}

Model = Annotated[str, typer.Option("--model", "-m", help="A network's name or module:function.")]
Data = Annotated[str, typer.Option("--dataset", "-d", help="A dataset's name or module:function.")]
Weights = Annotated[
    Path | None, typer.Option(help="Trained weights: .safetensors, .gsm or a checkpoint.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def _options(
    threads: Annotated[int, typer.Option(help="torch threads; 0 leaves torch's choice.")] = 0,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    _state["debug"] = debug
    if threads:
        torch.set_num_threads(threads)


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False)


class _Bars:
    """Training progress: a bar on a terminal, a line an epoch elsewhere."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> _Bars:
        if console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, name: str, p: training.Progress) -> None:
        accuracy = (p.row or {}).get("validation_accuracy")
        figures = f"loss {p.loss:.4f}" + (f" validation {accuracy:.4f}" if accuracy else "")
        if not console.is_terminal:
            if accuracy is not None:
                _say(f"  {name}: epoch {p.epoch}/{p.epochs} {figures}")
            return
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=p.steps, figures=figures)
        self.bars.update(self.tasks[name], completed=p.step, figures=figures)


def _network(model: str, weights: Path | None, *, pretrained: bool = False, seed: int = 0) -> Any:
    network = nets.build(model, seed=seed, **({"pretrained": True} if pretrained else {}))
    if weights is None:
        return network
    if weights.suffix == ".gsm":
        return load_into(weights, network)
    if weights.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(weights)
    else:
        found = load_checkpoint(weights)
        state = found.get("model", found)
    try:
        network.load_state_dict(state)
    except RuntimeError as e:
        raise ArgumentError(f"{weights} does not fit {model}: {e}") from e
    return network


@app.command()
def train(
    model: Model,
    dataset: Data,
    out: Annotated[Path, typer.Option(help="Directory for checkpoint, metrics and weights.")],
    epochs: int = 10,
    lr: float = 0.05,
    batch_size: int = 64,
    optimizer: str = "sgd",
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    seed: int = 0,
    tensorboard: bool = False,
) -> None:
    """Train a network; killed, the same command goes on where it was."""
    out.mkdir(parents=True, exist_ok=True)
    network, data = nets.build(model, seed=seed), datasets.load(dataset)
    config = TrainConfig(
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        optimizer=optimizer,
        weight_decay=weight_decay,
        schedule=schedule,
        seed=seed,
    )
    with _Bars() as bars:
        training.train(
            network,
            data,
            config,
            checkpoint=out / "checkpoint.pt",
            metrics=out / "metrics.jsonl",
            tensorboard=out / "tensorboard" if tensorboard else None,
            progress=lambda p: bars("train", p),
        )
    from safetensors.torch import save_model

    save_model(network, str(out / "model.safetensors"))
    _say(f"test accuracy {evaluate(network, data.test).accuracy:.4f}")
    _say(f"weights {out / 'model.safetensors'}")


@app.command()
def compress(
    model: Annotated[str | None, typer.Option("--model", "-m")] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", "-d")] = None,
    recipe_name: Annotated[
        str, typer.Option("--recipe", "-r", help="A built-in recipe or a YAML file.")
    ] = "deep-compression",
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/compress"),
    weights: Weights = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override, e.g. stages.1.density=0.05.")
    ] = None,
    restart: Annotated[bool, typer.Option(help="Throw an older run in --out away.")] = False,
) -> None:
    """Compress any network with a recipe: a small file, and a report that proves it."""
    plan = recipe.load(recipe_name, set_ or [])
    model, dataset = model or plan.model, dataset or plan.dataset
    if model is None or dataset is None:
        raise ArgumentError(
            f"recipe {plan.name!r} names no {'model' if model is None else 'dataset'}; give "
            "--model and --dataset"
        )
    network = _network(model, weights, pretrained=plan.pretrained, seed=plan.seed)
    with _Bars() as bars:
        result = pipeline.run(
            plan,
            network,
            datasets.load(dataset),
            out,
            model_name=model,
            dataset_name=dataset,
            command=shlex.join(["gossamer", *sys.argv[1:]]),
            restart=restart,
            say=_say,
            progress=bars,
        )
    before, after = result.accuracy_before, result.accuracy_after
    _say(f"file     {result.file}  {result.bytes:,} bytes, {result.ratio:.1f}x smaller")
    _say(f"before   {before['accuracy']:.4f} test accuracy, {result.dense_bytes:,} bytes")
    _say(f"after    {after['accuracy']:.4f} test accuracy, decoded in a fresh process")
    _say(f"report   {result.report}")


@app.command()
def sensitivity(
    model: Model,
    dataset: Data,
    weights: Weights = None,
    pretrained: bool = False,
    density: Annotated[list[float] | None, typer.Option(help="Densities to try.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Layer patterns.")] = None,
    max_drop: Annotated[float, typer.Option(help="Accuracy a layer may cost on its own.")] = 0.005,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG to draw.")] = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy against density, one layer at a time."""
    network = _network(model, weights, pretrained=pretrained)
    data = datasets.load(dataset)
    options: dict[str, Any] = {"densities": tuple(density)} if density else {}
    with _quiet_progress("scan") as tell:
        found = sensitivities.scan(
            network, data.validation, include=include, progress=tell, **options
        )
    if plot is not None:
        found.plot(plot)
    if as_json:
        print(json.dumps({"scan": found.as_dict(), "suggested": found.suggest(max_drop)}))
        return
    _say(found.table())
    _say(f"densities that cost at most {max_drop:g} of accuracy each:")
    for name, value in found.suggest(max_drop).items():
        _say(f"  {name}: {value:g}")


class _quiet_progress:
    """A bar on the error stream for work counted in parts."""

    def __init__(self, what: str) -> None:
        self.bars = Progress(console=Console(stderr=True), transient=True)
        self.what = what

    def __enter__(self) -> Callable[[int, int], None]:
        self.bars.start()
        task = self.bars.add_task(self.what)
        return lambda done, total: self.bars.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self.bars.stop()


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help=".safetensors or a checkpoint.")],
    file: Annotated[Path, typer.Argument(help="The .gsm file to write.")],
    profile: Annotated[str, typer.Option(help=", ".join(PROFILES))] = "smallest",
) -> None:
    """Pack tensors losslessly into a small file."""
    if source.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(source)
    else:
        found = load_checkpoint(source)
        state = found.get("model", found)
    with _quiet_progress("pack") as tell:
        write_pack(state, file, profile=profile, progress=tell)
    with Archive(file) as archive:
        _say(f"{file}: {archive.file_bytes:,} bytes, {archive.dense_bytes:,} dense")


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="A .gsm file.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Decode a packed file to a plain safetensors file."""
    from safetensors.torch import save_file

    with Archive(file) as archive:
        aliases = dict(archive.aliases)
    tensors = {n: t for n, t in read_pack(file).items() if n not in aliases}
    temporary = target.with_name(target.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata=aliases or None)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _say(f"{target}: {len(tensors)} tensors")


@app.command()
def inspect(file: Annotated[Path, typer.Argument()], as_json: AsJson = False) -> None:
    """What a packed file holds: per tensor shape, density, values, codec, bytes, bits a weight."""
    with Archive(file) as archive:
        rows, parts = archive.rows(), archive.parts()
        size, dense, metadata = archive.file_bytes, archive.dense_bytes, archive.metadata
    if as_json:
        figures = {"file_bytes": size, "dense_bytes": dense, "parts": parts, "tensors": rows}
        print(json.dumps({**figures, "metadata": metadata}))
        return
    table = Table(box=None, pad_edge=False)
    columns = ("tensor", "shape", "density", "values", "codec", "bytes", "bits/weight")
    for column in columns:
        table.add_column(column, justify="left" if column in ("tensor", "codec") else "right")
    for row in rows:
        table.add_row(
            row["name"],
            "x".join(map(str, row["shape"])) or "scalar",
            f"{row['density']:.4f}",
            str(row["distinct"]),
            row["codec"],
            f"{row['bytes']:,}",
            f"{row['bits_per_weight']:.3f}",
        )
    console.print(table)
    _say(f"{size:,} bytes of file for {dense:,} dense: {dense / max(1, size):.1f}x")
    _say(", ".join(f"{name} {count:,}" for name, count in parts.items()))


@app.command("evaluate")
def evaluate_(
    model: Model,
    dataset: Data,
    weights: Weights = None,
    pretrained: bool = False,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    as_json: AsJson = False,
) -> None:
    """Accuracy of a network, a checkpoint or a packed file, with its confidence interval."""
    if split not in ("train", "validation", "test"):
        raise ArgumentError(f"split {split!r} is not one of train, validation, test")
    network = _network(model, weights, pretrained=pretrained)
    figures = evaluate(network, getattr(datasets.load(dataset), split))
    if as_json:
        print(json.dumps(figures.as_dict()))
        return
    low, high = figures.interval()
    _say(
        f"{split} accuracy {figures.accuracy:.4f} ({low:.4f} to {high:.4f} at 95 %), "
        f"{figures.correct}/{figures.total}, loss {figures.loss:.4f}"
    )


@app.command("report")
def report_(
    run: Annotated[Path, typer.Argument(help="A run directory or its run.json.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file to write.")] = None,
) -> None:
    """Write a run's page again."""
    source = run / "run.json" if run.is_dir() else run
    try:
        figures = json.loads(source.read_text())
    except (OSError, ValueError) as e:
        raise ArgumentError(f"{source} is no run's figures: {e}") from e
    _say(str(report.write(figures, out or source.with_name("report.html"))))


@app.command("reproduce")
def reproduce_(
    name: Annotated[str | None, typer.Argument()] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the experiments.")] = False,
    out: Path = Path("results"),
    seeds: Annotated[int, typer.Option(help="How many; 0 for the experiment's own.")] = 0,
    quick: Annotated[bool, typer.Option(help="A smoke run; proves the path only.")] = False,
    workers: Annotated[int, typer.Option(help="Processes; 0 for one a core.")] = 0,
) -> None:
    """Measure a published table again and write results/NAME.json."""
    if list_ or name is None:
        for experiment, summary in reproduce.names():
            _say(f"{experiment:36} {summary}")
        return
    path = reproduce.run(
        name, out=out, seeds=seeds or None, quick=quick, workers=workers or None, say=_say
    )
    _say(str(path))


@app.command("recipes")
def recipes_(name: Annotated[str | None, typer.Argument()] = None) -> None:
    """List the built-in recipes, or show one."""
    if name is None:
        for key, description in recipe.builtin().items():
            _say(f"{key:28} {description}")
        return
    _say(recipe.dump(recipe.load(name)))


def main() -> None:
    """Entry point: a known error is one line on the error stream and exit code 1."""
    try:
        app(standalone_mode=True)
    except (GossamerError, FileNotFoundError) as e:
        if _state["debug"]:
            raise
        Console(stderr=True).print(f"error: {e}", markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on where it was")
        sys.exit(130)
