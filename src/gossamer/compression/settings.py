"""What the stages of a recipe share: value types, layer selection, training settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    Tag,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from gossamer.training import TrainConfig

__all__ = [
    "Alpha",
    "Bits",
    "ByLayer",
    "Density",
    "Distill",
    "Fraction",
    "LayerDensity",
    "NotNegative",
    "OneOf",
    "Positive",
    "Price",
    "Quality",
    "Rate",
    "Strength",
    "Strict",
    "Training",
    "Width",
]


_T = TypeVar("_T")


def _kind(value: Any) -> str:
    # Which branch of "a number, or one for each layer" was meant: one error, not one a branch.
    return "by layer" if isinstance(value, (Mapping, BaseModel)) else "number"


def _kind_or_word(value: Any) -> str:
    return "word" if isinstance(value, str) and value[:1].isalpha() else _kind(value)


_TRUTH = "true and false (yes, no, on, off) mean nothing here"


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(_TRUTH)
    return value


Fraction = Annotated[float, Field(gt=0, le=1), BeforeValidator(_no_truth)]
_Bits = Annotated[int, Field(ge=1, le=16), BeforeValidator(_no_truth)]
Width = Annotated[int, Field(ge=2, le=16)]
Rate = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Density = Annotated[
    Annotated[Literal["auto"], Tag("word")]
    | Annotated[Fraction, Tag("number")]
    | Annotated[dict[str, Fraction], Tag("by layer")],
    Discriminator(_kind_or_word),
]
ByLayer = Annotated[
    Annotated[_T, Tag("number")] | Annotated[dict[str, _T], Tag("by layer")],
    Discriminator(_kind),
]
Alpha = Annotated[
    Annotated[Literal["lloyd", "half-gaussian", "learned"], Tag("word")]
    | Annotated[Positive, Tag("number")],
    Discriminator(_kind_or_word),
]
Price = Annotated[
    Annotated[Literal["auto"], Tag("word")]
    | Annotated[Positive, Tag("number")]
    | Annotated[dict[str, Positive], Tag("by layer")],
    Discriminator(_kind_or_word),
]
LayerDensity = ByLayer[Fraction]
Quality = ByLayer[NotNegative]
Bits = ByLayer[_Bits]
Strength = ByLayer[Positive]


class OneOf:
    """A name of a table, as the annotation of a ``str``."""

    def __init__(self, table: Iterable[str]) -> None:
        self.table = table

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(str))

    def _checked(self, value: str) -> str:
        names = list(self.table)
        if value not in names:
            raise PydanticCustomError(
                "literal_error", "Input should be {expected}", {"expected": ", ".join(names)}
            )
        return value


class Strict(BaseModel):
    """Refuses keys it does not know, and changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, data: Any) -> Any:
        # YAML reads yes, no, on and off as truth, which pydantic takes for 1 and 0.
        for name, value in data.items() if isinstance(data, Mapping) else ():
            field = cls.model_fields.get(str(name))
            if field is None or not isinstance(value, bool):
                continue
            if bool not in (field.annotation, *get_args(field.annotation)):
                raise ValueError(f"{name}: {_TRUTH}")
        return data


class Distill(Strict):
    """A distillation loss beside the cross-entropy.

    See :func:`gossamer.training.distill.soft_targets`.

    Attributes:
        weight: of the teacher's part of the loss, 0 for none.
        temperature: of both softmaxes.
        teacher: the network ``before`` the first stage that compresses, as it was at the
            ``start`` of the stage, a file with weights of the same network, or the name of one
            that has pretrained weights, such as ``resnet-56``.
    """

    weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    temperature: Positive = 4.0
    teacher: str = "before"


class Training(Strict):
    """How to train inside a stage; the fields of :class:`gossamer.training.TrainConfig`.

    ``distill``: a distillation loss, or only its weight. The seed is the recipe's.
    """

    epochs: Annotated[int, Field(ge=0, le=1_000_000)]
    batch_size: Annotated[int, Field(ge=1)] = 64
    lr: Positive = 0.01
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    l1: NotNegative = 0.0
    schedule: Literal["constant", "linear", "cosine", "cubic", "step"] = "cosine"
    lr_end: NotNegative = 0.0
    lr_steps: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.5, 0.75)
    lr_factor: Positive = 0.1
    warmup: Annotated[int, Field(ge=0)] = 0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    grad_clip: Positive | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    distill: Annotated[
        Annotated[Annotated[float, Field(ge=0, le=1)], Tag("number")]
        | Annotated[Distill, Tag("by layer")],
        Discriminator(_kind),
    ] = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        self.config(0)
        return self

    @property
    def teaching(self) -> Distill:
        """The distillation, of weight 0 where there is none."""
        given = self.distill
        return given if isinstance(given, Distill) else Distill(weight=given)

    def config(self, seed: int) -> TrainConfig:
        """The training loop's configuration."""
        return TrainConfig(seed=seed, **self.model_dump(exclude={"distill", "stage"}))
