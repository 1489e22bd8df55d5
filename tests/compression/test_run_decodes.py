"""How often a run decodes its file: once to prove it, once for its figures."""

import contextlib
import io
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.compression import fresh, template
from gossamer.datasets import Dataset, Split
from gossamer.pack import Archive, load_into, pack


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str, str]]:
    """Decodings by process, file and tensor; the fresh process runs in this one."""
    found: Counter[tuple[str, str, str]] = Counter()
    place = ["here"]
    real = Archive._decode

    def counted(self: Archive, index: int, entry: Any, *out: Any) -> Any:
        found[place[0], Path(self.path or "").name, entry.name] += 1
        return real(self, index, entry, *out)

    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        place[0], told = "fresh", io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
            patch.setattr(sys, "argv", ["fresh.py", *arguments])
            fresh.main()
        place[0] = "here"
        return subprocess.CompletedProcess(arguments, 0, told.getvalue(), "")

    monkeypatch.setattr(Archive, "_decode", counted)
    monkeypatch.setattr(template, "run", run)
    return found


def test_a_run_decodes_its_file_once_to_prove_it_and_once_for_its_figures(
    tmp_path: Path, decoded: Counter[tuple[str, str, str]]
) -> None:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    split = Split(x, torch.arange(60) % 3)
    recipe = {
        "name": "t",
        "max_drop": 1,
        "stages": [{"prune": {"density": 0.5}}, "pack", {"evaluate": {"latency": False}}],
    }
    net = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 3))
    own = Dataset("own", split, split, split, 3)
    gossamer.compress(net, own, recipe=recipe, out=tmp_path / "r", progress=False)
    names = list(net.state_dict())
    assert decoded == {
        (where, file, name): 1
        for where, file in (
            ("here", "untouched.gsm"),
            ("fresh", "model.gsm"),
            ("here", "model.gsm"),
        )
        for name in names
    }


@pytest.mark.parametrize("profile", ["smallest", "fast", "huffman"])
def test_listing_decodes_no_code_book_and_nothing_twice(
    tmp_path: Path, decoded: Counter[tuple[str, str, str]], profile: str
) -> None:
    w = torch.round(torch.randn(90, 90, generator=torch.Generator().manual_seed(0)))
    state = {"w": w, "small": torch.arange(3.0), "tied": w}
    pack(state, tmp_path / "net.gsm", profile=profile).close()
    for keep in (False, True):
        decoded.clear()
        with Archive(tmp_path / "net.gsm", keep=keep) as archive:
            assert not decoded  # opening reads the header alone
            assert archive.rows() == archive.rows()
            assert sum(archive.parts().values()) == archive.file_bytes
            assert decoded == {("here", "net.gsm", "small"): 1}
            if keep:
                assert torch.equal(archive["w"], w)
                holder = nn.ParameterDict({n: torch.zeros_like(t) for n, t in state.items()})
                load_into(archive, holder)
                assert torch.equal(holder["w"], w)
                assert set(decoded.values()) == {1}
            else:
                assert torch.equal(archive["small"], state["small"])
                assert set(decoded) == {("here", "net.gsm", "small")}
