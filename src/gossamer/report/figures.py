"""What run.json may hold, checked before a page is made of it.

A file of an earlier version may lack what later ones have, and a later one may hold more. What is
there is of the kind that the page reads, or is refused by the name of its field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, Strict, ValidationError

from gossamer.core.errors import ArgumentError
from gossamer.report.earlier import renamed
from gossamer.report.figures_of_stages import (
    Count,
    Coverage,
    Factor,
    Flag,
    Fraction,
    Integer,
    Maybe,
    Number,
    Part,
    Size,
    Stage,
    Text,
)

__all__ = ["checked"]

_MOST_TOLD = 3


class _Evaluation(Part):
    total: Annotated[int, Strict(), Field(ge=1, le=1 << 62)]
    score: Number
    correct: Count | None = None
    accuracy: Fraction | None = None
    low: Number | None = None
    high: Number | None = None
    loss: Maybe = None


class _Metric(Part):
    name: Text
    unit: Text
    higher_is_better: Flag
    relative: Flag


class _Task(Part):
    name: Text
    metric: _Metric


class _Pair(Part):
    before: _Evaluation
    after: _Evaluation


class _Reloaded(Part):
    fresh_process: Flag | None = None
    identical: Flag | None = None
    evaluated_in: Text | None = None
    built: Text | None = None
    same_outputs: Flag | None = None
    not_proved: Text | None = None
    notes: list[Text] | None = None


class _Floor(Part):
    max_drop: Fraction
    reference: Number
    score: Number
    kept: Flag


class _Size(Part):
    most: Count
    bytes: Count
    kept: Flag


class _Bytes(Part):
    dense: Count
    file: Annotated[int, Strict(), Field(ge=1, le=1 << 62)]
    ratio: Factor
    parts: dict[Text, Count] | None = None
    reloaded: _Reloaded | None = None


class _Paper(Part):
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


class _Layer(Part):
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


class _Engine(Part):
    engine: Text
    batch: Count
    threads: Count
    before_ms: Size
    after_ms: Size
    ratio: Maybe = None
    interval: Annotated[list[Maybe], Field(min_length=2, max_length=2)] | None = None


class _Macs(Part):
    macs: Size
    nonzero: Size
    live: Size


class _Operations(Part):
    before: _Macs
    after: _Macs


class _EightBits(Part):
    check: Text
    score: Number
    of: Count


class _Latency(Part):
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


class _Epoch(Part):
    stage: Text
    train_loss: Maybe = None
    score: Maybe = None


class _Mask(Part):
    name: Text
    shape: Annotated[list[Count], Field(min_length=2, max_length=2)]
    counts: list[Annotated[list[Count], Field(min_length=1)]]
    out: Count


_Point = Annotated[list[Number], Field(min_length=2, max_length=2)]


class _Run(Part):
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
    stages: list[Stage] | None = None
    layers: list[_Layer] | None = None
    latency: _Latency | None = None
    macs: _Operations | None = None
    integer: Integer | None = None
    sensitivity: dict[Text, list[_Point] | None] | None = None
    curves: list[_Epoch] | None = None
    mask_image: _Mask | None = None
    floor: _Floor | None = None
    size: _Size | None = None
    coverage: Coverage | None = None
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
