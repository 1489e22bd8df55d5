"""The public face: short to look at, usable after one import, documented whole."""

from __future__ import annotations

import io
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import gossamer
from gossamer.compression import progress
from gossamer.compression.progress import Lines, Reporter, shown

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> gossamer.Result:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    recipe = {"name": "x", "stages": [{"evaluate": {"latency": False}}]}
    out = tmp_path_factory.mktemp("public") / "<run> & more"
    return gossamer.compress(net, "digits", recipe=recipe, out=out)


def test_a_result_is_short_to_look_at(result: gossamer.Result) -> None:
    told = repr(result)
    assert len(told) < 400
    assert "\n" not in told
    for part in (
        str(result.out),
        f"{result.bytes:,} bytes",
        f"{100 * result.accuracy_after:.2f} %",
    ):
        assert part in told
    page = result._repr_html_()
    assert len(page) < 800
    assert "&lt;run&gt; &amp; more" in page

    class Text(HTMLParser):
        pieces = ""

        def handle_data(self, data: str) -> None:
            self.pieces += data

    text = Text()
    text.feed(page)
    assert str(result.file) in text.pieces
    assert str(result.report) in text.pieces


def test_compress_is_silent_where_nobody_looks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    recipe = {"name": "x", "stages": [{"evaluate": {"latency": False}}]}
    gossamer.compress(net, "digits", recipe=recipe, out=tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    gossamer.compress(net, "digits", recipe=recipe, out=tmp_path / "b", progress=True)
    assert "decode" in capfd.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_who_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with shown(None) as reporter:
        assert type(reporter) is Reporter
    with shown(True) as reporter:
        assert isinstance(reporter, Lines)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with shown(None) as reporter:
        assert isinstance(reporter, progress._Bars)
        reporter.say("a line")
    with shown(False) as reporter:
        assert type(reporter) is Reporter
    mine = Lines(io.StringIO())
    with shown(mine) as reporter:
        assert reporter is mine


def test_a_notebook_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class ZMQInteractiveShell:
        pass

    class IPython:
        get_ipython = staticmethod(ZMQInteractiveShell)

    monkeypatch.setitem(sys.modules, "IPython", IPython)
    with shown(None) as reporter:
        assert isinstance(reporter, Lines)
        assert reporter.file is sys.stdout


def test_one_import_makes_all_of_it_usable() -> None:
    code = (
        "import gossamer, sys; assert 'torch' not in sys.modules; "
        "assert len(gossamer.datasets.load('digits').test) > 100; "
        "[getattr(gossamer, n) for n in gossamer._table()]; "
        "assert {'datasets', 'compress'} <= set(dir(gossamer))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'dataset'"):
        gossamer.dataset  # noqa: B018


def test_the_reference_holds_every_public_name() -> None:
    derived = runpy.run_path(str(ROOT / "tools" / "docs_tree.py"))["reference"]()
    pages = [(ROOT / "docs" / "reference.md").read_text(), *derived.values()]
    documented = re.findall(r"^::: (gossamer[\w.]*)$", "\n".join(pages), re.M)
    assert len(documented) == len(set(documented))
    names: set[int] = set()
    for path in documented:
        try:
            module = import_module(path)
        except ModuleNotFoundError as e:
            if e.name == "triton":  # not on every machine
                continue
            home, _, name = path.rpartition(".")
            names.add(id(getattr(import_module(home), name)))
        else:
            names |= {id(getattr(module, name)) for name in module.__all__}
    missing = [n for n in gossamer.__all__ if id(getattr(gossamer, n)) not in names]
    assert missing == []


def test_public_names_are_documented() -> None:
    bare = [
        name for name in gossamer.__all__ if not (getattr(gossamer, name).__doc__ or "").strip()
    ]
    assert bare == []
