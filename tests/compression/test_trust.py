"""A recipe from elsewhere runs no code that its user did not name, or read and trust."""

from __future__ import annotations

from pathlib import Path

import pytest

import gossamer
from gossamer import compression
from gossamer.cli import main
from gossamer.compression import recipe as recipes
from gossamer.core.errors import RecipeError

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()

def net():
    from torch import nn
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder beside the current one, with a recipe and its code, of a name used once."""
    folder = tmp_path / "elsewhere"
    (tmp_path / "here").mkdir()
    folder.mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code = folder / f"code_{tmp_path.name}.py"
    code.write_text(CODE)
    text = f"name: theirs\nmodel: {code}:net\ndataset: digits\nstages: [pack]\n"
    (folder / "theirs.yaml").write_text(text)
    return folder


def refused(plan: recipes.Recipe, out: str = "r", **options: object) -> str:
    with pytest.raises(RecipeError) as caught:
        compression.run(plan, None, None, out, **options)
    return str(caught.value)


def test_code_of_a_recipe_from_elsewhere_is_not_run(elsewhere: Path) -> None:
    path = elsewhere / "theirs.yaml"
    told = refused(recipes.load(path))
    assert "theirs.yaml, line 2: model" in told
    assert "--trust-recipe-code" in told
    assert "trust_recipe_code=True" in told
    assert not (elsewhere / "ran").exists()
    assert not Path("r").exists()
    # other settings overridden, a relative path, and a link within the folder, change nothing
    refused(recipes.load(path, ["seed=3"]))
    refused(recipes.load(recipes.load(path), ["seed=3"]))
    refused(recipes.load("../elsewhere/theirs.yaml"))
    Path("mine.yaml").symlink_to(path)
    refused(recipes.load("mine.yaml"))
    assert not (elsewhere / "ran").exists()


def test_the_same_holds_for_its_dataset(elsewhere: Path) -> None:
    path = elsewhere / "theirs.yaml"
    path.write_text(path.read_text().replace("dataset: digits", "dataset: somewhere:data"))
    with pytest.raises(RecipeError, match=r"line 3: dataset: 'somewhere:data' would be run"):
        compression.run(recipes.load(path), "lenet-300-100", None, "r")


def test_the_command_line_asks_for_a_flag(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", "-r", str(elsewhere / "theirs.yaml"), "--out", "r"]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 1
    assert "--trust-recipe-code" in capsys.readouterr().err
    assert not (elsewhere / "ran").exists()
    with pytest.raises(SystemExit) as end:
        main([*command, "--trust-recipe-code", "--set", "stages=[{evaluate: {latency: false}}]"])
    assert not end.value.code
    assert (elsewhere / "ran").exists()


def test_what_the_user_names_is_the_users(elsewhere: Path) -> None:
    (code,) = elsewhere.glob("code_*.py")
    path = elsewhere / "theirs.yaml"
    quick = "stages=[{evaluate: {latency: false}}]"
    plan = recipes.load(path, [f"model={code}:net", quick])
    assert compression.run(plan, None, None, "a").bytes
    # a recipe within the tree is the user's own
    inside = Path("recipes")
    inside.mkdir()
    (inside / "mine.yaml").write_text(path.read_text())
    assert compression.run(recipes.load(inside / "mine.yaml", [quick]), None, None, "b").bytes
    # of the library's own recipes, and of mappings, nothing is asked
    given = {"name": "x", "model": f"{code}:net", "dataset": "digits", "stages": ["pack"]}
    assert compression.run(recipes.load(given, [quick]), None, None, "c").bytes


def test_names_without_code_need_no_trust(elsewhere: Path) -> None:
    path = elsewhere / "plain.yaml"
    path.write_text("name: x\nmodel: mlp-64-10\ndataset: digits\nstages: [{train: {epochs: 1}}]\n")
    plan = recipes.load(path, ["stages=[{train: {epochs: 1}}, {evaluate: {latency: false}}]"])
    assert compression.run(plan, None, None, "r").bytes
    # compress() is always given both, so a recipe's own are never used there
    theirs = recipes.load(elsewhere / "theirs.yaml", ["stages=[{evaluate: {latency: false}}]"])
    from gossamer import nets

    assert gossamer.compress(nets.build("mlp-64-10"), "digits", recipe=theirs, out="s").bytes
    assert not (elsewhere / "ran").exists()


@pytest.mark.parametrize("address", ["https://a.org/r.yaml", "http://a.org/r", "s3://b/r.yml"])
def test_an_address_is_no_recipe(address: str) -> None:
    with pytest.raises(RecipeError, match="is an address, and nothing is downloaded"):
        recipes.load(address)
