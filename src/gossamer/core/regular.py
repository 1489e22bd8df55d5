r"""Regular expressions of strangers, matched in a time that no expression can make long.

Python's matcher tries one way after the other, of which ``(a+)+b`` has as many as a name has
subsets. Here the places at which each part of an expression can end are kept as a set, so that
each part is matched once from each place (Thompson, "Regular expression search algorithm", CACM
1968). What a set cannot express (back references, possessive and atomic parts, looking behind,
flags) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from gossamer.core.errors import ArgumentError

__all__ = ["Regular"]

_LONGEST = 200
_CHARACTERS = {sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN}
_PLACES = {sre.AT_BEGINNING, sre.AT_BEGINNING_STRING, sre.AT_END, sre.AT_END_STRING}
_CLASSES = {
    sre.CATEGORY_DIGIT: r"\d",
    sre.CATEGORY_NOT_DIGIT: r"\D",
    sre.CATEGORY_SPACE: r"\s",
    sre.CATEGORY_NOT_SPACE: r"\S",
    sre.CATEGORY_WORD: r"\w",
    sre.CATEGORY_NOT_WORD: r"\W",
}


class Regular:
    """A regular expression of Python's, for whole names of a line each.

    Raises :class:`ArgumentError` for what is none, is longer than 200 characters, or has parts
    that cannot be matched in bounded time.

    >>> Regular(r"(?!fc)(\\w+\\.)*weight").matches("layer1.0.weight")
    True
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > _LONGEST:
            raise ArgumentError(
                f"the regular expression {pattern[:40]!r}... has {len(pattern)} characters, "
                f"allowed are {_LONGEST}; give several patterns"
            )
        try:
            self._tree = _parser.parse(pattern)
        except (re.error, OverflowError) as e:
            raise ArgumentError(f"{pattern!r} is no regular expression: {e}") from e
        what = _flags(self._tree.state.flags & ~re.UNICODE) or _beyond(self._tree)
        if what:
            raise ArgumentError(
                f"the regular expression {pattern!r} has {what}, which is not matched in bounded "
                "time; use characters, classes, groups, |, repetitions and (?=...), (?!...) alone"
            )

    def matches(self, name: str) -> bool:
        """Whether all of ``name`` matches."""
        return len(name) in _Match(name).ends(self._tree, {0})


def _flags(flags: int) -> str:
    return f"flags ({re.RegexFlag(flags)!r})" if flags else ""


def _beyond(tree: Iterable[tuple[Any, Any]]) -> str:
    """What of a tree is not handled, in words; empty if nothing is."""
    for op, value in tree:
        inner: list[Any] = []
        if op is sre.BRANCH:
            inner = value[1]
        elif op is sre.SUBPATTERN and not value[1] and not value[2]:
            inner = [value[3]]
        elif op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            inner = [value[2]]
        elif op in (sre.ASSERT, sre.ASSERT_NOT) and value[0] > 0:
            inner = [value[1]]
        elif op not in _CHARACTERS and not (op is sre.AT and value in _PLACES):
            return "a part of kind " + str(op).lower().replace("_", " ")
        what = next(filter(None, map(_beyond, inner)), "")
        if what:
            return what
    return ""


class _Match:
    """Where the parts of an expression can end in one name; each part from each place once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: dict[tuple[int, int], Set[int]] = {}

    def ends(self, tree: Any, starts: Set[int]) -> Set[int]:
        """Where the parts in a row can end."""
        for part in tree:
            starts = set().union(*(self.part(part, at) for at in starts))
        return starts

    def part(self, part: tuple[Any, Any], at: int) -> Set[int]:
        """Where one part, begun at ``at``, can end."""
        key = (id(part), at)
        if key not in self.known:
            self.known[key] = self._part(*part, at)
        return self.known[key]

    def _part(self, op: Any, value: Any, at: int) -> Set[int]:
        if op is sre.BRANCH:
            return set().union(*(self.ends(tree, {at}) for tree in value[1]))
        if op is sre.SUBPATTERN:
            return self.ends(value[3], {at})
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return self._repeated(value[0], value[1], value[2], at)
        if op in (sre.ASSERT, sre.ASSERT_NOT):
            return {at} if bool(self.ends(value[1], {at})) == (op is sre.ASSERT) else set()
        if op is sre.AT:
            begins = value in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING)
            return {at} if at == (0 if begins else len(self.name)) else set()
        here = at < len(self.name) and _holds(op, value, self.name[at])
        return {at + 1} if here else set()

    def _repeated(self, least: int, most: int, tree: Any, at: int) -> Set[int]:
        reached: Set[int] = {at}
        for _ in range(int(least)):
            further = self.ends(tree, reached)
            if further == reached:  # and so it stays, however often it is repeated
                break
            reached = further
        found, times = set(reached), int(least)
        while reached and times < int(most):
            reached = self.ends(tree, reached) - found
            found |= reached
            times += 1
        return found


def _holds(op: Any, value: Any, character: str) -> bool:
    """Whether a character is of a class."""
    code = ord(character)
    if op is sre.LITERAL:
        return code == value
    if op is sre.NOT_LITERAL:
        return code != value
    if op is sre.ANY:
        return character != "\n"
    if op is sre.RANGE:
        return value[0] <= code <= value[1]
    if op is sre.CATEGORY:
        return re.fullmatch(_CLASSES[value], character) is not None
    negated = value[0][0] is sre.NEGATE
    return negated != any(_holds(kind, of, character) for kind, of in value[negated:])
