"""Tables: name -> what it stands for, each written once and read by checks, docs and tests.

Another package joins by calling :meth:`Table.register` in a module of its own, and names that
module as an entry point, so that recipes and the command line know it::

    [project.entry-points."gossamer.plugins"]
    mine = "my_package.scores"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import TypeVar

from gossamer.core.errors import ArgumentError

__all__ = ["GROUP", "Table", "near", "plugins"]

T = TypeVar("T")
GROUP = "gossamer.plugins"
"""The entry points that are imported for what they register."""


@cache
def plugins() -> tuple[str, ...]:
    """Import every module of :data:`GROUP`, once; their names.

    Raises :class:`ArgumentError` naming one that cannot be imported.
    """
    from importlib.metadata import entry_points  # it takes as long to import as numpy does

    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    for entry in found:
        try:
            entry.load()
        except Exception as e:  # somebody else's module may raise anything
            raise ArgumentError(
                f"plugin {entry.name!r} ({entry.value}) cannot be loaded: "
                f"{type(e).__name__}: {e}; repair or uninstall it"
            ) from e
    return tuple(entry.name for entry in found)


def near(word: object, allowed: Iterable[str]) -> str:
    """``; did you mean 'x'?`` where one of the allowed words is close, else nothing."""
    import difflib  # for messages alone

    close = difflib.get_close_matches(str(word), list(allowed), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


class Table(Mapping[str, T]):
    """Name -> entry, in the order written, those of :func:`plugins` behind.

    Args:
        kind: what an entry is called in messages.
        entries: the library's own.
        changed: called after each :meth:`register`.

    >>> table = Table("fruit", {"apple": 1})
    >>> table.register("pear", 2)
    2
    >>> list(table), table["pear"]
    (['apple', 'pear'], 2)
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, T] | None = None,
        *,
        changed: Callable[[], None] | None = None,
    ) -> None:
        self.kind = kind
        self._entries: dict[str, T] = dict(entries or {})
        self._changed = changed

    def register(self, name: str, entry: T) -> T:
        """Add an entry; returns it.

        Raises :class:`ArgumentError` for a name that is taken.
        """
        if self._entries.get(name, entry) is not entry:
            raise ArgumentError(f"{self.kind} {name!r} is there already; choose another name")
        self._entries[name] = entry
        if self._changed is not None:
            self._changed()
        return entry

    def __getitem__(self, name: str) -> T:
        """The entry; :class:`ArgumentError` for a name that is not there, with all that are."""
        if name not in self._entries:
            plugins()
        if name not in self._entries:
            raise ArgumentError(
                f"{self.kind} {name!r} is not one of {', '.join(self._entries)}"
                + near(name, self._entries)
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._entries:
            plugins()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        plugins()
        return iter(list(self._entries))

    def __len__(self) -> int:
        plugins()
        return len(self._entries)
