"""The command line: thin, no logic of its own."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.errors import ArgumentError, GossamerError
from gossamer.progress import console

if TYPE_CHECKING:
    from torch import nn

    from gossamer.datasets import Dataset

# Commands import what they need when they run: `gossamer --help` answers at once.

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a trained PyTorch network to a small file and a fast network.",
)

_MODEL = "A network's name, module:function or file.py:function."
_DATASET = "digits, mnist, cifar10, text:NAME, module:function or file.py:function."
Model = Annotated[str, typer.Option("--model", "-m", help=_MODEL)]
Data = Annotated[str, typer.Option("--dataset", "-d", help=_DATASET)]
Weights = Annotated[
    Path | None, typer.Option(help="Trained tensors: .safetensors, .gsm, .pt or .pth.")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="The network's published weights.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


Threads = Annotated[
    int | None, typer.Option(min=1, callback=_threads, help="torch threads; torch's own choice.")
]


def _version(wanted: bool) -> None:
    if wanted:
        import gossamer

        print(gossamer.__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command; ``main`` has acted on ``debug`` by now."""


def _network(
    model: str, dataset: str, weights: Path | None, pretrained: bool
) -> tuple[nn.Module, Dataset]:
    from gossamer import datasets
    from gossamer.pipeline import inputs

    data = datasets.load(dataset)
    return inputs.network(model, data, pretrained=pretrained, weights=weights), data


@app.command()
def train(
    model: Model,
    dataset: Data,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    epochs: Annotated[int, typer.Option(min=0)] = 10,
    lr: float = 0.05,
    batch_size: int = 64,
    optimizer: Annotated[str, typer.Option(help="sgd or adam.")] = "sgd",
    weight_decay: float = 0.0,
    schedule: Annotated[str, typer.Option(help="Of the learning rate.")] = "cosine",
    weights: Weights = None,
    seed: Seed = 0,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard.")] = None,
    exchange: Annotated[
        str | None, typer.Option(help="Gradients between torchrun's processes; none: float32.")
    ] = None,
    topology: Annotated[
        str, typer.Option(help="Of the exchange: auto, all_gather, two_phase, server.")
    ] = "auto",
    timeout: Annotated[
        float, typer.Option(help="Seconds before a process that hangs ends the others.")
    ] = 300.0,
    threads: Threads = None,
) -> None:
    """Train a network. Killed, the same command goes on where it was.

    Beside OUT it keeps OUT.checkpoint.pt and OUT.metrics.jsonl.

    Under `torchrun --nproc-per-node 2 -m gossamer train ... --exchange terngrad` the processes
    share every batch and send gradients as terngrad, sq2 to sq8, qsgd-STEPS, signsgd, dorefa-BITS.
    """
    import contextlib
    import os

    from gossamer import datasets, training
    from gossamer.pipeline import inputs

    config = training.TrainConfig(
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        optimizer=optimizer,
        weight_decay=weight_decay,
        schedule=schedule,
        seed=seed,
    )
    data = datasets.load(dataset)
    network = inputs.network(model, data, seed=seed, weights=weights)
    with contextlib.ExitStack() as stack:
        workers = None
        if exchange is not None:
            from gossamer.distribute import Processes, by_name

            codec = None if exchange == "none" else by_name(exchange)
            workers = stack.enter_context(
                Processes.launched(codec, topology=topology, seed=seed, timeout=timeout)
            )
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ArgumentError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} processes would each train this network "
                "and write the same files; add --exchange terngrad, or --exchange none for "
                "float32 gradients"
            )
        first = workers is None or not workers.rank
        show = stack.enter_context(console()) if first else None
        training.train(
            network,
            data,
            config,
            checkpoint=out.with_name(out.name + ".checkpoint.pt"),
            metrics=out.with_name(out.name + ".metrics.jsonl"),
            tensorboard=tensorboard,
            progress=None if show is None else lambda p: show.training("train", p),
            workers=workers,
        )
    if not first:
        return
    inputs.save_safetensors(network, out)
    print(f"{_accuracy(training.evaluate(network, data.test), 'test')}\nweights  {out}")


@app.command()
def compress(
    model: Annotated[str | None, typer.Option("--model", "-m", help=_MODEL)] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help=_DATASET)] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A built-in recipe or a YAML file.")
    ] = "deep-compression",
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/compress"),
    weights: Weights = None,
    pretrained: Pretrained = False,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the recipe's.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override, e.g. stages.prune.density=0.05.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an older run away.")] = False,
    threads: Threads = None,
) -> None:
    """Compress a network by a recipe: a small file, and a report that proves it.

    Killed, the same command goes on where it was, to the same bytes.
    """
    from gossamer import pipeline
    from gossamer import recipe as recipes

    given = {"weights": weights and str(weights), "pretrained": pretrained or None, "seed": seed}
    extra = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    plan = recipes.load(recipe, [*(set_ or []), *extra])
    with console() as show:
        result = pipeline.run(
            plan,
            model,
            dataset,
            out,
            command=shlex.join(["gossamer", *sys.argv[1:]]),
            restart=restart,
            progress=show,
        )
    kept = sum(layer["kept"] for layer in result.run["layers"] if len(layer["shape"]) > 1)
    total = sum(layer["numel"] for layer in result.run["layers"] if len(layer["shape"]) > 1)
    print(f"file     {result.file}")
    print(f"bytes    {result.bytes:,} for {result.dense_bytes:,}: {result.ratio:.1f}x smaller")
    print(f"weights  {kept:,} of {total:,} kept")
    print(f"before   {_accuracy(result.before, 'test')}")
    where = result.run["bytes"]["reloaded"]["evaluated_in"]
    print(f"after    {_accuracy(result.after, 'test')}")
    print(f"reload   every bit the same in a fresh process; accuracy measured in {where}")
    timing = result.run["latency"]
    if timing:
        print(
            f"latency  {timing['dense_ms']:.3f} ms before, {timing['compressed_ms']:.3f} ms after "
            f"({timing['engine']}, batch 1). {timing['note']}".rstrip()
        )
    print(f"report   {result.report}")


def _accuracy(found: Any, split: str) -> str:
    low, high = found.interval()
    return (
        f"{100 * found.accuracy:.2f} % {split} accuracy ({found.correct:,}/{found.total:,}, "
        f"95 %: {100 * low:.2f} to {100 * high:.2f})"
    )


@app.command()
def sensitivity(
    model: Model,
    dataset: Data,
    weights: Weights = None,
    pretrained: Pretrained = False,
    density: Annotated[list[float] | None, typer.Option(help="Densities to try.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Layer patterns.")] = None,
    max_drop: Annotated[float, typer.Option(help="Accuracy a layer may cost on its own.")] = 0.005,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG to draw.")] = None,
    as_json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Accuracy against density, one layer at a time, on the validation split."""
    from gossamer.prune import sensitivity as sensitivities

    network, data = _network(model, dataset, weights, pretrained)
    with console() as show:
        found = sensitivities.scan(
            network,
            data.validation,
            densities=density or sensitivities.DENSITIES,
            include=include,
            progress=lambda done, total: show.count("scan", done, total),
        )
    if plot is not None:
        found.plot(plot)
    suggested = found.suggest(max_drop)
    if as_json:
        print(json.dumps({"base": found.base, "scan": found.as_dict(), "suggested": suggested}))
        return
    print(found.table())
    print(f"densities that cost at most {100 * max_drop:g} points each:")
    print("\n".join(f"  {name}: {value:g}" for name, value in suggested.items()))


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="A .safetensors, .pt or .pth file.")],
    file: Annotated[Path, typer.Argument(help="The .gsm file to write.")],
    profile: Annotated[str, typer.Option(help="smallest, fast or huffman.")] = "smallest",
    threads: Threads = None,
) -> None:
    """Pack tensors losslessly into a small file."""
    from gossamer.pack import pack as write
    from gossamer.pipeline import inputs

    state = inputs.read_state(source)
    with (
        console() as show,
        write(
            state,
            file,
            profile=profile,
            progress=lambda name, done, total: show.count("pack", done, total, name),
        ) as archive,
    ):
        size, dense = archive.file_bytes, archive.dense_bytes
    print(f"{file}: {size:,} bytes for {dense:,}: {dense / size:.2f}x smaller, lossless")


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="A .gsm file.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Decode a packed file to a plain safetensors file."""
    from gossamer.pack import unpack as read
    from gossamer.pipeline import inputs

    tensors = read(file)
    inputs.save_safetensors(tensors, target)
    print(f"{target}: {len(tensors)} tensors")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A .gsm file.")], as_json: AsJson = False
) -> None:
    """What a packed file holds, tensor by tensor, and where its bytes go."""
    from gossamer.pack import Archive, describe

    with Archive(file) as archive:
        rows, parts = describe(archive), archive.parts()
        size, dense, metadata = archive.file_bytes, archive.dense_bytes, archive.metadata
    if as_json:
        figures = {"file_bytes": size, "dense_bytes": dense, "parts": parts, "tensors": rows}
        print(json.dumps({**figures, "metadata": metadata}))
        return
    head = ["tensor", "shape", "density", "values", "codec", "bytes", "bits/weight"]
    cells = [
        [
            row["name"],
            "x".join(map(str, row["shape"])) or "scalar",
            f"{row['density']:.4f}",
            f"{row['distinct']:,}",
            row["codec"] if row["tied_to"] is None else f"tied to {row['tied_to']}",
            f"{row['bytes']:,}",
            f"{row['bits_per_weight']:.3f}",
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    for line in [head, *cells]:
        columns = zip(line, widths, strict=True)
        told = [c.ljust(w) if i in (0, 4) else c.rjust(w) for i, (c, w) in enumerate(columns)]
        print("  ".join(told).rstrip())
    print(f"{size:,} bytes for {dense:,}: {dense / size:.1f}x smaller")
    print(", ".join(f"{name} {count:,}" for name, count in parts.items()))


@app.command("evaluate")
def evaluate_(
    model: Model,
    dataset: Data,
    file: Annotated[
        Path | None, typer.Argument(help="A .gsm, .safetensors, .pt or .pth file.")
    ] = None,
    pretrained: Pretrained = False,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    as_json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Accuracy of a file's network on a dataset, with its confidence interval."""
    from gossamer.training import evaluate

    if split not in ("train", "validation", "test"):
        raise ArgumentError(f"split {split!r} is not one of train, validation, test")
    network, data = _network(model, dataset, file, pretrained)
    found = evaluate(network, getattr(data, split))
    print(json.dumps(found.as_dict()) if as_json else _accuracy(found, split))


@app.command("report")
def report_(
    run: Annotated[Path, typer.Argument(help="A run directory or its run.json.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file to write.")] = None,
) -> None:
    """Write a run's page again."""
    from gossamer import report

    source = run / "run.json" if run.is_dir() else run
    try:
        figures = json.loads(source.read_text())
    except (OSError, ValueError) as e:
        raise ArgumentError(f"{source} holds no run's figures: {e}") from e
    print(report.write(figures, out or source.with_name("report.html")))


@app.command("reproduce")
def reproduce_(
    name: Annotated[str | None, typer.Argument(help="An experiment.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the experiments.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results file.")] = Path("results"),
    seeds: Annotated[int | None, typer.Option(min=1, help="How many; its own number.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run: proves the path.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core.")] = None,
) -> None:
    """Measure a published table again and write results/NAME.json."""
    from gossamer import reproduce

    if list_ or name is None:
        for experiment, summary in reproduce.names():
            print(f"{experiment:28} {summary}")
        return
    print(reproduce.run(name, out=out, seeds=seeds, quick=quick, workers=workers))


@app.command("recipes")
def recipes_(
    name: Annotated[str | None, typer.Argument(help="A recipe to show.")] = None,
) -> None:
    """List the built-in recipes, or show one."""
    from gossamer import recipe as recipes

    if name is not None:
        print(recipes.show(name), end="")
        return
    for key, description in recipes.builtin().items():
        print(f"{key:24} {description}")


bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure this machine.")
app.add_typer(bench, name="bench")


@bench.command("exchange")
def bench_exchange(
    workers: Annotated[int, typer.Option(min=2, help="Processes, one thread each.")] = 2,
    rate: Annotated[str | None, typer.Option(help="Of each link: 1gbit, 200mbit.")] = None,
    hook: Annotated[list[str] | None, typer.Option(help="Only these; all by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each hook.")] = 1,
    divisor: Annotated[int, typer.Option(min=1, help="Of each layer's outputs.")] = 1,
    where: Annotated[str, typer.Option(help="auto, namespaces or loopback.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Seconds, bytes and processor time of a step's gradient exchange, hook by hook.

    AlexNet's 61,100,840 gradients between network namespaces, whose links --rate limits (needs
    root, ip and tc), else over loopback, without a limit. The gradients are random and fixed: the
    exchange is measured, not the network.
    """
    from gossamer.distribute.bench import HOOKS, table
    from gossamer.distribute.bench import bench as measure

    with console() as show:
        found = measure(
            workers=workers,
            rate=rate,
            hooks=hook or list(HOOKS),
            divisor=divisor,
            warm=3,
            steps=steps,
            rounds=rounds,
            where=where,
            say=show.say,
        )
    print(json.dumps(found) if as_json else table(found))


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a known error is told on the error stream, without a traceback, exit code 1."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given  # anywhere, so that it can be added to a command that failed
    given = [a for a in given if a != "--debug"]
    try:
        app(given, prog_name="gossamer")
    except (GossamerError, OSError) as e:
        if debug:
            raise
        told = str(e)
        if isinstance(e, OSError) and e.filename is not None:
            told = f"{e.filename}: {e.strerror}"
        print(f"error: {told}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as e:
        if e.code == 130:  # Ctrl-C, as typer passes it on
            print("stopped; the same command goes on where it was", file=sys.stderr)
        raise
