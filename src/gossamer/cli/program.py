"""The program, its own options, and how errors are told."""

from __future__ import annotations

import errno
import shlex
import sys
from typing import Annotated

import typer

from gossamer.core.errors import GossamerError
from gossamer.core.files import shown

__all__ = ["app", "main"]

_RESUMABLE = ("train", "compress", "reproduce")  # what keeps its work on disk as it goes

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a trained PyTorch network to a small file and a fast network.",
)


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
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            told = f"the disk is full ({told}); free some space and give the same command again"
        print(f"error: {shown(told, keep=chr(10))}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as e:
        if e.code == 130:  # Ctrl-C, as typer passes it on
            resumes = next(iter(given), "") in _RESUMABLE
            again = f"; it goes on with: {shlex.join(['gossamer', *given])}" if resumes else ""
            print(f"stopped{again}", file=sys.stderr)
        raise
