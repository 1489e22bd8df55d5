"""Methods of other packages: one module of under 40 lines each, used from YAML and the shell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.compression import recipe
from gossamer.core.errors import ArgumentError, FormatError, RecipeError
from gossamer.distribute import by_name
from gossamer.pack import unpack

TOYS = Path(__file__).parent / "toys"
# the coder serves other tests too, in whose processes it must not be registered
EVERY = [*sorted(TOYS.glob("toy_*.py")), TOYS.parents[1] / "toy_coder.py"]
REGISTERED = {
    "toy_coder": "\n\nfrom gossamer.pack.coders.table import register\n\nregister(Toy())\n"
}
RECIPE = """\
name: toys
model: mlp-64-32-16-10
dataset: digits
max_drop: 1
stages:
  - train: {epochs: 2, lr: 0.05}
  - prune: {method: toy-relative, density: 0.5}
  - quantize: {method: toy-halves, train: {epochs: 1, lr: 0.01}}
  - toy_halve
  - evaluate: {latency: false}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the toys installed."""
    place = tmp_path_factory.mktemp("site")
    info = place / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    for path in EVERY:
        (place / path.name).write_text(path.read_text() + REGISTERED.get(path.stem, ""))
    names = [path.stem for path in EVERY]
    rows = "\n".join(f"{name} = {name}" for name in names)
    (info / "entry_points.txt").write_text(f"[gossamer.plugins]\n{rows}\n")
    # a checkout may itself stand on the path
    paths = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def shell(installed: dict[str, str], *arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "gossamer", *arguments]
    done = subprocess.run(command, env=installed, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_every_toy_is_one_short_module() -> None:
    assert [p.stem for p in EVERY] == ["toy_codec", "toy_quantizer", "toy_score", "toy_coder"]
    lines = {p.stem: len((p.read_text() + REGISTERED.get(p.stem, "")).splitlines()) for p in EVERY}
    assert max(lines.values()) < 45


def test_a_score_a_quantizer_and_a_stage_from_yaml(installed, tmp_path: Path) -> None:
    (tmp_path / "toys.yaml").write_text(RECIPE)
    shell(installed, "compress", "-r", "toys.yaml", "--out", "run", cwd=tmp_path)
    figures = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [row["stage"] for row in figures["stages"]] == [
        "1-train",
        "2-prune",
        "3-quantize",
        "4-toy_halve",
        "5-pack",
    ]
    (layer,) = figures["stages"][2]["quantize"]["layers"]  # all but the two ends
    assert layer["values"] == 3


def test_a_gradient_codec_from_the_shell(installed, tmp_path: Path) -> None:
    shell(
        installed,
        *("train", "--model", "mlp-64-20-10", "--dataset", "digits", "--epochs", "1"),
        *("--exchange", "toy-mean", "--out", "net.safetensors"),
        cwd=tmp_path,
    )
    assert (tmp_path / "net.safetensors").exists()


def test_a_symbol_coder_from_the_shell(installed, tmp_path: Path) -> None:
    # half are the smallest of 13 values, a quarter the next: what the toy's lengths fit
    counts = torch.tensor([*(1 << n for n in range(11, -1, -1)), 1])
    codes = torch.arange(13).repeat_interleave(counts)[torch.randperm(4096)]
    weight = torch.randn(13).sort().values[codes].view(64, 64)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    shell(installed, "pack", "w.safetensors", "w.gsm", cwd=tmp_path)
    assert "toy" in shell(installed, "inspect", "w.gsm", cwd=tmp_path)
    shell(installed, "unpack", "w.gsm", "back.safetensors", cwd=tmp_path)
    assert torch.equal(load_file(tmp_path / "back.safetensors")["w"], weight)
    with pytest.raises(FormatError, match="toy"):
        unpack(tmp_path / "w.gsm")


def test_without_the_package_its_names_are_unknown() -> None:
    with pytest.raises(RecipeError, match="stage 'toy_halve' is not one of"):
        recipe.parse("name: x\nstages: [toy_halve]")
    with pytest.raises(RecipeError, match="toy-relative"):
        recipe.parse("name: x\nstages: [{prune: {method: toy-relative, density: 0.5}}]")
    with pytest.raises(ArgumentError, match="codec 'toy-mean' is not one of terngrad, sq2"):
        by_name("toy-mean")


def test_a_plugin_that_cannot_be_imported_is_named(installed, tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gossamer.plugins]\nbroken = no_such_module\n")
    command = [sys.executable, "-m", "gossamer", "recipes"]
    env = {**installed, "PYTHONPATH": str(tmp_path) + os.pathsep + installed["PYTHONPATH"]}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "plugin 'broken' (no_such_module) cannot be loaded" in done.stderr
