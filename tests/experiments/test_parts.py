import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gossamer import experiments
from gossamer.cli import main
from gossamer.core.errors import ArgumentError
from gossamer.experiments import Claim, Context, parts

JOBS = """
import os, signal
from pathlib import Path

import torch

def logged(x, log):
    with open(log, "a") as file:
        file.write(f"{x}\\n")
    if x == 13 and not Path(log).with_suffix(".mended").exists():
        raise RuntimeError("unlucky")
    return {"square": x * x}

def half(x, work):
    # halves of a sum; in the middle of job 2, once, the process kills itself
    g = torch.Generator().manual_seed(x)
    total = float(torch.randn(1000, generator=g).sum())
    died = Path(work) / "died"
    if x == 2 and "WORKER" in os.environ and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"x": x, "total": total + float(torch.randn(1000, generator=g).sum())}

def other(kind):
    return {"tuple": (1, 2), "keys": {1: 2}, "tensor": torch.arange(3), "nan": float("nan"),
            "object": Path("x")}[kind]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "jobs_of_a_test.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield importlib.import_module("jobs_of_a_test")
    del sys.modules["jobs_of_a_test"]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    experiments.names()
    monkeypatch.setattr(experiments, "_REGISTRY", dict(experiments._REGISTRY))


def _log(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()]


def _context(path: Path, **given: Any) -> Context:
    return Context(path / "work", (0,), say=lambda _: None, **given)


def test_a_restart_does_only_what_is_left(tmp_path: Path, module: ModuleType) -> None:
    log = tmp_path / "log"
    jobs = [(x, log) for x in (1, 13, 2)]
    with pytest.raises(RuntimeError, match="unlucky"):
        _context(tmp_path).map(module.logged, jobs)
    log.with_suffix(".mended").touch()
    again = _context(tmp_path)
    assert again.map(module.logged, jobs) == [{"square": 1}, {"square": 169}, {"square": 4}]
    assert _log(log) == [1, 13, 13, 2]
    # both sessions at 13 count
    notes = [
        json.loads(p.read_text())["sessions"] for p in (tmp_path / "work").rglob("*.sessions*")
    ]
    assert sorted(map(len, notes)) == [1, 1, 2]
    twice = next(rows for rows in notes if len(rows) == 2)
    part = next(p for p in again.ledger.parts if p.job == "logged 13")
    assert part.seconds == sum(row["seconds"] for row in twice)


def test_what_is_in_the_key(tmp_path: Path, module: ModuleType) -> None:
    log = tmp_path / "log"
    _context(tmp_path).map(module.logged, [(1, log)])
    _context(tmp_path).map(module.logged, [(2, log)])
    _context(tmp_path, quick=True).map(module.logged, [(1, log)])
    assert _log(log) == [1, 2, 1]
    _context(tmp_path).map(module.logged, [(1, log), (2, log)])
    assert _log(log) == [1, 2, 1]
    assert module.__file__ is not None
    Path(module.__file__).write_text(JOBS.replace("x * x", "x * x * x"))
    _context(tmp_path).map(module.logged, [(1, log)])
    assert _log(log) == [1, 2, 1, 1]


def test_the_source_of_an_experiment_is_that_of_what_it_imports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experiments.names()
    read: list[str] = []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: (read.append(p.stem), whole(p))[1])
    parts.source("gossamer.experiments.deconstructing.deconstruct_tickets")
    assert {"deconstruct_tickets", "deconstruct", "lottery", "curves", "lenets", "recipes"} == set(
        read
    )


def test_shared_folders_are_named_by_their_source(tmp_path: Path, module: ModuleType) -> None:
    assert module.__file__ is not None
    context = _context(tmp_path)
    first = context.beside("shared", module.__name__)
    assert first.parent == tmp_path
    assert _context(tmp_path, quick=True).beside("shared", module.__name__) != first
    Path(module.__file__).write_text(JOBS + "\n")
    assert context.beside("shared", module.__name__) != first


def test_a_moved_work_folder_keeps_its_parts(tmp_path: Path, module: ModuleType) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log").touch()
    _context(tmp_path / "a").map(module.logged, [(1, tmp_path / "a" / "log")])
    (tmp_path / "a" / "work").rename(tmp_path / "b" / "work")
    assert _context(tmp_path / "b").map(module.logged, [(1, tmp_path / "b" / "log")]) == [
        {"square": 1}
    ]
    assert _log(tmp_path / "b" / "log") == []


def test_results_come_back_as_they_were(tmp_path: Path, module: ModuleType) -> None:
    jobs = [("tuple",), ("keys",), ("tensor",), ("nan",)]
    for _ in range(2):  # made, then read
        pair, keys, tensor, nan = _context(tmp_path).map(module.other, jobs)
        assert (pair, keys) == ((1, 2), {1: 2})
        assert torch.equal(tensor, torch.arange(3))
        assert math.isnan(nan)
    with pytest.raises(ArgumentError, match="result of other object cannot be kept"):
        _context(tmp_path).map(module.other, [("object",)])
    with pytest.raises(ArgumentError, match="no function of a module"):
        _context(tmp_path).map(lambda: 1, [()])
    with pytest.raises(ArgumentError, match="of type Generator cannot be written down"):
        _context(tmp_path).map(module.other, [(torch.Generator(),)])


def test_any_executor(tmp_path: Path, module: ModuleType) -> None:
    jobs = [(x, str(tmp_path)) for x in range(4)]
    with ThreadPoolExecutor(2) as pool:
        found = _context(tmp_path, executor=pool).map(module.half, jobs)
    assert found == Context(tmp_path / "alone", (0,)).map(module.half, jobs)


@pytest.mark.usefixtures("registry")
def test_the_file_says_what_made_it(
    tmp_path: Path, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    @experiments.experiment(
        "toy", judge=lambda raw: [Claim("toy.1", "n", len(raw["runs"]), ">", 1)]
    )
    def toy(context: Context) -> dict[str, Any]:
        """A toy."""
        return {"runs": context.map(module.logged, [(s, tmp_path / "log") for s in context.seeds])}

    def run(seeds: int) -> dict[str, Any]:
        given: dict[str, Any] = {"out": tmp_path, "work": tmp_path / "w", "workers": 1}
        return json.loads(
            experiments.run("toy", seeds=seeds, say=lambda _: None, **given).read_text()
        )

    for place in (parts, experiments):
        monkeypatch.setattr(place, "commit", lambda: "first+dirty")
    first = run(1)
    assert [set(row) for row in first["parts"]] == [{"job", "seconds"}]
    assert "commits" not in first
    for place in (parts, experiments):
        monkeypatch.setattr(place, "commit", lambda: "second")
    (made,) = (p for p in tmp_path.glob("w/toy-*/parts/*.json") if "sessions" not in p.name)
    old = json.loads(made.read_text())
    made.write_text(json.dumps(old | {"seconds": 2500.0}))
    second = run(2)
    assert second["commit"] == "second"
    assert second["commits"] == ["first+dirty", "second"]
    assert second["parts"][0] == {"job": "logged 0", "seconds": 2500.0, "commits": ["first+dirty"]}
    assert set(second["parts"][1]) == {"job", "seconds"}
    assert second["seconds"] >= 2500 > second["wall"]
    assert [c["holds"] for c in first["claims"] + second["claims"]] == [False, True]


@pytest.mark.usefixtures("registry")
def test_judged_again_from_the_file_alone(tmp_path: Path) -> None:
    bound = [1.0]

    def judge(raw: Any) -> list[Claim]:
        return [Claim("toy.1", "value", raw["value"], "<=", bound[0])]

    @experiments.experiment("toy", judge=judge)
    def toy(context: Context) -> dict[str, Any]:
        """A toy."""
        return {"value": 2.0, "more": [1]}

    given: dict[str, Any] = {"out": tmp_path, "say": lambda _: None}
    path = experiments.run("toy", work=tmp_path / "w", **given)
    before = json.loads(path.read_text())
    bound[0] = 3.0
    experiments.judge("toy", **given)
    after = json.loads(path.read_text())
    assert [before["claims"][0]["holds"], after["claims"][0]["holds"]] == [False, True]
    assert after.pop("judged") == experiments.commit()
    assert list(after) == list(before)
    assert {**after, "claims": 0} == {**before, "claims": 0}

    path.write_text(json.dumps({k: v for k, v in before.items() if k != "value"}))
    with pytest.raises(experiments.GossamerError, match="lacks the figure 'value'"):
        experiments.judge("toy", **given)
    path.unlink()
    with pytest.raises(ArgumentError, match=r"there is no .*toy\.json"):
        experiments.judge("toy", **given)


@contextmanager
def _cluster(folder: Path, code: Path) -> Iterator[str]:
    """A scheduler and two workers of one thread, no nannies: a killed one stays dead."""
    file = folder / "scheduler.json"
    env = {**os.environ, "PYTHONPATH": f"{code}{os.pathsep}{os.pathsep.join(sys.path)}"}
    run = [sys.executable, "-m", "distributed.cli"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = [*run[:2], "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0",
                 "--no-dashboard", "--no-show", "--scheduler-file", str(file)]  # fmt: skip
    worker = [*run[:2], "distributed.cli.dask_worker", "--scheduler-file", str(file), "--no-nanny",
              "--nthreads", "1", "--no-dashboard"]  # fmt: skip
    started = [subprocess.Popen(scheduler, env=env, cwd=folder, **quiet)]
    try:
        while not file.exists():
            assert started[0].poll() is None, "the scheduler ended"
            time.sleep(0.05)
        for i in range(2):
            local = folder / f"worker-{i}"
            local.mkdir()
            started.append(
                subprocess.Popen(
                    [*worker, "--local-directory", str(local)],
                    env={**env, "WORKER": "1"},
                    cwd=local,
                    **quiet,
                )
            )
        yield json.loads(file.read_text())["address"]
    finally:
        for process in started:
            process.kill()
            process.wait()


def _reproduce(*options: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["reproduce", "toy", *options])
    assert end.value.code == 0


@pytest.mark.usefixtures("registry")
def test_a_cluster_that_loses_a_worker_finds_the_same(
    tmp_path: Path, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")

    @experiments.experiment(
        "toy", judge=lambda raw: [Claim("toy.1", "n", len(raw["runs"]), ">", 1)]
    )
    def toy(context: Context) -> dict[str, Any]:
        """A toy."""
        return {"runs": context.map(module.half, [(x, context.work) for x in range(6)])}

    found = {}
    for name in ("local", "cluster"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "local":
            _reproduce("--workers", "1")
        else:
            with _cluster(tmp_path / name, tmp_path / "code") as address:
                _reproduce("--cluster", address)
        data = json.loads(Path("results/toy.json").read_text())
        found[name] = {k: v for k, v in data.items() if k not in ("seconds", "wall")}
        for row in found[name]["parts"]:
            del row["seconds"]
    (folder,) = (tmp_path / "cluster/runs/reproduce").glob("toy-*")
    assert (folder / "died").exists()
    assert found["local"] == found["cluster"]
    notes = [json.loads(p.read_text())["sessions"] for p in folder.glob("parts/*.sessions.json")]
    # which parts a worker that dies has to itself is the scheduler's to say; one began twice
    assert len(notes) == 6
    assert sum(map(len, notes)) > 6


def test_no_scheduler_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("distributed")
    with pytest.raises(SystemExit):
        main(["reproduce", "ttq-exact", "--cluster", "nowhere"])
    assert "no scheduler answers there" in capsys.readouterr().err


ORPHANED = """
import os, sys, time
from pathlib import Path
from gossamer.experiments import Context

def sleep(folder, number):
    Path(folder, f"{os.getpid()}.pid").touch()
    time.sleep(600)
    return {}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    Context(folder / "work", (0,), workers=2, say=lambda _: None).map(
        sleep, [(str(folder), 0), (str(folder), 1)]
    )
"""


def test_workers_of_a_killed_run_end(tmp_path: Path) -> None:
    script = tmp_path / "orphaned.py"
    script.write_text(ORPHANED)
    run = subprocess.Popen([sys.executable, str(script), str(tmp_path)])
    try:
        while run.poll() is None and len(found := list(tmp_path.glob("*.pid"))) < 2:
            time.sleep(0.1)
        assert run.poll() is None
    finally:
        run.kill()
        run.wait()
    for worker in (int(path.stem) for path in found):
        while Path(f"/proc/{worker}").exists():  # ends, or the run of the tests is stopped
            time.sleep(0.1)
