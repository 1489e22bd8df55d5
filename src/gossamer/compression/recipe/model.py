"""A recipe: what is run on what, as a validated object."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, PrivateAttr, field_validator
from pydantic_core import CoreSchema, core_schema

from gossamer.compression.settings import OneOf, Strict
from gossamer.compression.stage import STAGES, Stage
from gossamer.compression.stages.evaluate import Evaluate
from gossamer.compression.stages.pack import Pack
from gossamer.training.tasks import TASKS

__all__ = ["MOST_SEED", "Recipe", "described", "known"]


class _OfTable:
    """A stage of the table, told by its name."""

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        kinds = {name: handler.generate_schema(kind) for name, kind in STAGES.items()}
        return core_schema.tagged_union_schema(kinds, discriminator="stage")


MOST_SEED = 10**14
"""A stage's own seed is 10,000 times the recipe's and a little, and torch takes 63 bits."""


class Recipe(Strict):
    """A validated recipe.

    Attributes:
        model: a network's name or ``module:function``; may be given at the run instead.
        weights: file with the network's trained tensors.
        weights_key: where in a checkpoint they are, such as ``ema`` or ``state.model``; needed
            only where there are several.
        pretrained: the network's published weights.
        dataset, subset: its name, and how many training examples to use.
        seed: of initial weights, data order and everything random.
        task: what the network is for (:data:`gossamer.training.tasks.TASKS`); left out: the
            dataset's own, else by its targets.
        max_drop: what the whole run may cost on the validation split, below the network before
            the first stage that compresses: a difference of fractions (accuracy, agreement,
            cosine), or of a loss a part of its value; 1 allows anything. Rounds of pruning that
            end below go back to the last that kept it.
        max_bytes: what the file may take. The last stage that sets a price of bits finds the
            price whose file comes within 2 % below; left out: the recipe's own prices stand.
        stages: in order; ``pack`` and ``evaluate`` are added where they are missing.
    """

    name: Annotated[str, Field(max_length=200)]
    description: str = ""
    model: str | None = None
    weights: str | None = None
    weights_key: str | None = None
    pretrained: bool = False
    dataset: str | None = None
    subset: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0
    task: Annotated[str, OneOf(TASKS)] | None = None
    max_drop: Annotated[float, Field(ge=0, le=1)] = 0.005
    max_bytes: Annotated[int, Field(ge=64)] | None = None
    stages: tuple[Annotated[Stage, _OfTable()], ...] = ()

    @field_validator("name")
    @classmethod
    def _printable(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("holds control characters; give a name that a terminal can show")
        return value

    # path -> where it was written ("line 7", "--set ..."); the file's name
    _places: dict[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)
    _file: str = PrivateAttr(default="recipe")
    _source: Path | None = PrivateAttr(default=None)

    @property
    def source(self) -> Path | None:
        """The file that the recipe was read from; None for one of the library's, or a mapping."""
        return self._source

    def overridden(self, key: str) -> bool:
        """Whether ``--set`` gave a key at the top of the recipe."""
        return self._places.get((key,), "").startswith("--set ")

    def place(self, *path: str | int) -> str:
        """How a message calls a key: file, line and dotted path."""
        return described(self._file, self._places, path)

    @property
    def work(self) -> tuple[Stage, ...]:
        """The stages before ``pack``."""
        return tuple(s for s in self.stages if not isinstance(s, (Pack, Evaluate)))

    @property
    def pack(self) -> Pack:
        """How the file is written."""
        return next((s for s in self.stages if isinstance(s, Pack)), Pack())

    @property
    def evaluate(self) -> Evaluate:
        """What is measured of it."""
        return next((s for s in self.stages if isinstance(s, Evaluate)), Evaluate())


def described(
    file: str, places: Mapping[tuple[str | int, ...], str], path: tuple[str | int, ...]
) -> str:
    """File, line of the deepest known key on the path, and the path."""
    key = ".".join(map(str, path))
    for end in range(len(path), 0, -1):
        if path[:end] in places:
            return f"{file}, {places[path[:end]]}: {key}"
    return f"{file}: {key}" if key else file


_known = len(STAGES)


def known() -> list[str]:
    """The names of all stages; those registered since the last look may stand in a recipe now."""
    global _known
    if len(STAGES) != _known:
        Recipe.model_rebuild(force=True)
        _known = len(STAGES)
    return list(STAGES)
