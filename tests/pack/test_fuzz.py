"""The longer jobs beside the tests can be started, and look where they should."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch

import gossamer.pack.coders.context_reference
import gossamer.pack.coders.limits
import gossamer.pack.read.archive
from gossamer.pack import pack_bytes, unpack

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fuzzer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The fuzzing program, with a stand-in for the engine that it imports."""
    monkeypatch.setitem(sys.modules, "atheris", ModuleType("atheris"))
    spec = importlib.util.spec_from_file_location("fuzz_pack", ROOT / "fuzz" / "fuzz_pack.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_function_of_the_reader_is_traced_once(fuzzer: Any) -> None:
    traced: list[FunctionType] = []
    assert fuzzer.instrument(traced.append) == len(traced) == len({id(f) for f in traced})
    assert all(f.__module__.split(".")[:2] == ["gossamer", "pack"] for f in traced)
    for wanted in (
        gossamer.pack.read.archive.unpack,
        gossamer.pack.read.archive.Archive._section,
        gossamer.pack.read.archive.Archive.metadata.fget,  # a property
        gossamer.pack.coders.context_reference._curves.__wrapped__,  # cached
        gossamer.pack.coders.limits.Reader.varint,
    ):
        assert wanted in traced
    assert len(traced) > 150


def test_the_fuzzer_reads_a_whole_file_and_a_damaged_one(fuzzer: Any) -> None:
    data = pack_bytes({"w": torch.arange(6.0)}, metadata={"a": 1})
    damaged = bytearray(data)
    damaged[-1] ^= 1
    assert unpack(fuzzer.mended(bytes(damaged)))["w"].tolist() == [0, 1, 2, 3, 4, 5]
    fuzzer.one(data)
    fuzzer.one(data[:-3])
    fuzzer.one(b"")


def test_every_target_that_is_declared_has_a_rule() -> None:
    text = (ROOT / "Makefile").read_text()
    declared = re.search(r"^\.PHONY: (.*)$", text, re.M)
    assert declared is not None
    for target in declared[1].split():
        assert re.search(rf"^{target}:", text, re.M), f"make {target} has no rule"
    assert re.search(r"^fuzz:.*fuzz\.stamp\n(?:\t.*\n)*\t.*fuzz_pack\.py.*FUZZ_SECONDS", text, re.M)
