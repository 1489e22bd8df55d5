"""Headers and digests of plans' files, beside Python's own packages."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.errors import FormatError
from gossamer.runtime.plan import sealed

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(), parts, max_size=3),
)


@given(PLAIN, st.sampled_from([None, 1]), st.booleans())
def test_headers_are_read_as_json_reads_them(value: object, indent: int, plain: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=plain)
    assert sealed.parsed(f" \n{text}\t") == json.loads(text) == value


NONE = ["", "{", "[1]]", "[1] 2", '{"a": 1,}', "nul", '"\x01"', "[NaN]", "Infinity", "-Infinity"]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("text", NONE)
def test_what_is_no_json(text: str, missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, "_json", None)
    with pytest.raises(ValueError):  # noqa: PT011 (json's own, or this module's)
        sealed.parsed(text)
    assert sealed.parsed('{"a": [1, null, 2.5]}') == {"a": [1, None, 2.5]}


@pytest.mark.parametrize("size", [0, 1, 1000, 1 << 20])
@pytest.mark.parametrize("missing", [False, True])
def test_digests(size: int, missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, "_sha2", None)
        monkeypatch.setitem(sys.modules, "_sha256", None)
    data = bytes(i % 251 for i in range(size))
    wanted = hashlib.sha256(data).digest()
    assert sealed.sha256([data]) == wanted
    assert sealed.sha256([data[:7], memoryview(data)[7:]]) == wanted


@given(PLAIN, st.lists(st.binary(max_size=200), max_size=4))
def test_files_come_back(value: object, arrays: list[bytes]) -> None:
    data = b"".join(sealed.sealed(b"GSMTESTS", {"v": value}, arrays))
    header, body = sealed.opened(memoryview(data), b"GSMTESTS", "here")
    assert header == {"v": value}
    at = 0
    for array in arrays:
        assert body[at : at + len(array)] == array
        at += len(array) + -len(array) % sealed.LINE
    with pytest.raises(FormatError, match="here is no file of this kind"):
        sealed.opened(memoryview(data), b"GSMOTHER", "here")


def test_files_begin_at_a_cache_line(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for size in (0, 1, 5000):
        path.write_bytes(bytes(range(256)) * 20 + b"x" if size == 5000 else b"y" * size)
        held = sealed.bytes_of(path)
        assert held == path.read_bytes()
        assert held.readonly
