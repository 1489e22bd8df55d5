"""The examples of the trainers: killed and started again, they leave the unbroken run's bytes."""

import importlib
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launched import TWO

ROOT = Path(__file__).resolve().parents[2]


def run(
    example: str, out: Path, *options: str, python: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    launcher = ROOT / "tests" / "no_torchvision.py"
    return subprocess.run(
        [sys.executable, *python, launcher, ROOT / "examples" / example, out, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.filterwarnings("ignore")  # of other people's
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("package", "example", "stop", "packed"),
    [
        ("transformers", "hf_trainer.py", "40", "packed/model.gsm"),
        ("lightning", "lightning_callback.py", "100", "model.gsm"),
        ("accelerate", "accelerate_loop.py", "100", "model.gsm"),
    ],
)
def test_killed_and_resumed(
    package: str,
    example: str,
    stop: str,
    packed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(package)
    killed = run(example, tmp_path / "again", "--stop-after-step", stop)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    assert not (tmp_path / "again" / packed).exists()
    again = run(example, tmp_path / "again")
    assert again.returncode == 0, again.stdout + again.stderr
    # the unbroken run in this process, which has imported the package by now
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # Lightning leaves it behind
    monkeypatch.setattr(sys, "argv", [example, str(tmp_path / "whole")])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    told = capsys.readouterr().out.splitlines()[-1]
    assert again.stdout.splitlines()[-1] == told
    assert float(told.split()[1].rstrip(",")) > 0.85
    assert (tmp_path / "again" / packed).read_bytes() == (tmp_path / "whole" / packed).read_bytes()


@pytest.mark.slow
def test_killed_and_resumed_on_two_workers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    again, whole = tmp_path / "again", tmp_path / "whole"
    killed = run("accelerate_loop.py", again, "--stop-after-step", "60", python=TWO)
    assert killed.returncode != 0
    assert not (again / "model.gsm").exists()
    assert (again / "epoch-2").exists()
    for out in (again, whole):
        done = run("accelerate_loop.py", out, python=TWO)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (again / "model.gsm").read_bytes() == (whole / "model.gsm").read_bytes()


def test_without_the_packages_the_error_names_the_extra() -> None:
    code = """
import sys
for name in ("transformers", "lightning", "accelerate"):
    sys.modules[name] = None
import gossamer.integrations.transformers as a, gossamer.integrations.lightning as b
import gossamer.integrations.accelerate as c
for extra, make in (
    ("transformers", lambda: a.MethodCallback(None, [])),
    ("transformers", lambda: a.save_pretrained(None, ".")),
    ("lightning", lambda: b.MethodCallback([])),
    ("accelerate", lambda: c.attach(None, [], None, None)),
):
    try:
        make()
    except a.GossamerError as e:
        assert f"pip install 'gossamer[{extra}]'" in str(e), e
    else:
        raise SystemExit(extra)
"""
    code = code.replace("a.GossamerError", "__import__('gossamer').GossamerError")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_importing_the_library_imports_none_of_them() -> None:
    importlib.import_module("gossamer.integrations")
    code = (
        "import sys, gossamer; [getattr(gossamer, n) for n in gossamer._table()]; "
        "assert not {'transformers', 'lightning', 'accelerate'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
