"""Recipes from outside: whatever the text is, the answer is a RecipeError, and comes soon.

What is refused is refused on the count of events, so nothing here has to be timed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gossamer.compression import recipe
from gossamer.compression.recipe import loading, reading
from gossamer.core.errors import RecipeError

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{one}: &{one} [{','.join(['*' + before] * 9)}]\n"
    for before, one in zip("abcdefgh", "bcdefghi", strict=True)
)
TRAIN = "name: x\nstages:\n  - train: {epochs: 1, lr: 0.1, %s}\n"
PRUNE = "name: x\nstages:\n  - prune: {density: %s}\n"

HOSTILE = {
    "laughs in a name": (LAUGHS + "name: *i\nstages: [pack]", "more than 10,000 values"),
    "laughs in stages": (LAUGHS + "name: x\nstages: *i", "more than 10,000 values"),
    "laughs in a density": (LAUGHS + PRUNE % "*i", "more than 10,000 values"),
    "many aliases of much": (
        f"name: x\nstages: [&a [{'1,' * 999}], {'*a,' * 20}]", "more than 10,000 values"
    ),
    "a cycle": ("name: x\nstages: &s [*s]", "alias *s lies within &s"),
    "a cycle of two": ("name: &a [&b {c: *a}]\nstages: [pack]", "alias *a lies within &a"),
    "a merge cycle": (PRUNE % "0.5, <<: *p", "undefined alias"),
    "a merge of itself": ("name: x\nstages: [prune: &p {<<: *p}]", "alias *p lies within &p"),
    "depth": ("name: x\nstages: " + "[" * 3000 + "]" * 3000, "deeper than 32 levels"),
    "open depth": ("name: x\nstages: " + "{a: " * 2000, "deeper than 32 levels"),
    "block depth": ("".join(" " * i + "a:\n" for i in range(200)), "deeper than 32 levels"),
    "length": ("name: x #" + "y" * (1 << 18), "longer than 262,144 bytes"),
    "many stages": (f"name: x\nstages: [{'evaluate,' * 201}]", "201 stages; a recipe has at most"),
    "very many stages": (f"name: x\nstages: [{'pack,' * 20_000}]", "more than 10,000 values"),
    "a long integer": ("name: x\nseed: " + "9" * 5000 + "\nstages: [pack]", "5,000 characters"),
    "a long hexadecimal": ("name: x\nseed: 0x" + "f" * 5000, "5,002 characters"),
    "a long sexagesimal": ("name: x\nseed: 1" + ":1" * 5000, "10,001 characters"),
    "a long float": ("name: x\nseed: 0." + "1" * 5000, "5,002 characters"),
    "a large seed": ("name: x\nseed: 1000000000000000000000\nstages: [pack]", "seed"),
    "a date": ("name: 2020-13-45\nstages: [pack]", "month must be in 1..12"),
    "a tag": ("name: !!python/object/apply:os.getcwd []\nstages: [pack]", "constructor"),
    "binary": (PRUNE % "!!binary aGVsbG8=", "valid number"),
    "a set": (PRUNE % "!!set {a, b}", "valid number"),
    "keys that are lists": ("[a, b]: x", "unhashable"),
    "keys that are numbers": ("1: x\nname: y\nstages: [pack]", "strings"),
    "truth for a number": (PRUNE % "true", "mean nothing here"),
    "truth for a count": (TRAIN % "batch_size: yes", "mean nothing here"),
    "epochs without an end": (TRAIN.replace("1,", "99999999999,") % "momentum: 0", "epochs"),
    "rounds without an end": (PRUNE % "0.5, rounds: 1000000000", "rounds"),
    "NaN": (PRUNE % ".nan", "density"),
    "infinity": (TRAIN % "weight_decay: .inf", "finite"),
    "control characters": ('name: "a\\0b"\nstages: [pack]', "control characters"),
    "a long name": (f"name: {'y' * 999}\nstages: [pack]", "200 characters"),
    "an undefined alias": ("name: *q", "undefined alias"),
    "two documents": ("name: x\nstages: [pack]\n---\nname: y", "another document"),
    "a stage of lists": ("name: x\nstages: [{stage: [1]}]", "is not one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_text_ends_in_a_recipe_error(case: str, tmp_path: Path) -> None:
    text, told = HOSTILE[case]
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        recipe.load(path)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_a_bomb_is_refused_before_anything_is_built_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the nodes were composed")

    monkeypatch.setattr(yaml, "compose", never)
    for case in ("laughs in stages", "a cycle", "depth", "very many stages", "length"):
        with pytest.raises(RecipeError):
            recipe.parse(HOSTILE[case][0])


def test_only_so_much_of_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    with open(path, "wb") as f:
        f.truncate(1 << 33)
    with pytest.raises(RecipeError, match="longer than"):
        recipe.load(path)
    (tmp_path / "wide.yaml").write_bytes("name: x\nstages: [pack]\n".encode("utf-16"))
    with pytest.raises(RecipeError, match="cannot be read"):
        recipe.load(tmp_path / "wide.yaml")


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def endless() -> list:
    value: list = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "stages",
    [nested(5000), endless(), ["pack"] * 20_000, ["pack"] * 201, [{"prune": {"density": {1, 2}}}],
     [{"prune": {"density": object()}}]],
    ids=["deep", "endless", "very many", "many", "a set", "an object"],
)  # fmt: skip
def test_mappings_are_bounded_as_files_are(stages: list) -> None:
    with pytest.raises(RecipeError):
        recipe.load({"name": "x", "stages": stages})


@pytest.mark.parametrize(
    "override",
    [
        "stages.prune.density=" + "[" * 3000,
        "stages.prune.density=" + "9" * 5000,
        "stages.prune.density=&a [*a]",
        "stages.prune.density=!!python/object/apply:os.getcwd []",
        "stages.prune.density=2020-13-45",
        "stages.prune.density=true",
        "stages.0." + "a." * 5000 + "b=1",
        "stages." + "9" * 5000 + ".x=1",
        "stages.sensitivity.densities.0=1",
        "stages.sensitivity.densities.0.x=1",
        "stages.\u00b2.x=1",
        "stages=null",
        "stages=[" + "pack," * 300 + "]",
        "seed=0x" + "f" * 5000,
        "seed=1e400",
        "__class__.x=1",
        "=",
    ],
    ids=range(17),
)
def test_hostile_overrides_end_in_a_recipe_error(override: str) -> None:
    given = {
        "name": "x",
        "stages": [{"prune": {"density": 0.5}}, {"sensitivity": {"densities": [1]}}],
    }
    with pytest.raises(RecipeError) as caught:
        recipe.load(given, [override])
    assert len(str(caught.value)) < 2000


def test_honest_recipes_stay_within_the_bounds() -> None:
    for name in recipe.builtin():
        text = recipe.show(name)
        assert len(text) * 20 < reading.MOST_BYTES
        assert len(recipe.load(name).stages) * 10 < loading.MOST_STAGES
    # a network of 4,000 layers, each with its density
    layers = {f"encoder.{i}.weight": 0.1 for i in range(4000)}
    plan = recipe.load({"name": "x", "stages": [{"prune": {"density": layers}}]})
    assert len(plan.stages[0].density) == 4000
    # aliases are welcome
    text = "name: x\nstages:\n  - prune: {density: 0.5, retrain: &t {epochs: 2}, between: *t}\n"
    plan = recipe.parse(text)
    assert plan.stages[0].between == plan.stages[0].retrain
