"""From YAML to a validated recipe; every error names line, key, value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gossamer.compression.recipe.model import Recipe, described, known
from gossamer.compression.recipe.reading import check_value, read, read_file, short
from gossamer.compression.settings import Distill, Training
from gossamer.compression.stage import STAGES, blind, trainings
from gossamer.core.errors import RecipeError
from gossamer.core.tables import near

__all__ = ["builtin", "dump", "load", "parse", "show"]

Path_ = tuple[str | int, ...]
Places = dict[Path_, str]

_MOST_TOLD = 6
MOST_STAGES = 200
"""Of a recipe."""


def builtin() -> dict[str, str]:
    """Name -> description of the recipes that ship with the library."""
    found = {}
    for entry in sorted(files("gossamer").joinpath("recipes").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            found[entry.name[:-5]] = str(yaml.safe_load(entry.read_text())["description"])
    return found


def show(source: str | Path) -> str:
    """The YAML text of a built-in recipe or of a file.

    Raises :class:`RecipeError` for a name or file that does not exist.
    """
    return _text(source)[0]


def _text(source: str | Path) -> tuple[str, str]:
    path = Path(source)
    if "://" in str(source):
        raise RecipeError(
            f"recipe {short(str(source))} is an address, and nothing is downloaded: fetch it, read "
            "it, and give the file"
        )
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return read_file(path), str(source)
    resource = files("gossamer").joinpath("recipes", f"{source}.yaml")
    if "/" in str(source) or not resource.is_file():
        known = list(builtin())
        raise RecipeError(
            f"recipe {str(source)!r} is neither a file nor one of {', '.join(known)}"
            + near(source, known)
        )
    return resource.read_text(), f"recipe {source}"


def load(
    source: str | Path | Mapping[str, Any] | Sequence[Any] | Recipe, overrides: Sequence[str] = ()
) -> Recipe:
    """A recipe by built-in name, as a YAML file, as the mapping that it holds, or as its stages.

    ``overrides``: ``KEY=VALUE`` with dots, such as ``stages.1.density=0.05`` or
    ``stages.prune.density=0.05`` (the first stage of that name); the value is YAML.

    Raises :class:`RecipeError` for a name or file that does not exist, and as :func:`parse` does.
    """
    if isinstance(source, Recipe):
        if not overrides:
            return source
        plan = parse(dump(source), source.name, overrides)
        plan._source = source.source
        return plan
    if isinstance(source, Sequence) and not isinstance(source, str):
        source = {"name": "recipe", "stages": list(source)}
    if isinstance(source, Mapping):
        check_value(source)
        try:
            text = yaml.safe_dump(dict(source), sort_keys=False)
        except yaml.YAMLError as e:
            raise RecipeError(
                f"recipe: holds what YAML does not: {short(e.args[-1])}; give plain numbers, "
                "strings, lists and mappings"
            ) from e
        return parse(text, "recipe", overrides)
    if not isinstance(source, (str, Path)):
        raise RecipeError(
            f"recipe is {type(source).__name__}; give a name, a file, a list of stages, or a "
            "mapping as in YAML"
        )
    text, where = _text(source)
    plan = parse(text, where, overrides)
    # the text of a built-in recipe is told apart by its name, which is no file's
    plan._source = Path(source) if where == str(source) else None
    return plan


def parse(text: str, where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Validate YAML text, which ``where`` names in messages.

    Raises :class:`RecipeError` naming line, key, value and what is allowed.
    """
    tree, data = read(text, where)
    if not isinstance(data, dict) or tree is None:
        raise RecipeError(f"{where}: a recipe is a mapping with name and stages")
    places: Places = {}
    _mark(tree, (), places, where)
    data["stages"] = _stages(data.get("stages"), places, where)
    for override in overrides:
        _override(data, override, places)
        # a key of many dots nests as deep as brackets do
        check_value(data, f"--set {short(override)}")
    known()
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as e:
        raise RecipeError(_explain(e, data, places, where)) from e
    recipe._places, recipe._file = places, where
    _check_order(recipe)
    return recipe


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, without the settings left at their defaults; :func:`parse` reads it."""
    data = recipe.model_dump(mode="json", exclude_defaults=True)
    kinds = [stage.stage for stage in recipe.stages]
    bodies = [dict(stage) for stage in data.pop("stages", [])]
    for body in bodies:
        body.pop("stage", None)
    stages = [{k: body} if body else k for k, body in zip(kinds, bodies, strict=True)]
    return yaml.safe_dump(
        {**data, "stages": stages}, sort_keys=False, width=100, default_flow_style=None
    )


def _mark(node: yaml.Node, path: Path_, places: Places, where: str) -> None:
    """Note the line of every key, as paths through the recipe."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            places[(*path, i)] = f"line {item.start_mark.line + 1}"
            _mark(item, (*path, i), places, where)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line, name = f"line {key.start_mark.line + 1}", str(key.value)
            if name in seen:
                raise RecipeError(f"{where}, {line}: key {name!r} is given twice")
            seen.add(name)
            here = (*path, name)
            if path[:1] == ("stages",) and len(path) == 2 and len(node.value) == 1:
                here = path  # "- prune: {...}": the stage's name is no key of its own
            places[here] = line
            _mark(value, here, places, where)


def _stages(value: Any, places: Places, where: str) -> Any:
    """``- prune: {...}`` and ``- pack`` -> ``{"stage": "prune", ...}``."""
    if not isinstance(value, list):
        what = "missing" if value is None else short(value)
        raise RecipeError(
            f"{described(where, places, ('stages',))}: {what}; give a list such as "
            "[{prune: {density: 0.1}}, pack]"
        )
    if len(value) > MOST_STAGES:
        raise RecipeError(
            f"{described(where, places, ('stages',))}: {len(value):,} stages; a recipe has at most "
            f"{MOST_STAGES}"
        )
    out: list[Any] = []
    for i, stage in enumerate(value):
        if isinstance(stage, str):
            out.append({"stage": stage})
        elif isinstance(stage, dict) and "stage" in stage:
            out.append(stage)
        elif isinstance(stage, dict) and len(stage) == 1:
            ((name, body),) = stage.items()
            if body is not None and not isinstance(body, dict):
                raise RecipeError(
                    f"{described(where, places, ('stages', i))}: the settings of {name!r} are "
                    f"{short(body)}; give a mapping such as {{{name}: {{...}}}}"
                )
            out.append({"stage": name, **(body or {})})
        else:
            raise RecipeError(
                f"{described(where, places, ('stages', i))}: {short(stage)} is no stage; give one "
                f"name with its settings, of {', '.join(known())}"
            )
    return out


def _override(data: dict[str, Any], text: str, places: Places) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {short(text)} must read KEY=VALUE, such as stages.1.density=0.05")
    at: Any = data
    path: list[str | int] = []
    parts = key.split(".")
    told = f"--set {short(text)}"
    # A layer's pattern may hold dots itself: everything below density, bits and the like is one.
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(at, list):
            kinds = [s.get("stage") if isinstance(s, dict) else None for s in at]
            found = [i for i, kind in enumerate(kinds) if kind == part]
            number = part.isdecimal() and len(part) < 6
            index = int(part) if number else (found[0] if found else len(at))
            if path != ["stages"] or index >= len(at) or last or not isinstance(at[index], dict):
                stages = ", ".join(f"{i} {kind}" for i, kind in enumerate(kinds) if kind)
                raise RecipeError(
                    f"{told}: there is no {short('.'.join(parts[: depth + 1]))}; stages are "
                    f"{stages[:400] or 'none'}, and take KEY=VALUE below them; a list is set whole"
                )
            path.append(index)
            at = at[index]
            continue
        path.append(part)
        if last:
            at[part] = read(value, told)[1]
            if path == ["stages"]:
                at[part] = _stages(at[part], places, "--set")
        elif isinstance(at.get(part), (dict, list)):
            at = at[part]
        elif at.get(part) is None:
            at[part] = {}
            at = at[part]
        else:
            raise RecipeError(
                f"{told}: {'.'.join(map(str, path))} is {short(at[part])} and has no keys below"
            )
    places[tuple(path)] = f"--set {text if len(text) <= 200 else text[:197] + '...'}"


def _written(location: Sequence[str | int], data: Any, new_key: bool) -> Path_:
    """The keys a user wrote: without the names that pydantic gives to a union's branches.

    ``new_key``: the last one may be a key that is not there, or not known.
    """
    path: list[str | int] = []
    at = data
    for i, part in enumerate(location):
        if isinstance(at, list) and isinstance(part, int):
            at = at[part] if part < len(at) else None
        elif isinstance(at, dict) and part in at:
            at = at[part]
        elif not (new_key and isinstance(at, dict) and i == len(location) - 1):
            continue
        path.append(part)
    return tuple(path)


def _explain(error: ValidationError, data: Any, places: Places, where: str) -> str:
    lines: list[str] = []
    for problem in error.errors():
        value, message, kind = problem["input"], problem["msg"], problem["type"]
        path = _written(problem["loc"], data, kind in ("missing", "extra_forbidden"))
        context = problem.get("ctx", {})
        got = "" if isinstance(value, (dict, BaseModel)) else f"{short(value)}: "
        if kind == "extra_forbidden":
            allowed = _keys(problem["loc"])
            got, message = "", f"unknown key; allowed: {', '.join(allowed)}"
            message += near(path[-1], allowed)
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            name = value.get("stage") if isinstance(value, dict) else value
            got, message = "", f"stage {short(name)} is not one of {', '.join(STAGES)}"
            message += near(name, STAGES)
        elif kind == "literal_error":
            allowed = [part.strip("' ") for part in str(context["expected"]).split(",")]
            allowed = [w.strip("' ") for part in allowed for w in part.split(" or ")]
            if allowed == ["auto"]:
                message = "is no number in (0, 1], no mapping by layer and not 'auto'"
            else:
                message = f"is not one of {', '.join(allowed)}" + near(value, allowed)
            got = f"{short(value)} "
        elif kind == "missing":
            got, message = "", "missing"
        else:
            message = message.removeprefix("Value error, ").replace("Input should", "should")
        lines.append(f"{described(where, places, path)}: {got}{message}")
    lines = list(dict.fromkeys(lines))
    if len(lines) > _MOST_TOLD:
        lines = [*lines[:_MOST_TOLD], f"and {len(lines) - _MOST_TOLD} more"]
    return "\n".join(lines)


def _keys(location: Sequence[str | int]) -> list[str]:
    """The keys allowed beside the one that the location ends in."""
    model: type[BaseModel] = Recipe
    for part in location[:-1]:
        if model is Recipe and part in STAGES:
            model = STAGES[str(part)]
        elif part in ("retrain", "between", "finetune", "train") and model is not Recipe:
            model = Training
        elif part == "distill":
            model = Distill
    return [name for name in model.model_fields if name != "stage"]


def _check_order(recipe: Recipe) -> None:
    shared = rebuilt = absorbed = None
    for i, stage in enumerate(recipe.stages):
        where, name = recipe.place("stages", i), stage.stage
        allowed = stage.only_before
        later = [s.stage for s in recipe.stages[i + 1 :]]
        wrong = None if allowed is None else next((s for s in later if s not in allowed), None)
        if wrong is not None:
            raise RecipeError(f"{where}: {stage.otherwise.format(wrong)}")
        if absorbed and trainings(stage):
            raise RecipeError(
                f"{where}: {name} after {absorbed} trains, and a batch's own statistics would "
                f"stand for those that {absorbed} has taken out; move it before {absorbed}"
            )
        if shared and stage.resets:
            raise RecipeError(
                f"{where}: {name} after {shared} goes back to the weights that the run began "
                f"with, which undoes {shared}; move it before {shared}"
            )
        if shared and stage.retrains:
            raise RecipeError(
                f"{where}: {name} after {shared} would train the shared values apart; move it "
                f"before {shared}, or use its finetune"
            )
        if rebuilt and stage.from_start:
            raise RecipeError(
                f"{where}: {name} after {rebuilt} looks at the weights that the run began with, "
                f"and the network is another by then; move it before {rebuilt}"
            )
        shared = shared or (name if stage.shares else None)
        absorbed = absorbed or (name if stage.absorbs else None)
        rebuilt = rebuilt or (name if stage.rebuilds else None)
    if recipe.max_bytes is not None and (why := blind(recipe.work)):
        raise RecipeError(f"{recipe.place('max_bytes')}: {recipe.max_bytes:,} bytes: {why}")
