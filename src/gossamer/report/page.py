"""The page: run.json in, one self-contained HTML file out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from gossamer.core.files import write_text
from gossamer.report import words
from gossamer.report.figures import checked
from gossamer.report.sections import SECTIONS

__all__ = ["render", "write"]

Run = Mapping[str, Any]


def _breakable(name: object) -> Markup:
    """A name that may be wrapped after its dots, and within if it is very long."""
    pieces = re.findall(r"[^._/\-]{1,20}[._/\-]*|[._/\-]{1,20}", str(name))
    return Markup("<wbr>").join(pieces)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("gossamer.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("report.html.j2")


def render(run: Run, where: str = "run") -> str:
    """The page of a run as HTML text; absent sections are left out.

    Raises :class:`ArgumentError` when ``run``, which ``where`` names, lacks what every run has, or
    holds what no run does: a file that is damaged.
    """
    run = checked(run, where)
    about = {key: run.get(key) for key in ("name", "created", "model", "dataset")}
    return _template().render(
        title=f"{run['model']} on {run['dataset']}: {words.size(run['bytes']['file'])}",
        headline=words.headline(run),
        verdict=words.verdict(run),
        run=about,
        **{name: make(run) for name, make in SECTIONS.items()},
    )


def write(run: Run, path: str | Path, where: str = "run") -> Path:
    """Write the page of a run, atomically: one file that needs no network.

    Raises :class:`ArgumentError` as :func:`render` does.
    """
    path = Path(path)
    write_text(path, render(run, where))
    return path
