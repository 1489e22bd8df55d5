"""The documentation's pages that follow from the tree: method cards and the library's reference.

A hook of mkdocs (``mkdocs.yml``). A card in ``docs/methods`` stands in the navigation by its
title; a module of a folder of :data:`FOLDERS` stands on its folder's page of the reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    "core", "prune", "quantize", "structure", "training", "analysis", "runtime",
    "runtime/kernels", "runtime/plan", "distribute/codecs", "pack/coders", "compression/stages",
)  # fmt: skip


def cards() -> list[str]:
    """The method cards, by title."""
    found = (ROOT / "docs" / "methods").glob("*.md")
    return [f"methods/{c.name}" for c in sorted(found, key=lambda c: c.read_text().split("\n")[0])]


def reference() -> dict[str, str]:
    """Page -> its text: the folder's modules that say in ``__all__`` what they have."""
    pages = {}
    for folder in FOLDERS:
        dotted = f"gossamer.{folder.replace('/', '.')}"
        inside = sorted((ROOT / "src" / "gossamer" / folder).glob("[!_]*.py"))
        found = [f"::: {dotted}.{p.stem}" for p in inside if "\n__all__ = [" in p.read_text()]
        pages[f"reference/{folder.replace('/', '-')}.md"] = "\n".join([f"# {dotted}", "", *found])
    return pages


def on_config(config: MkDocsConfig) -> None:
    """Fill in what the navigation leaves empty."""
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = cards()
        if "Reference" in entry:
            entry["Reference"] = [*entry["Reference"], *reference()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the reference's pages."""
    from mkdocs.structure.files import File

    for page, text in reference().items():
        files.append(File.generated(config, page, content=text))
