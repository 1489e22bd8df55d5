import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer import cli, nets
from gossamer.compression import inputs
from gossamer.compression.progress import Lines, Reporter, console
from gossamer.core.errors import GossamerError

ROOT = Path(__file__).resolve().parents[2]
NET = ["--model", "mlp-64-24-10", "--dataset", "digits"]


class Told:
    """A command's exit code and what it printed."""

    def __init__(self, capture: pytest.CaptureFixture[str], *arguments: str | Path) -> None:
        capture.readouterr()
        self.code: Any = 0
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as e:
            self.code = e.code or 0
        self.out, self.err = capture.readouterr()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "net.safetensors"
    with pytest.raises(SystemExit) as done:
        cli.main(["train", *NET, "--epochs", "6", "--lr", "0.1", "--out", str(path)])
    assert not done.value.code
    return path


def test_train_writes_weights_and_goes_on_from_its_checkpoint(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = weights.with_name("net.safetensors.metrics.jsonl").read_text().splitlines()
    assert len(rows) == 6
    before = weights.read_bytes()
    told = Told(capsys, "train", *NET, "--epochs", "6", "--lr", "0.1", "--out", weights)
    assert "test accuracy" in told.out
    assert weights.read_bytes() == before
    told = Told(capsys, "train", *NET, "--epochs", "7", "--lr", "0.1", "--out", weights)
    assert told.code == 1
    assert "epochs was 6, now it is 7" in told.err


def test_the_other_layouts_by_the_ending(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nets.build("mlp-64-24-10")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("weight"):  # 7 values, most of them 0
                p.copy_((p / p.abs().max() * 3).round().where(p.abs() > p.abs().median(), 0))
    inputs.save_safetensors(model, tmp_path / "a.safetensors")
    assert Told(capsys, "pack", tmp_path / "a.safetensors", tmp_path / "a.gsm").code == 0
    for name, more in (("b.net", ()), ("b.safetensors", ("--coded",))):
        assert Told(capsys, "unpack", tmp_path / "a.gsm", tmp_path / name, *more).code == 0
        assert (tmp_path / name).stat().st_size < (tmp_path / "a.safetensors").stat().st_size / 2
        network = ("--model", "mlp-64-24-10") if name == "b.net" else ()
        back = tmp_path / f"{name}.gsm"
        assert Told(capsys, "pack", tmp_path / name, back, *network).code == 0
        found = gossamer.unpack(back)
        assert all(torch.equal(found[n], t) for n, t in model.state_dict().items())
    told = Told(capsys, "pack", tmp_path / "b.net", tmp_path / "c.gsm")
    assert told.code == 1
    assert "holds no names and shapes" in told.err
    told = Told(capsys, "unpack", tmp_path / "a.gsm", tmp_path / "b.txt")
    assert told.code == 1
    assert ".safetensors or .net" in told.err


def test_pack_inspect_unpack_evaluate(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, plain = tmp_path / "net.gsm", tmp_path / "back.safetensors"
    told = Told(capsys, "pack", weights, packed, "--profile", "fast")
    assert f"{packed.stat().st_size:,} bytes" in told.out
    assert Told(capsys, "unpack", packed, plain).code == 0
    assert plain.read_bytes() == weights.read_bytes()
    figures = json.loads(Told(capsys, "inspect", packed, "--json").out)
    assert figures["file_bytes"] == packed.stat().st_size == sum(figures["parts"].values())
    assert {t["name"]: t["shape"] for t in figures["tensors"]}["fc1.weight"] == [24, 64]
    table = Told(capsys, "inspect", packed).out
    assert "24x64" in table
    assert f"{packed.stat().st_size:,} bytes for 7,240" in table
    first = json.loads(Told(capsys, "evaluate", weights, *NET, "--json").out)
    second = json.loads(Told(capsys, "evaluate", packed, *NET, "--json").out)
    assert first == second
    assert first["accuracy"] > 0.85
    assert f"{100 * first['accuracy']:.2f} %" in Told(capsys, "evaluate", packed, *NET).out


def test_sensitivity_as_table_json_and_plot(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["sensitivity", *NET, "--weights", weights, "--density", "1", "--density", "0.02"]
    told = Told(capsys, *given, "--plot", tmp_path / "scan.svg")
    assert "fc1.weight" in told.out
    assert "<svg" in (tmp_path / "scan.svg").read_text()
    found = json.loads(Told(capsys, *given, "--json").out)
    assert found["scan"]["fc1.weight"][0] == [1.0, found["base"]]
    assert found["suggested"]["fc1.weight"] == 1.0


def test_compress_then_report(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    given = ["compress", *NET, "--weights", weights, "--recipe", "prune", "--out", out]
    quick = ["--set", "stages.prune.rounds=1", "--set", "stages.prune.retrain.epochs=1"]
    quick += ["--max-drop", "1"]
    told = Told(capsys, *given, *quick, "--threads", str(torch.get_num_threads()))
    assert told.code == 0, told.err
    run = json.loads((out / "run.json").read_text())
    assert f"{run['bytes']['ratio']:.1f}x smaller" in told.out
    assert f"{100 * run['evaluation']['after']['accuracy']:.2f} %" in told.out
    assert "178 of 1,776 kept" in told.out
    assert str(out / "report.html") in told.out
    assert "stage 1/1 prune" in told.err  # the progress, as plain lines where it is no terminal
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert Told(capsys, "report", out).code == 0
    assert (out / "report.html").read_text() == page
    told = Told(capsys, *given, *quick, "--seed", "3")
    assert told.code == 1
    assert "recipe.seed was 0, now it is 3" in told.err


def test_a_model_of_ones_own_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ROOT / "examples" / "own_model.py"
    told = Told(
        capsys,
        *["compress", "--model", f"{own}:model", "--dataset", f"{own}:data"],
        *["--recipe", "prune", "--out", tmp_path / "run"],
        *["--set", "stages.prune.rounds=1", "--set", "stages.prune.retrain.epochs=1"],
        *["--max-drop", "1"],
    )
    assert told.code == 0, told.err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["bytes"]["reloaded"]["evaluated_in"] == "a fresh process"
    tied = [layer for layer in run["layers"] if layer["codec"] == "tied"]
    assert [layer["name"] for layer in tied] == ["again.weight"]
    assert run["evaluation"]["before"]["accuracy"] > 0.95


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["evaluate", "--model", "mpl", "--dataset", "digits"], ["'mpl'", "mlp"]),
        (["evaluate", "--model", "mlp", "--dataset", "digit"], ["'digit'", "digits"]),
        (["evaluate", *NET, "--split", "tset"], ["'tset'", "validation"]),
        (["evaluate", *NET, "none.gsm"], ["none.gsm"]),
        (["inspect", "none.gsm"], ["none.gsm: No such file"]),
        (["inspect", str(ROOT / "pyproject.toml")], ["not a .gsm file"]),
        (["pack", str(ROOT / "pyproject.toml"), "x.gsm"], ["pyproject.toml"]),
        (["compress", "--recipe", "prun", *NET], ["'prun'", "did you mean 'prune'"]),
        (["compress", "--recipe", "prune", *NET], ["not trained", "--weights"]),
        (["compress", "--recipe", "prune"], ["names no model", "--model"]),
        (["compress", "--recipe", "digits-demo", "--set", "seed=-1"], ["--set seed=-1", "-1"]),
        (["compress", "-m", "no_such:net", "-d", "digits"], ["no_such"]),
        (["compress", "-m", "none.py:net", "-d", "digits"], ["there is no file", "none.py"]),
        (
            ["compress", "-m", "nets.py", "-d", "digits"],
            ["'nets.py' is a file", "nets.py:FUNCTION"],
        ),
        (["report", str(ROOT)], ["run.json"]),
        (["recipes", "none"], ["'none'", "deep-compression"]),
        (["reproduce", "none"], ["'none'"]),
    ],
)
def test_mistakes_are_told_in_a_line_without_traceback(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = Told(capsys, *arguments)
    assert told.code == 1
    assert told.err.startswith("error: ")
    assert "Traceback" not in told.err
    for part in parts:
        assert part in told.err


def test_debug_anywhere_shows_where_it_went_wrong() -> None:
    with pytest.raises(GossamerError, match="neither a file nor one of"):
        cli.main(["recipes", "none", "--debug"])


def test_ctrl_c_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped() -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(gossamer.recipe, "builtin", stopped)
    told = Told(capsys, "recipes")
    assert told.code == 130
    assert told.err.strip() == "stopped"
    monkeypatch.setattr(gossamer.recipe, "load", lambda *_: stopped())
    told = Told(capsys, "compress", "--out", "my runs", "--set", "max_drop=1")
    assert told.code == 130
    assert told.err.strip() == (
        "stopped; it goes on with: gossamer compress --out 'my runs' --set max_drop=1"
    )
    assert "Traceback" not in told.err


def test_shells_can_complete_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--install-completion" in Told(capsys, "--help").out
    monkeypatch.setenv("_GOSSAMER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "gossamer compr")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert Told(capsys).out.strip() == "compress"


def test_unknown_commands_and_options_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert Told(capsys, "compres").code == 2
    assert Told(capsys, "compress", "--restrat").code == 2


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    listed = Told(capsys, "recipes").out
    for name in gossamer.recipe.builtin():
        assert name in listed
    assert Told(capsys, "recipes", "prune").out == gossamer.recipe.show("prune")


def test_version_and_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    assert Told(capsys, "--version").out.strip() == gossamer.__version__
    assert Told(capsys, "reproduce", "--list").code == 0


def test_importing_the_package_stays_light() -> None:
    code = "import sys, gossamer; print(*(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "gossamer" in loaded
    assert not {"torch", "numpy", "sklearn", "matplotlib", "rich"} & set(loaded)


def test_the_public_face_is_all_there() -> None:
    for name in gossamer.__all__:
        assert getattr(gossamer, name) is not None
    assert set(gossamer.__all__) <= set(dir(gossamer))
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = gossamer.compres


def test_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    with console() as show:  # no terminal here
        assert isinstance(show, Lines)
        for done in range(1000):
            show.count("work", done, 1000)
        show.say("done")
    assert capsys.readouterr().err == "done\n"
    Reporter().say("nothing")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["own_model", "ten_lines", "bare_loop"])
def test_examples_run(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


def test_a_network_and_a_file_of_inputs_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No recipe, no labels: post-training, and why."""
    import numpy as np

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_alone.py").write_text(
        "import torch\n\n\ndef net():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), "
        "torch.nn.Linear(8, 4))\n"
    )
    np.save("inputs.npy", np.random.default_rng(0).normal(size=(60, 6)).astype("float32"))
    told = Told(capsys, "compress", "mine_alone.py:net", "--data", "inputs.npy", "--out", "r")
    assert told.code == 0
    assert "no recipe was named: post-training" in told.err
    assert "test cosine" in told.out
    both = Told(
        capsys, "compress", "mine_alone.py:net", "-m", "mlp", "--data", "inputs.npy", "--out", "q"
    )
    assert "give one of them" in both.err
