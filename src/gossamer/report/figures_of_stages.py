"""What run.json may hold of a recipe's stages: each field's kind, and what it must fit."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    model_validator,
)

__all__ = [
    "Count", "Coverage", "Factor", "Flag", "Fraction", "Integer", "Maybe", "Number", "Part", "Size",
    "Stage", "Text",
]  # fmt: skip


def _plain(value: str) -> str:
    value.encode()  # half a surrogate pair cannot be written; a ValueError, which pydantic tells
    return value


Text = Annotated[str, Strict(), AfterValidator(_plain)]
Flag = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Field(ge=0, le=1 << 62)]
Whole = Annotated[int, Strict(), Field(ge=-(1 << 31), le=1 << 31)]
Number = Annotated[float, Strict(), AllowInfNan(False), Field(ge=-1e300, le=1e300)]
Maybe = Annotated[float, Strict(), AllowInfNan(True)] | None
"""A training that went astray leaves NaN; the page shows a dash."""
Fraction = Annotated[float, Strict(), AllowInfNan(False), Field(ge=0, le=1)]
Size = Annotated[float, Strict(), AllowInfNan(False), Field(ge=0, le=1e300)]
Factor = Annotated[float, Strict(), AllowInfNan(False), Field(gt=1e-300, le=1e300)]


class Part(BaseModel):
    """More keys than these are left alone."""

    model_config = ConfigDict(extra="allow")


class Coverage(Part):
    """What a recipe or stage works on."""

    parameters: Count
    covered: Count
    outside: dict[Text, Annotated[list[Count], Field(min_length=1)]]


class _Rolled(Part):
    round: Count
    rounds: Count
    density: Fraction
    asked: Fraction


class _End(Part):
    """Where a training ended, or stood best."""

    score: Maybe
    epoch: Count


class _Trained(Part):
    final: _End | None = None
    best: _End | None = None

    @model_validator(mode="after")
    def _there_or_not(self) -> _Trained:
        for key in ("final", "best"):
            if key in self.model_fields_set and getattr(self, key) is None:
                raise ValueError(f"{key} is null; leave it out, or give epoch and score")
        return self


class _FewBits(Part):
    name: Text
    weights: Count
    values: Count
    bits: Size
    density: Fraction
    low: Number
    high: Number


class _Step(Part):
    step: Count
    high: dict[Text, Number]
    low: dict[Text, Number]
    density: dict[Text, Fraction]


class _Quantize(_Trained):
    method: Text
    layers: list[_FewBits]
    warnings: list[Text] | None = None
    trajectory: list[_Step] | None = None

    @model_validator(mode="after")
    def _same_layers(self) -> _Quantize:
        steps = self.trajectory or []
        for row in steps:
            if not set(row.high) == set(row.low) == set(row.density) == set(steps[0].high):
                raise ValueError(f"trajectory: step {row.step} is of other layers than the first")
        if len(steps) > 1 and steps[-1].step == 0:
            raise ValueError("trajectory: the last step is 0")
        return self


class _Level(Part):
    name: Text
    start: Number
    alpha: Number


class _Activations(_Trained):
    bits: Annotated[int, Strict(), Field(ge=1, le=64)]
    estimator: Text
    layers: list[_Level]


class Integer(Part):
    """Integer arithmetic beside what it emulates."""

    identical: Flag
    correct: Count | None = None
    total: Count


class _Lengths(Part):
    name: Text
    bits: Whole | None
    weight: Whole | None
    bias: Whole | None
    output: Whole | None


class _Modes(Part):
    bits: Count
    dynamic: Number
    static: Number


class _FixedPoint(Part):
    mode: Text
    activation_bits: Whole | None
    input_length: Whole | None
    integer: Integer
    float_score: Number
    layers: list[_Lengths]
    compare: list[_Modes] | None = None

    @model_validator(mode="after")
    def _a_curve(self) -> _FixedPoint:
        if self.compare is not None and len(self.compare) == 1:
            raise ValueError("compare holds one row; a curve needs two")
        return self


class _Factors(Part):
    name: Text
    rank: Count
    before: Count
    after: Annotated[int, Strict(), Field(ge=1, le=1 << 62)]


class _Svd(_Trained):
    layers: list[_Factors]


class _Treated(Part):
    name: Text
    density: Fraction
    error: Maybe = None
    bias: Flag = False
    note: Text = ""


class _Outside(Part):
    name: Text
    kind: Text
    parameters: Count
    note: Text = ""


class _Obs(Part):
    layers: list[_Treated]
    outside: list[_Outside] = []
    examples: Count
    batch_norm: Flag | None = None
    rate: Size | None = None


_BeforeAfter = Annotated[list[Count], Field(min_length=2, max_length=2)]


class _Approximated(Part):
    name: Text
    form: Text
    ranks: list[Count]
    macs: _BeforeAfter
    parameters: _BeforeAfter
    energy: Fraction
    ms: Annotated[list[Size], Field(min_length=2, max_length=2)]


class _LowRank(_Trained):
    kind: Text
    layers: list[_Approximated]
    macs: _BeforeAfter
    parameters: _BeforeAfter


class _Ticket(Part):
    score: Maybe
    density: Fraction


class Stage(Part):
    """A stage's row, with what each kind of stage tells."""

    stage: Text
    score: Maybe = None
    density: Maybe = None
    bytes: Count | None = None
    seconds: Maybe = None
    tickets: list[_Ticket] | None = None
    quantize: _Quantize | None = None
    activations: _Activations | None = None
    fixed_point: _FixedPoint | None = None
    svd: _Svd | None = None
    obs: _Obs | None = None
    low_rank: _LowRank | None = None
    coverage: Coverage | None = None
    rolled_back: _Rolled | None = None
