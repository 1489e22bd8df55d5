"""Regular expressions in bounded time: as Python's own, and an answer where that finds none."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.regular import Regular

NAMES = [
    "".join(c) for n in range(6) for c in itertools.product("ab.", repeat=n) if n < 4 or c[0] == "a"
]


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "a",
        "a.b",
        "a\\.b",
        "[ab]+",
        "[^a]*",
        "(a|ab)(b|.b)?",
        "a{2,3}b?",
        "(a?){2}",
        "(?:ab|a)*?b",
        "(a*)*b",
        "(a*b?)*",
        "^a.*b$",
        "\\Aa+\\Z",
        "(?!a)..",
        "(?!.*b$)[ab]*",
        "(?=.b)a.*",
        "\\w+",
        "\\W|\\d|\\S",
        "[\\w.]{3}",
        "[a-b]{0}",
        "(|a)+b",
        "(?P<x>a|b)*",
        "()*",
        "(?=)a",
        "(?!)a",
        "a{,2}",
        "((a|b){2}){2}",
    ],
)
def test_it_is_python_s_own(pattern: str) -> None:
    expression = Regular(pattern)
    for name in NAMES:
        assert expression.matches(name) == bool(re.fullmatch(pattern, name)), name


PARTS = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", "[^b]", "\\w", "\\.", "(?=a)", "(?!b)", ""]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{2,}", "*?"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
    ),
    max_leaves=6,
)


@given(PARTS, st.text("ab.", max_size=5))
def test_it_is_python_s_own_whatever_the_pattern(pattern: str, name: str) -> None:
    assert Regular(pattern).matches(name) == bool(re.fullmatch(pattern, name))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+!",
        "(a|a)*!",
        "(a|aa)+!",
        "(.*)*!",
        "(\\w+\\.?)+!",
        "(a|a)" * 30 + "!",
        ".*.*.*.*.*.*.*.*.*.*!",
        "(((((a*)*)*)*)*)*!",
        "(a?){90}" * 20 + "!",
        "(?:a{1,60000}){1,60000}!",
        "(?!(a+)+!)(a+)+!",
    ],
)
def test_hostile_patterns_get_an_answer(pattern: str) -> None:
    # Python's own matcher would try 2^300 ways, or 300^10.
    parts = 0

    class Counted(str):
        def __getitem__(self, at: object) -> str:
            nonlocal parts
            parts += 1
            return str.__getitem__(self, at)  # type: ignore[index]

    assert not Regular(pattern).matches(Counted("a" * 60))
    assert parts <= 60 * len(pattern)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "no regular expression: missing"),
        ("a{99999999999}", "no regular expression"),
        ("a" * 201, "has 201 characters, allowed are 200"),
        ("(a)\\1", "a part of kind groupref"),
        ("(?>a)", "a part of kind atomic group"),
        ("a*+", "a part of kind possessive repeat"),
        ("(?<=a)b", "a part of kind assert"),
        ("\\ba", "a part of kind at"),
        ("(?i)a", "flags"),
        ("((?i:a)|b)", "a part of kind subpattern"),
    ],
)
def test_what_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Regular(pattern)
    with pytest.raises(ArgumentError, match="layer pattern 're:"):
        names.select(["fc.weight"], "re:" + pattern)
