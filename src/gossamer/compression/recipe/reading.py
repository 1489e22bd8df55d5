"""YAML of a recipe, read within bounds: what it costs is known before anything is built of it.

Somebody else's recipe is a file from outside. A page of it can name billions of values by aliases,
go on for ever by an alias within its own anchor, or nest deeper than Python recurses; all of that
is counted on the stream of events, in which an alias is still one event.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gossamer.core.errors import RecipeError

__all__ = ["MOST_BYTES", "MOST_DEPTH", "MOST_NODES", "check_value", "read", "read_file", "short"]

MOST_BYTES = 1 << 18
"""Of a recipe's text; the recipes of the library have about two thousand."""
MOST_NODES = 10_000
"""Keys, values and list entries, those that aliases repeat among them."""
MOST_DEPTH = 32
_MOST_DIGITS = 40


class _Loader(yaml.SafeLoader):
    """Plain values only, and no number with more digits than any setting has."""


def _number(loader: _Loader, node: yaml.ScalarNode) -> Any:
    if len(node.value) > _MOST_DIGITS:
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(node.value):,} characters", node.start_mark
        )
    integer = node.tag == "tag:yaml.org,2002:int"
    make = loader.construct_yaml_int if integer else loader.construct_yaml_float
    return make(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def short(value: object) -> str:
    """A value as a message shows it."""
    try:
        told = repr(value)
    except (ValueError, RecursionError):  # an integer beyond what Python prints; a deep value
        return f"a {type(value).__name__}"
    return told if len(told) <= 80 else told[:77] + "..."


def read_file(path: Path) -> str:
    """The text of a recipe's file.

    Raises :class:`RecipeError` for a file that cannot be read, is no UTF-8, or is too long.
    """
    try:
        with open(path, "rb") as f:
            data = f.read(MOST_BYTES + 1)
        text = data.decode()
    except (OSError, ValueError) as e:
        raise RecipeError(f"recipe {path} cannot be read: {e}") from e
    if len(data) > MOST_BYTES:
        raise RecipeError(_long(str(path)))
    return text


def _long(where: str) -> str:
    return f"{where}: longer than {MOST_BYTES:,} bytes; no recipe is"


def read(text: str, where: str) -> tuple[yaml.Node | None, Any]:
    """The tree of nodes, with their lines, and the value of YAML text.

    Raises :class:`RecipeError` for text that is no YAML, too long, too deep, or whose aliases
    repeat too much or contain themselves; ``where`` names it.
    """
    if len(text) > MOST_BYTES or len(text.encode(errors="replace")) > MOST_BYTES:
        raise RecipeError(_long(where))
    try:
        _count(text, where)
        return yaml.compose(text, Loader=_Loader), yaml.load(text, Loader=_Loader)
    except RecipeError:
        raise
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        told = getattr(e, "problem", None) or str(e).splitlines()[0]
        raise RecipeError(f"{where}{line}: no YAML: {told}") from e
    except (ValueError, OverflowError, RecursionError, AttributeError, TypeError, LookupError) as e:
        # what PyYAML's own conversions raise: a thirteenth month, a bad escape
        said = str(e).splitlines() or [type(e).__name__]
        raise RecipeError(f"{where}: a value cannot be read as YAML: {said[0][:160]}") from e


def _count(text: str, where: str) -> None:
    """Count depth and nodes, as if every alias were written out."""
    whole = [0]  # nodes of each open collection, the document's first
    names: list[str | None] = []  # their anchors
    sizes: dict[str, int] = {}
    for event in yaml.parse(text, Loader=_Loader):
        line = f"{where}, line {event.start_mark.line + 1 if event.start_mark else 1}"
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor in names:
                raise RecipeError(f"{line}: alias *{anchor} lies within &{anchor}, without an end")
            whole[-1] += sizes.get(str(anchor), 1)  # an unknown one is told when it is composed
        elif isinstance(event, yaml.ScalarEvent):
            whole[-1] += 1
            if anchor is not None:
                sizes[anchor] = 1
        elif isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            whole.append(1)
            names.append(anchor)
            if len(names) > MOST_DEPTH:
                raise RecipeError(f"{line}: nested deeper than {MOST_DEPTH} levels; no recipe is")
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            size, name = whole.pop(), names.pop()
            whole[-1] += size
            if name is not None:
                sizes[name] = size
        if whole[-1] > MOST_NODES:
            raise RecipeError(
                f"{line}: more than {MOST_NODES:,} values, those that aliases repeat counted; no "
                "recipe has so many"
            )


def check_value(value: Any, where: str = "recipe") -> None:
    """Raise :class:`RecipeError` for a mapping that would make too large a recipe, or endless."""
    nodes = 0
    waiting = [(value, 0)]
    while waiting:
        at, depth = waiting.pop()
        nodes += 1
        if nodes > MOST_NODES or depth > MOST_DEPTH:
            raise RecipeError(
                f"{where}: more than {MOST_NODES:,} values, or nested deeper than {MOST_DEPTH} "
                "levels; no recipe is so large"
            )
        if isinstance(at, Mapping):
            waiting += [(one, depth + 1) for pair in at.items() for one in pair]
        elif isinstance(at, (list, tuple, set, frozenset)):
            waiting += [(one, depth + 1) for one in at]
