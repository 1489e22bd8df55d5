"""Packages that only an adapter needs, and the sentence where one of them is not there."""

from __future__ import annotations

from typing import Any, NoReturn

from gossamer.core.errors import GossamerError

__all__ = ["absent", "missing"]


def missing(extra: str, cause: BaseException) -> NoReturn:
    """Raise :class:`GossamerError` that names the extra to install."""
    raise GossamerError(
        f"gossamer.integrations.{extra} needs a package that cannot be imported ({cause}); "
        f"pip install 'gossamer[{extra}]'"
    ) from cause


def absent(extra: str, cause: BaseException) -> Any:
    """What stands for a base class that is not there: making one of its kind says what to install.

    So the module can be imported, read and documented without the package.
    """

    class Absent:
        def __new__(cls, *args: Any, **options: Any) -> Any:
            missing(extra, cause)

    return Absent
