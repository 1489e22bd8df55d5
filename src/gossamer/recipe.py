"""Recipes: YAML validated into stages, the same from Python.

A recipe is a list of stages, each a mapping of one stage name to its settings::

    name: my-recipe
    seed: 0
    stages:
      - train: {epochs: 10, lr: 0.05}
      - prune: {density: {"*": 0.1, conv1: 0.6}, rounds: 3, retrain: {epochs: 5, lr: 0.01}}
      - share: {bits: 5, finetune: {epochs: 2, lr: 0.0001}}
      - pack: {profile: smallest}

Errors name the line, the key, the value and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gossamer.errors import RecipeError
from gossamer.training import TrainConfig

__all__ = [
    "AbsorbBatchnorm",
    "Pack",
    "Prune",
    "QuantizeBiases",
    "RateAwareStage",
    "Recipe",
    "Sensitivity",
    "Share",
    "Stage",
    "Train",
    "Training",
    "builtin",
    "dump",
    "load",
    "parse",
]

Density = Annotated[float, Field(ge=0, le=1)]
Bits = Annotated[int, Field(ge=1, le=16)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Training(_Strict):
    """How to train; the fields of :class:`gossamer.training.TrainConfig` without the seed.

    ``distill``: weight of a distillation loss against the network as it was before the first
    stage that changed it, 0 for none.
    """

    epochs: Annotated[int, Field(ge=0)]
    batch_size: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0)] = 0.01
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    l1: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine", "cubic", "step"] = "cosine"
    lr_end: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[int, Field(ge=0)] = 0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    distill: Annotated[float, Field(ge=0, le=1)] = 0.0

    def config(self, seed: int) -> TrainConfig:
        """The training loop's configuration."""
        return TrainConfig(seed=seed, **self.model_dump(exclude={"distill", "stage"}))


class Train(Training):
    """Train the network; with ``epochs: 0`` it is taken as it is."""

    stage: Literal["train"] = "train"


class Sensitivity(_Strict):
    """Scan accuracy against density, one layer at a time, for the report."""

    stage: Literal["sensitivity"] = "sensitivity"
    densities: tuple[Density, ...] = (1.0, 0.7, 0.5, 0.35, 0.25, 0.17, 0.12, 0.08, 0.05, 0.03)
    include: list[str] | None = None
    exclude: list[str] | None = None


class Prune(_Strict):
    """Remove weights, in ``rounds``, and retrain after each."""

    stage: Literal["prune"] = "prune"
    method: Literal["magnitude", "obd", "random"] = "magnitude"
    density: Density | dict[str, Density] | Literal["auto"] | None = None
    quality: float | dict[str, float] | None = None
    max_drop: Annotated[float, Field(gt=0, lt=1)] = 0.005
    scope: Literal["layer", "global"] = "layer"
    rounds: Annotated[int, Field(ge=1)] = 1
    retrain: Training | None = None
    between: Training | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    floor: Annotated[int, Field(ge=0)] = 1
    include: list[str] | None = None
    exclude: list[str] | None = None

    @model_validator(mode="after")
    def _one_budget(self) -> Prune:
        if (self.density is None) == (self.quality is None):
            raise ValueError("give exactly one of density (fraction kept) and quality")
        if self.quality is not None and self.rounds > 1:
            raise ValueError("quality is one-shot; give density for more than one round")
        if self.scope == "global" and not isinstance(self.density, float):
            raise ValueError("scope: global takes one density, a number")
        if self.quality is not None and self.method != "magnitude":
            raise ValueError("quality is a threshold on magnitudes; use method: magnitude")
        return self


class Share(_Strict):
    """Share values within each layer by k-means, and fine-tune the shared values.

    ``bits`` counts the reserved zero; a mapping gives bits by layer pattern, a later pattern wins.
    """

    stage: Literal["share"] = "share"
    bits: Bits | dict[str, Bits]
    init: Literal["linear", "density", "forgy", "optimal", "uniform"] = "linear"
    finetune: Training | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None


class RateAwareStage(_Strict):
    """Retrain on a uniform grid while the entropy of the codes is part of what is minimised.

    ``step`` is relative to each tensor's standard deviation; ``lam`` is the price of a bit.
    """

    stage: Literal["rate_aware"] = "rate_aware"
    step: Annotated[float, Field(gt=0)] | dict[str, Annotated[float, Field(gt=0)]] = 0.5
    lam: Annotated[float, Field(ge=0)] = 0.01
    train: Training
    include: list[str] | None = None
    exclude: list[str] | None = None


class QuantizeBiases(_Strict):
    """Put what is not a weight (biases, batch-norm scales and shifts) on a uniform grid."""

    stage: Literal["quantize_biases"] = "quantize_biases"
    bits: Annotated[int, Field(ge=2, le=16)] = 8


class AbsorbBatchnorm(_Strict):
    """Absorb batch-norm statistics into scale and shift; the last stage before pack."""

    stage: Literal["absorb_batchnorm"] = "absorb_batchnorm"


class Pack(_Strict):
    """Write the file."""

    stage: Literal["pack"] = "pack"
    profile: Literal["smallest", "fast", "huffman"] = "smallest"


Stage = Annotated[
    Train | Sensitivity | Prune | Share | RateAwareStage | QuantizeBiases | AbsorbBatchnorm | Pack,
    Field(discriminator="stage"),
]
_STAGES = (
    "train",
    "sensitivity",
    "prune",
    "share",
    "rate_aware",
    "quantize_biases",
    "absorb_batchnorm",
    "pack",
)


class Recipe(_Strict):
    """A validated recipe; ``model``, ``dataset`` and their options may be given at the run."""

    name: str
    description: str = ""
    model: str | None = None
    pretrained: bool = False
    dataset: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _named_stages(cls, data: Any) -> Any:
        """``- prune: {...}`` -> ``{"stage": "prune", ...}``."""
        if not isinstance(data, Mapping) or not isinstance(data.get("stages"), Sequence):
            return data
        stages: list[Any] = []
        for stage in data["stages"]:
            if isinstance(stage, str):
                stages.append({"stage": stage})
            elif isinstance(stage, Mapping) and len(stage) == 1 and "stage" not in stage:
                ((name, body),) = stage.items()
                known = body is None or isinstance(body, Mapping)
                stages.append({"stage": name, **(body or {})} if known else stage)
            else:
                stages.append(stage)
        return {**data, "stages": stages}

    @model_validator(mode="after")
    def _pack_last(self) -> Recipe:
        kinds = [s.stage for s in self.stages]
        if kinds.count("pack") != 1 or kinds[-1] != "pack":
            raise ValueError("the last stage must be pack, and the only one of its kind")
        return self


def builtin() -> dict[str, str]:
    """Name -> description of the recipes that ship with the library."""
    found = {}
    for entry in sorted(files("gossamer").joinpath("recipes").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            found[entry.name[:-5]] = yaml.safe_load(entry.read_text())["description"]
    return found


def load(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by built-in name or path of a YAML file.

    ``overrides``: ``KEY=VALUE`` with dots, such as ``stages.1.density=0.05`` (values are YAML).

    Raises :class:`RecipeError` for a name or file that does not exist, and as :func:`parse` does.
    """
    resource = files("gossamer").joinpath("recipes", f"{source}.yaml")
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            text = path.read_text()
        except OSError as e:
            raise RecipeError(f"recipe {source}: {e.strerror or e}") from e
    elif resource.is_file():
        text = resource.read_text()
    else:
        raise RecipeError(
            f"recipe {str(source)!r} is neither a file nor one of: {', '.join(builtin())}"
            + _near(str(source), list(builtin()))
        )
    return parse(text, str(source), overrides)


def parse(text: str, where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Validate YAML text.

    Raises :class:`RecipeError` naming line, key, value and what is allowed.
    """
    try:
        data = yaml.safe_load(text)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as e:
        raise RecipeError(f"{where} is no YAML: {e}") from e
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a recipe is a mapping with name and stages")
    for override in overrides:
        _override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        raise RecipeError(_explain(e, tree, where)) from e


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, with every default written out; :func:`parse` reads it back."""
    data = recipe.model_dump(mode="json", exclude_none=True)
    data["stages"] = [
        {stage.pop("stage"): stage} if len(stage) > 1 else stage["stage"]
        for stage in data["stages"]
    ]
    return yaml.safe_dump(data, sort_keys=False, width=100)


def _override(data: Any, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"override {text!r} must read KEY=VALUE, e.g. stages.1.density=0.05")
    *path, last = key.split(".")
    at = data
    try:
        for part in path:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
            # "- prune: {...}": the stage's own name need not be repeated
            if isinstance(at, dict) and len(at) == 1 and next(iter(at)) in _STAGES:
                (at,) = at.values()
        at[int(last) if isinstance(at, list) else last] = yaml.safe_load(value)
    except (LookupError, ValueError, TypeError, AttributeError) as e:
        raise RecipeError(f"override {text!r}: there is no {key!r} in this recipe") from e


def _near(word: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(word, allowed, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _line(tree: yaml.Node | None, path: Sequence[str | int]) -> int | None:
    """The line of the deepest node on the path that exists."""
    node, line = tree, None
    for part in path:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            if part >= len(node.value):
                break
            node = node.value[part]
            line = node.start_mark.line + 1
            if isinstance(node, yaml.MappingNode) and len(node.value) == 1:
                key, value = node.value[0]
                if key.value in _STAGES:
                    node = value
        elif isinstance(node, yaml.MappingNode):
            pairs = {k.value: (k, v) for k, v in node.value}
            if part not in pairs:
                continue  # pydantic names the union's branch in the path
            line = pairs[part][0].start_mark.line + 1
            node = pairs[part][1]
    return line


def _path(location: Sequence[str | int]) -> list[str]:
    """The keys a user wrote, without the names pydantic gives to a union's branches."""
    return [
        str(part)
        for part in location
        if not (isinstance(part, str) and (part in _STAGES or "[" in part or "-" in part))
    ]


def _explain(error: ValidationError, tree: yaml.Node | None, where: str) -> str:
    lines: list[str] = []
    told: list[str] = []
    # deepest first: of a union's branches, the one that fits best fails deepest
    for problem in sorted(error.errors(), key=lambda p: -len(_path(p["loc"]))):
        line = _line(tree, problem["loc"])
        key = ".".join(_path(problem["loc"])) or "recipe"
        if any(t.startswith(f"{key}.") for t in told) and _line(tree, problem["loc"][:3]):
            continue
        told.append(key)
        value, message = problem["input"], problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            allowed = _fields(problem["loc"])
            message = f"unknown key; allowed: {', '.join(allowed)}" + _near(
                str(problem["loc"][-1]), allowed
            )
        elif problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
            tag = value.get("stage") if isinstance(value, Mapping) else value
            message = f"stage {tag!r} is not one of {', '.join(_STAGES)}" + _near(
                str(tag), list(_STAGES)
            )
            value = None
        shown = "" if isinstance(value, Mapping) or value is None else f" (got {value!r})"
        lines.append(f"{where}{f', line {line}' if line else ''}: {key}: {message}{shown}")
    return "\n".join(dict.fromkeys(lines))


def _fields(path: Sequence[str | int]) -> list[str]:
    """The keys allowed beside the one that the path ends in."""
    model: type[BaseModel] = Recipe
    kinds: dict[str, type[BaseModel]] = {
        str(m.model_fields["stage"].default): m
        for m in (
            Train,
            Sensitivity,
            Prune,
            Share,
            RateAwareStage,
            QuantizeBiases,
            AbsorbBatchnorm,
            Pack,
        )
    }
    for part in path[:-1]:
        if isinstance(part, str) and part in kinds and model is Recipe:
            model = kinds[part]
        elif part in ("retrain", "between", "finetune", "train"):
            model = Training
    return [name for name in model.model_fields if name != "stage"]
