from pathlib import Path

import pytest
import yaml

from gossamer import nets
from gossamer.compression import door, recipe
from gossamer.compression.layers import chosen, per_layer
from gossamer.compression.stages.pack import Pack
from gossamer.core.errors import RecipeError

HEAD = "name: mine\nstages:\n"


def fails(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.parse(text, "mine.yaml", overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(recipe.builtin()))
def test_builtin_recipes_validate_and_survive_dump_and_parse(name: str) -> None:
    plan = recipe.load(name)
    assert plan.name == name
    assert plan.description
    assert recipe.parse(recipe.dump(plan)).model_dump() == plan.model_dump()


@pytest.mark.parametrize("name", sorted(recipe.builtin()))
def test_builtin_recipes_with_a_model_name_its_layers(name: str) -> None:
    plan = recipe.load(name)
    if plan.model is not None:
        door.check_patterns(plan, nets.build(plan.model))


def test_stages_in_all_three_spellings() -> None:
    plan = recipe.parse(
        HEAD + "  - {stage: prune, density: 0.5}\n  - prune: {density: 0.5}\n  - pack"
    )
    assert plan.stages[0] == plan.stages[1]
    assert [s.stage for s in plan.stages] == ["prune", "prune", "pack"]


def test_numbers_of_yaml_that_read_as_text_are_numbers() -> None:
    # YAML 1.1 takes 1e-4 for a string
    plan = recipe.parse(HEAD + "  - train: {epochs: 2, lr: 1e-4}")
    assert plan.stages[0].config(3).lr == 1e-4
    assert plan.stages[0].config(3).seed == 3


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (HEAD + "  - trian: {epochs: 3}", ["line 3", "stages.0", "'trian'", "mean 'train'"]),
        (
            HEAD + "  - train:\n      epochs: 3\n      lrr: 1",
            ["line 5", "stages.0.lrr", "mean 'lr'"],
        ),
        (HEAD + "  - prune:\n      density: 2", ["line 4", "stages.0.density", "2", "equal to 1"]),
        (HEAD + "  - prune:\n      density:\n        fc-1: 2", ["line 5", "density.fc-1", "2"]),
        (HEAD + "  - prune: {density: atuo}", ["'atuo'", "auto", "(0, 1]"]),
        (HEAD + "  - prune: {density: 0.1, quality: 1}", ["line 3", "either density"]),
        (HEAD + "  - prune: {quality: 1, rounds: 2}", ["rounds"]),
        (HEAD + "  - prune: {density: {a: 0.1}, scope: global}", ["global", "one density"]),
        (HEAD + "  - share: {bits: 17}", ["stages.0.bits", "17", "16"]),
        (HEAD + "  - share", ["stages.0.bits: missing"]),
        (HEAD + "  - share: {bits: 3, init: liner}", ["'liner'", "density", "mean 'linear'"]),
        (
            HEAD
            + "  - prune:\n      density: 0.1\n      retrain:\n        epochs: 1\n        lr: -1",
            ["line 7", "stages.0.retrain.lr", "-1", "greater than 0"],
        ),
        (HEAD + "  - train: {epochs: 2, warmup: 5}", ["line 3", "warmup=5"]),
        (HEAD + "  - share: {bits: 3, bits: 4}", ["line 3", "'bits' is given twice"]),
        (HEAD + "  - prune: 3", ["line 3", "'prune'", "3", "mapping"]),
        (HEAD + "  - 7", ["line 3", "7 is no stage"]),
        ("name: x\nstages: 3", ["line 2", "stages: 3", "list"]),
        ("name: x", ["stages", "missing"]),
        ("stages: [pack]", ["name: missing"]),
        ("nam: x\nstages: [pack]", ["line 1", "nam", "mean 'name'"]),
        ("name: {", ["line 1", "no YAML"]),
        ("- 1", ["mapping"]),
        (HEAD + "  - pack\n  - prune: {density: 0.1}", ["line 3", "prune after pack"]),
        (HEAD + "  - share: {bits: 3}\n  - train: {epochs: 1}", ["line 4", "train after share"]),
        (HEAD + "  - evaluate\n  - pack", ["line 3", "evaluate comes last"]),
    ],
)
def test_errors_point_at_line_key_value_and_what_is_allowed(text: str, parts: list[str]) -> None:
    message = fails(text)
    for part in parts:
        assert part in message


def test_all_mistakes_are_told_at_once() -> None:
    message = fails(HEAD + "  - prune: {density: 2}\n  - share: {bits: 99}")
    assert message.splitlines()[0].startswith("mine.yaml, line 3: stages.0.density")
    assert message.splitlines()[1].startswith("mine.yaml, line 4: stages.1.bits")


def test_pruning_without_retraining_may_follow_sharing() -> None:
    plan = recipe.parse(HEAD + "  - share: {bits: 3}\n  - prune: {density: 0.5}")
    assert len(plan.work) == 2


def test_overrides_by_number_and_by_stage() -> None:
    text = HEAD + "  - train: {epochs: 9}\n  - prune: {density: 0.1}\n"
    plan = recipe.parse(
        text, "x", ["stages.1.density={fc.1: .2}", "stages.train.epochs=3", "seed=7"]
    )
    assert plan.stages[1].density == {"fc.1": 0.2}
    assert plan.stages[0].epochs == 3
    assert plan.seed == 7
    added = recipe.parse(text, "x", ["stages.prune.retrain.epochs=4"])
    assert added.stages[1].retrain.epochs == 4


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("stages.1.density=7", "--set stages.1.density=7: stages.1.density: 7"),
        ("stages.2.density=0.1", "stages are 0 train, 1 prune"),
        ("stages.pruen.density=0.1", "stages are 0 train, 1 prune"),
        ("stages.1.densty=0.1", "did you mean 'density'"),
        ("stages.1", "KEY=VALUE"),
        ("stages.1.density.a.b=1", "is 0.1 and has no keys below"),
        ("seed={", "no YAML"),
    ],
)
def test_overrides_that_do_not_fit_are_named(override: str, part: str) -> None:
    assert part in fails(HEAD + "  - train: {epochs: 9}\n  - prune: {density: 0.1}\n", override)


def test_load_takes_names_files_mappings_and_recipes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(HEAD + "  - prune: {density: 3}\n")
    with pytest.raises(RecipeError, match=rf"{path}, line 3"):
        recipe.load(path)
    path.write_text(HEAD + "  - prune: {density: 0.3}\n")
    plan = recipe.load(path)
    same = recipe.load(yaml.safe_load(path.read_text()))
    assert plan.model_dump() == same.model_dump() == recipe.load(plan).model_dump()
    assert recipe.load(plan, ["seed=4"]).seed == 4
    with pytest.raises(RecipeError, match="did you mean 'digits-demo'"):
        recipe.load("digit-demo")
    with pytest.raises(RecipeError, match="cannot be read"):
        recipe.load(tmp_path / "none.yaml")


def test_a_recipe_without_pack_and_evaluate_gets_the_defaults() -> None:
    plan = recipe.parse(HEAD + "  - prune: {density: 0.5}")
    assert plan.pack == Pack()
    assert plan.evaluate.latency
    assert [s.stage for s in plan.work] == ["prune"]


def test_layer_patterns_resolve_by_name_glob_and_type() -> None:
    net = nets.build("lenet-5")
    weights = chosen(net)
    assert per_layer(net, weights, {"*": 5, "type:Conv*": 8, "ip2": 4}) == {
        "conv1.weight": 8,
        "conv2.weight": 8,
        "ip1.weight": 5,
        "ip2.weight": 4,
    }
    assert per_layer(net, weights, {"type:LSTM": 3}) == {}
    assert list(chosen(net, ["type:Linear"])) == ["ip1.weight", "ip2.weight"]
    assert list(chosen(net, None, ["type:Linear"])) == ["conv1.weight", "conv2.weight"]


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("prune: {density: {cnv1: 0.1}}", ["line 3", "density.cnv1", "conv1.weight"]),
        ("share: {bits: {ip1: 3, ip9: 4}}", ["line 3", "bits.ip9", "ip1.weight"]),
        ("share: {bits: 3, include: [fc]}", ["include", "'fc'", "conv1.weight"]),
        ("share: {bits: 3, exclude: ['*']}", ["line 3", "no weight is left"]),
    ],
)
def test_unknown_layers_are_an_error_that_lists_them(stage: str, parts: list[str]) -> None:
    plan = recipe.parse(f"{HEAD}  - {stage}", "mine.yaml")
    with pytest.raises(RecipeError) as caught:
        door.check_patterns(plan, nets.build("lenet-5"))
    for part in parts:
        assert part in str(caught.value)


def test_a_list_of_stages_is_a_recipe() -> None:
    stages = [{"prune": {"density": 0.5}}, "pack"]
    assert recipe.load(stages).stages == recipe.load({"name": "x", "stages": stages}).stages
    with pytest.raises(RecipeError, match="recipe is int; give a name"):
        recipe.load(3)  # type: ignore[arg-type]
