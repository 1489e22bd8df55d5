"""Commands that list and measure: reproduce, recipes, bench."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gossamer.cli.options import AsJson
from gossamer.cli.program import app
from gossamer.compression.progress import console
from gossamer.core.errors import ArgumentError

__all__ = ["bench", "bench_exchange", "recipes_", "reproduce_"]


@app.command("reproduce")
def reproduce_(
    name: Annotated[str | None, typer.Argument(help="An experiment.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the experiments.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results file.")] = Path("results"),
    seeds: Annotated[int | None, typer.Option(min=1, help="How many; its own number.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run: proves the path.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="A Dask scheduler that runs the parts: tcp://HOST:8786.")
    ] = None,
    judge: Annotated[
        bool, typer.Option("--judge", help="Only judge the file's figures again; run nothing.")
    ] = False,
) -> None:
    """Measure a published table again and write results/NAME.json.

    The parts of a --cluster run wherever its workers are; the library must be installed there,
    and the working folder be at the same path if they are to share checkpoints.
    """
    from gossamer import experiments

    if list_ or name is None:
        for experiment, summary in experiments.names():
            print(f"{experiment:28} {summary}")
        return
    if judge:
        print(experiments.judge(name, out=out, quick=quick))
        return
    with _executor(cluster) as executor:
        print(
            experiments.run(
                name, out=out, seeds=seeds, quick=quick, workers=workers, executor=executor
            )
        )


@contextmanager
def _executor(address: str | None) -> Iterator[Executor | None]:
    """The executor of a Dask scheduler; None without an address."""
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as e:
        raise ArgumentError(
            "--cluster needs dask.distributed; pip install 'gossamer[cluster]'"
        ) from e
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as e:
        raise ArgumentError(
            f"--cluster {address!r}: no scheduler answers there ({e}); start one with "
            "`dask scheduler` and give its address, tcp://HOST:8786"
        ) from e
    with client:
        # a part is done for its own sake, never taken from an equal call
        yield client.get_executor(pure=False)


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


class _Networks(TyperGroup):
    """``bench NETWORK...`` is ``bench networks NETWORK...``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command in where none is named."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["networks", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(
    cls=_Networks,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure here: bench NETWORK... [OPTIONS], or one of the commands.",
)
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
