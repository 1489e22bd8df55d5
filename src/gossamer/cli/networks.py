"""Commands on networks: train, compress, sensitivity, evaluate, report."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli.options import (
    DATASET,
    MODEL,
    AsJson,
    Data,
    Key,
    Model,
    Pretrained,
    Seed,
    TaskName,
    Threads,
    Weights,
    load,
    scored,
    settle,
    smaller,
)
from gossamer.cli.program import app
from gossamer.compression.progress import console
from gossamer.core.errors import ArgumentError
from gossamer.core.files import picture

__all__ = ["compress", "evaluate_", "report_", "sensitivity", "train"]

_BELOW_FLOOR, _NOT_PROVED, _TOO_LARGE = 3, 4, 5  # exit codes of compress


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
    key: Key = None,
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
    task: TaskName = None,
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
    from gossamer.compression import door, inputs
    from gossamer.training.tasks import chosen

    if out.suffix != ".safetensors":  # by which every command knows it
        raise ArgumentError(f"--out {out}: end its name in .safetensors")
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
    network = inputs.network(model, data, seed=seed, weights=weights, key=key)
    aim, _ = chosen(task, data)
    if not aim.labelled:
        raise ArgumentError(
            f"dataset {data.name!r} has no labels: there is nothing to train an untrained network "
            "on; give labels"
        )
    door.check_fit(network, data, aim)
    settle(threads, network, data)
    with contextlib.ExitStack() as stack:
        workers = None
        if exchange is not None:
            from gossamer.distribute import Plan, Processes, by_name

            plan = None
            if exchange != "none":
                plan = Plan.of(by_name(exchange), topology=topology, seed=seed)
            workers = stack.enter_context(Processes.launched(plan, timeout=timeout))
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
            task=aim,
            checkpoint=out.with_name(out.name + ".checkpoint.pt"),
            metrics=out.with_name(out.name + ".metrics.jsonl"),
            tensorboard=tensorboard,
            progress=None if show is None else lambda p: show.training("train", p),
            workers=workers,
        )
    if not first:
        return
    inputs.save_safetensors(network, out)
    found = training.evaluate(network, data.test, task=aim)
    print(f"{scored(found, 'test')}\nweights  {out}")


@app.command()
def compress(
    network: Annotated[str | None, typer.Argument(help=f"As --model: {MODEL}")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=MODEL)] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", "--data", "-d", help=DATASET)] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A built-in recipe or a YAML file; left out: post-training, which needs neither "
            "labels nor training.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/compress"),
    weights: Weights = None,
    key: Key = None,
    pretrained: Pretrained = False,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the recipe's.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override, e.g. stages.prune.density=0.05.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="What the whole run may cost on validation data, a fraction: of accuracy, or of "
            "a loss a part; in place of the recipe's, 0.005 where it names none.",
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            min=64,
            help="What the file may take: the recipe's last stage that sets a price of bits finds "
            "the price whose file comes within 2 % below.",
        ),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an older run away.")] = False,
    trust_recipe_code: Annotated[
        bool,
        typer.Option(
            "--trust-recipe-code",
            help="Run functions that a recipe from outside this folder names as model or dataset.",
        ),
    ] = False,
    task: TaskName = None,
    threads: Threads = None,
) -> None:
    """Compress a network by a recipe: a small file, and a report that proves it.

    Killed, the same command goes on where it was, to the same bytes.

    Exit codes: 0 all well, 1 an error, 3 the file is there but the validation score fell by more
    than max-drop, 4 the file is there but could not be proved, 5 it is larger than max-bytes.
    """
    from gossamer import compression
    from gossamer.compression import recipe as recipes
    from gossamer.compression import threads as choice
    from gossamer.report import promises

    if network is not None and model is not None:
        raise ArgumentError(f"network {network!r} and --model {model!r}: give one of them")
    given = {
        "weights": weights and str(weights),
        "weights_key": key,
        "pretrained": pretrained or None,
        "seed": seed,
        "max_drop": max_drop,
        "max_bytes": max_bytes,
    }
    extra = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    plan = recipes.load(recipe or compression.GENTLE, [*(set_ or []), *extra])
    with console() as show:
        result = compression.run(
            plan,
            model or network,
            dataset,
            out,
            command=shlex.join(["gossamer", *sys.argv[1:]]),
            restart=restart,
            progress=show,
            threads=threads if threads or choice.asked_for() else "auto",
            trust_recipe_code=trust_recipe_code,
            task=task,
            notes=(compression.WHY_GENTLE,) if recipe is None else (),
        )
    kept = sum(layer["kept"] for layer in result.run["layers"] if len(layer["shape"]) > 1)
    total = sum(layer["numel"] for layer in result.run["layers"] if len(layer["shape"]) > 1)
    print(f"file     {result.file}")
    shrunk = smaller(result.dense_bytes, result.bytes)
    print(f"bytes    {result.bytes:,} for {result.dense_bytes:,}: {shrunk}")
    print(f"weights  {kept:,} of {total:,} kept")
    if result.run["coverage"]:
        print(f"network  the recipe {promises.covers(result.run['coverage'])}")
    print(f"before   {scored(result.before, 'test')}")
    back = result.run["bytes"]["reloaded"]
    print(f"after    {scored(result.after, 'test')}")
    if back["not_proved"] is None:
        print(
            f"reload   every bit the same in a fresh process; {result.after.metric.name} measured "
            f"in {back['evaluated_in']}, network built anew from {back['built']}"
        )
    if timing := result.run["latency"]:
        from gossamer.report import words

        took = f"{timing['compressed_ms']:.3f} ms"
        if not timing["same_operations"]:
            took = f"{timing['dense_ms']:.3f} ms before, {took} after"
        print(f"latency  {took} ({timing['engine']}, batch 1, 1 thread). {words.speed(timing)}")
    print(f"report   {result.report}")
    if result.run["floor"]["kept"]:
        kept = promises.keeps(result.run["floor"], result.after.metric)
        print(kept.replace("floor kept:", "floor    kept:"))
    if (asked := result.run["size"]) and asked["kept"]:
        print(f"size     kept: {promises.fits(asked)}")
    for problem in result.problems:
        print(problem, file=sys.stderr)
    if back["not_proved"] is not None:
        raise typer.Exit(_NOT_PROVED)
    if not result.run["floor"]["kept"]:
        raise typer.Exit(_BELOW_FLOOR)
    if asked and not asked["kept"]:
        raise typer.Exit(_TOO_LARGE)


@app.command()
def sensitivity(
    model: Model,
    dataset: Data,
    weights: Weights = None,
    key: Key = None,
    pretrained: Pretrained = False,
    density: Annotated[list[float] | None, typer.Option(help="Densities to try.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Layer patterns.")] = None,
    max_drop: Annotated[float, typer.Option(help="What a layer may cost on its own.")] = 0.005,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG to draw.")] = None,
    task: TaskName = None,
    as_json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Score against density, one layer at a time, on the validation split."""
    from gossamer.prune import sensitivity as sensitivities

    if plot is not None:
        picture(plot)
    network, data, aim = load(model, dataset, weights, pretrained, key, task)
    settle(threads, network, data)
    with console() as show:
        found = sensitivities.scan(
            network,
            data.validation,
            task=aim,
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
    print(f"densities that cost at most {found.metric.show_drop(max_drop)} each:")
    print("\n".join(f"  {name}: {value:g}" for name, value in suggested.items()))


@app.command("evaluate")
def evaluate_(
    model: Model,
    dataset: Data,
    file: Annotated[
        Path | None, typer.Argument(help="A .gsm, .safetensors, .pt or .pth file.")
    ] = None,
    key: Key = None,
    pretrained: Pretrained = False,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    task: TaskName = None,
    as_json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Score of a file's network on a dataset, with its confidence interval."""
    from gossamer.training import evaluate

    if split not in ("train", "validation", "test"):
        raise ArgumentError(f"split {split!r} is not one of train, validation, test")
    network, data, aim = load(model, dataset, file, pretrained, key, task)
    settle(threads, network, data)
    found = evaluate(network, getattr(data, split), task=aim)
    print(json.dumps(found.as_dict()) if as_json else scored(found, split))


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
    except (OSError, ValueError, RecursionError) as e:
        raise ArgumentError(f"{source} holds no run's figures: {e}") from e
    print(report.write(figures, out or source.with_name("report.html"), str(source)))
