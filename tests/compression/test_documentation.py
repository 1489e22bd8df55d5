"""docs/recipes.md says of every stage and quantizer what the classes and tables say."""

import re
from pathlib import Path

import pytest

from gossamer.compression.settings import Training
from gossamer.compression.stage import STAGES, LayerStage
from gossamer.compression.stages.train import Train
from gossamer.prune.scores import SCORES
from gossamer.quantize.fewbits import QUANTIZERS

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()


def rows(heading: str) -> dict[str, str]:
    """First cell -> the others, of the table behind a heading."""
    table = PAGE.split(heading, 1)[1].split("\n\n")
    lines = next(part for part in table if part.startswith("| ")).splitlines()[2:]
    cells = [line.strip("| ").split(" | ", 1) for line in lines]
    return {first.strip("`"): rest for first, rest in cells}


STAGE_ROWS = rows("## A recipe's stages")


def test_every_stage_has_a_row() -> None:
    assert sorted(STAGE_ROWS) == sorted(STAGES)


@pytest.mark.parametrize("name", [n for n in STAGES if STAGES[n] is not Train])
def test_a_row_names_every_setting_and_no_other(name: str) -> None:
    kind = STAGES[name]
    told = set(re.findall(r"`(\w+)`", STAGE_ROWS[name].split(" | ")[-1]))
    own = set(kind.model_fields) - {"stage"}
    optional = {"include", "exclude"} if issubclass(kind, LayerStage) else set()
    if name == "quantize":  # its axes stand in a table of their own
        optional |= {axis for entry in QUANTIZERS.values() for axis in entry.axes}
    assert told <= own
    assert own - told <= optional


def test_every_setting_of_training_is_named() -> None:
    told = PAGE.split("Training settings:", 1)[1].split("\n", 1)[0]
    missing = [f for f in Training.model_fields if f"`{f}`" not in told]
    assert missing == []


def test_every_quantizer_has_its_row() -> None:
    table = rows("## Few bits")
    assert list(table) == list(QUANTIZERS)
    for name, entry in QUANTIZERS.items():
        values, axes = [*table[name].split(" | "), ""][:2]
        assert values.strip() == entry.values
        assert re.findall(r"`(\w+)`", axes) == list(entry.axes)
        if entry.bits is not None:
            assert f"`bits` {entry.bits[0]} to {entry.bits[1]}" in axes


def test_every_score_is_named_where_stages_are() -> None:
    told = set(re.findall(r"[\w-]+", STAGE_ROWS["prune"]))
    criteria = [n for n in SCORES if "initial" in SCORES[n].reads]
    assert set(SCORES) - set(criteria) <= told
    assert told & set(criteria)
