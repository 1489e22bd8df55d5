"""Processes forked from a template are as fresh as an interpreter that is started."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from gossamer import nets
from gossamer.compression import fresh, template
from gossamer.pack import pack

both = pytest.mark.parametrize("forks", [True, False])

ASKED = """
import os, sys
value = 3.0
def make():
    ours = "template_tests_only" in sys.modules
    here = os.path.isfile("here")
    raise ValueError(f"{os.environ['ASKED']} {here} {len(sys.argv)} {value} {ours}")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return pack(nets.build("mlp-64-8-8-10", seed=0), tmp_path / "a.gsm").path


@both
def test_a_job_has_what_the_asker_has_and_no_module_of_it(
    forks: bool, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "_FORKS", forks)
    monkeypatch.setitem(sys.modules, "template_tests_only", template)
    Path(tmp_path, "asked.py").write_text(ASKED)
    Path(tmp_path, "here").touch()
    for value in ("one", "two"):
        monkeypatch.setenv("ASKED", value)
        monkeypatch.chdir(tmp_path)
        done = template.run([str(file), "--model", "asked.py:make"])
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["unbuilt"].endswith(f"ValueError: {value} True 4 3.0 False")
        # a module of the asker's may change between two jobs
        Path(tmp_path, "asked.py").write_text(ASKED.replace("{value} ", "3.0 "))


@both
def test_status_and_words_come_back(
    forks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "_FORKS", forks)
    done = template.run(["--help"])
    assert done.returncode == 0
    assert done.stdout.startswith("usage: fresh.py")
    done = template.run([])
    assert done.returncode == 2
    assert "required: path" in done.stderr
    done = template.run([str(tmp_path / "none.gsm")])
    assert done.returncode == 1
    assert "none.gsm" in done.stderr.splitlines()[-1]


def test_both_ways_give_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for forks in (True, False):
        monkeypatch.setattr(template, "_FORKS", forks)
        found.append(fresh.check(file, "mlp-64-8-8-10", "digits", model_options={"seed": 1}))
    assert found[0] == found[1]


@pytest.mark.skipif(not template._FORKS, reason="no template on this system")
def test_a_template_that_was_killed_fails_nobody() -> None:
    assert template.run(["--help"]).returncode == 0
    first = template._template
    assert first is not None
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    for _ in range(2):  # by an interpreter, and by a new template
        assert template.run(["--help"]).returncode == 0
    assert template._template is not None
    assert template._template.process.pid != first.process.pid


@pytest.mark.skipif(not template._FORKS, reason="no template on this system")
def test_interrupted_it_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert template.run(["--help"]).returncode == 0
    made = template._template
    assert made is not None

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(template.json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        template.run(["--help"])
    assert made.process.returncode == -signal.SIGKILL
    assert template._template is None
