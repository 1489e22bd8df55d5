"""Commands that list and measure: reproduce, recipes, bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli.options import AsJson
from gossamer.cli.program import app
from gossamer.compression.progress import console

__all__ = ["bench", "bench_exchange", "recipes_", "reproduce_"]


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
    from gossamer import experiments

    if list_ or name is None:
        for experiment, summary in experiments.names():
            print(f"{experiment:28} {summary}")
        return
    print(experiments.run(name, out=out, seeds=seeds, quick=quick, workers=workers))


@app.command("recipes")
def recipes_(
    name: Annotated[str | None, typer.Argument(help="A recipe to show.")] = None,
) -> None:
    """List the built-in recipes, or show one."""
    from gossamer.compression import recipe as recipes

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
