"""How the reference reads docstrings: an extension of griffe (``mkdocs.yml``).

In the source, parameters that share a sentence share its line, examples are doctests, and names
have the roles of Sphinx. Griffe knows one parameter a line; Markdown takes a doctest for quotes
and its lists for links.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ENTRY = re.compile(r"    (\*{0,2}\w+(?:, \*{0,2}\w+)+):(?: |$)")
_ROLE = re.compile(r":(?:class|func|mod|meth|data|attr|exc):`~?[\w.]*?(\w+)(?:\s+<[^`]+>)?`")
_SECTIONS = ("Args:", "Attributes:")


class Docstrings(Extension):
    """Rewrites each docstring before it is read."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute, once it is made."""
        if obj.docstring:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """The docstring with a parameter a line, fenced examples and names without roles."""
    lines = _ROLE.sub(r"`\1`", text).split("\n")
    return "\n".join(_examples(_entries(lines)))


def _entries(lines: list[str]) -> list[str]:
    """Each of the parameters that share an entry has it for itself."""
    out: list[str] = []
    inside, at = False, 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line and line[0] != " ":
            inside = line in _SECTIONS
        shared = _ENTRY.match(line) if inside else None
        if shared is None:
            out.append(line)
            continue
        more = [line[shared.end() :]]
        while at < len(lines) and lines[at].startswith("     "):
            more.append(lines[at])
            at += 1
        for name in shared[1].split(", "):
            out += [f"    {name}: {more[0]}".rstrip(), *more[1:]]
    return out


def _examples(lines: list[str]) -> list[str]:
    """Doctests between fences."""
    out: list[str] = []
    indent: str | None = None
    for line in [*lines, ""]:
        text = line.lstrip()
        if indent is None and text.startswith(">>> "):
            indent = line[: len(line) - len(text)]
            out.append(f"{indent}```pycon")
        elif indent is not None and not text:
            out.append(f"{indent}```")
            indent = None
        out.append(line)
    return out[:-1]
