"""What run.json may hold, checked before a page is made of it.

A file of an earlier version may lack what later ones have, and a later one may hold more. What is
there is of the kind that the page reads, or is refused by the name of its field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)

from gossamer.core.errors import ArgumentError
from gossamer.report.earlier import renamed

__all__ = ["checked"]

_MOST_TOLD = 3


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


class _Part(BaseModel):
    """More keys than these are left alone."""

    model_config = ConfigDict(extra="allow")


class _Evaluation(_Part):
    total: Annotated[int, Strict(), Field(ge=1, le=1 << 62)]
    score: Number
    correct: Count | None = None
    accuracy: Fraction | None = None
    low: Number | None = None
    high: Number | None = None
    loss: Maybe = None


class _Metric(_Part):
    name: Text
    unit: Text
    higher_is_better: Flag
    relative: Flag


class _Task(_Part):
    name: Text
    metric: _Metric


class _Pair(_Part):
    before: _Evaluation
    after: _Evaluation


class _Reloaded(_Part):
    fresh_process: Flag | None = None
    identical: Flag | None = None
    evaluated_in: Text | None = None
    built: Text | None = None
    same_outputs: Flag | None = None
    not_proved: Text | None = None
    notes: list[Text] | None = None


class _Floor(_Part):
    max_drop: Fraction
    reference: Number
    score: Number
    kept: Flag


class _Coverage(_Part):
    parameters: Count
    covered: Count
    outside: dict[Text, Annotated[list[Count], Field(min_length=1)]]


class _Rolled(_Part):
    round: Count
    rounds: Count
    density: Fraction
    asked: Fraction


class _Bytes(_Part):
    dense: Count
    file: Annotated[int, Strict(), Field(ge=1, le=1 << 62)]
    ratio: Factor
    parts: dict[Text, Count] | None = None
    reloaded: _Reloaded | None = None


class _Paper(_Part):
    weights: Count
    biases: Count = 0
    kept_percent: Size
    weight_bits: Size
    weight_bits_huffman: Size
    index_bits: Size
    index_bits_huffman: Size
    rate_pq_percent: Size
    rate_pqh_percent: Size
    entries: Size = 0.0


class _Layer(_Part):
    name: Text
    shape: list[Count]
    numel: Count
    kept: Count
    density: Fraction
    distinct: Count
    codec: Text
    bytes: Count
    parts: dict[Text, Count]
    bits_per_weight: Size
    codebook: list[Number] | None = None
    histogram: list[Count] | None = None
    paper: _Paper | None = None


class _End(_Part):
    """Where a training ended, or stood best."""

    score: Maybe
    epoch: Count


class _Trained(_Part):
    final: _End | None = None
    best: _End | None = None

    @model_validator(mode="after")
    def _there_or_not(self) -> _Trained:
        for key in ("final", "best"):
            if key in self.model_fields_set and getattr(self, key) is None:
                raise ValueError(f"{key} is null; leave it out, or give epoch and score")
        return self


class _FewBits(_Part):
    name: Text
    weights: Count
    values: Count
    bits: Size
    density: Fraction
    low: Number
    high: Number


class _Step(_Part):
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


class _Level(_Part):
    name: Text
    start: Number
    alpha: Number


class _Activations(_Trained):
    bits: Annotated[int, Strict(), Field(ge=1, le=64)]
    estimator: Text
    layers: list[_Level]


class _Integer(_Part):
    identical: Flag
    correct: Count | None = None
    total: Count


class _Lengths(_Part):
    name: Text
    bits: Whole | None
    weight: Whole | None
    bias: Whole | None
    output: Whole | None


class _Modes(_Part):
    bits: Count
    dynamic: Number
    static: Number


class _FixedPoint(_Part):
    mode: Text
    activation_bits: Whole | None
    input_length: Whole | None
    integer: _Integer
    float_score: Number
    layers: list[_Lengths]
    compare: list[_Modes] | None = None

    @model_validator(mode="after")
    def _a_curve(self) -> _FixedPoint:
        if self.compare is not None and len(self.compare) == 1:
            raise ValueError("compare holds one row; a curve needs two")
        return self


class _Factors(_Part):
    name: Text
    rank: Count
    before: Count
    after: Annotated[int, Strict(), Field(ge=1, le=1 << 62)]


class _Svd(_Trained):
    layers: list[_Factors]


class _Treated(_Part):
    name: Text
    density: Fraction
    error: Maybe = None
    bias: Flag = False
    note: Text = ""


class _Outside(_Part):
    name: Text
    kind: Text
    parameters: Count
    note: Text = ""


class _Obs(_Part):
    layers: list[_Treated]
    outside: list[_Outside] = []
    examples: Count
    batch_norm: Flag | None = None
    rate: Size | None = None


_BeforeAfter = Annotated[list[Count], Field(min_length=2, max_length=2)]


class _Approximated(_Part):
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


class _Ticket(_Part):
    score: Maybe
    density: Fraction


class _Stage(_Part):
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
    coverage: _Coverage | None = None
    rolled_back: _Rolled | None = None


class _Engine(_Part):
    engine: Text
    batch: Count
    threads: Count
    before_ms: Size
    after_ms: Size
    ratio: Maybe = None
    interval: Annotated[list[Maybe], Field(min_length=2, max_length=2)] | None = None


class _Macs(_Part):
    macs: Size
    nonzero: Size
    live: Size


class _Operations(_Part):
    before: _Macs
    after: _Macs


class _EightBits(_Part):
    check: Text
    score: Number
    of: Count


class _Latency(_Part):
    dense_ms: Size
    compressed_ms: Size
    ratio: Maybe = None
    interval: Annotated[list[Maybe], Field(min_length=2, max_length=2)] | None = None
    same_operations: Flag | None = None
    engine: Text | None = None
    batch: Count | None = None
    pairs: Count | None = None
    rows: list[_Engine] | None = None
    note: Text | None = None
    eight_bits: _EightBits | None = None


class _Epoch(_Part):
    stage: Text
    train_loss: Maybe = None
    score: Maybe = None


class _Mask(_Part):
    name: Text
    shape: Annotated[list[Count], Field(min_length=2, max_length=2)]
    counts: list[Annotated[list[Count], Field(min_length=1)]]
    out: Count


_Point = Annotated[list[Number], Field(min_length=2, max_length=2)]


class _Run(_Part):
    name: Text
    model: Text
    dataset: Text
    bytes: _Bytes
    evaluation: _Pair | None = None
    task: _Task | None = None
    created: Text | None = None
    command: Text | None = None
    seed: Count | None = None
    recipe: Text | None = None
    versions: dict[Text, Text | Number | None] | None = None
    hardware: dict[Text, Text | Number | None] | None = None
    stages: list[_Stage] | None = None
    layers: list[_Layer] | None = None
    latency: _Latency | None = None
    macs: _Operations | None = None
    integer: _Integer | None = None
    sensitivity: dict[Text, list[_Point] | None] | None = None
    curves: list[_Epoch] | None = None
    mask_image: _Mask | None = None
    floor: _Floor | None = None
    coverage: _Coverage | None = None
    notes: list[Text] | None = None


def checked(run: object, where: str = "run") -> Mapping[str, Any]:
    """The same figures, when a page can be made of them.

    ``where`` names them in messages. Raises :class:`ArgumentError` naming the first fields that
    are missing or of another kind, with what they hold.
    """
    if not isinstance(run, Mapping):
        raise ArgumentError(
            f"{where} holds a {type(run).__name__}; give the contents of a run directory's run.json"
        )
    missing = [key for key in ("name", "model", "dataset", "bytes") if not run.get(key)]
    if missing:
        raise ArgumentError(
            f"{where} lacks {', '.join(missing)}; give the contents of a run directory's run.json"
        )
    run = renamed(run)
    try:
        _Run.model_validate(run)
    except ValidationError as e:
        problems = e.errors(include_url=False)
        told = [_told(problem) for problem in problems[:_MOST_TOLD]]
        if len(problems) > _MOST_TOLD:
            told.append(f"and {len(problems) - _MOST_TOLD} more")
        raise ArgumentError(
            f"{where} is damaged, or of another version: {'; '.join(told)}. Take run.json from the "
            "run directory anew, or run the same command again"
        ) from e
    return run


def _told(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"]) or "run"
    if problem["type"] == "missing":
        return f"{field} is missing"
    value = repr(problem["input"])
    value = value if len(value) <= 40 else value[:37] + "..."
    message = str(problem["msg"]).removeprefix("Value error, ").replace("Input should", "should")
    return f"{field} is {value}: {message}"
