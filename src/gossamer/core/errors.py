"""Named errors. Every message names the argument, its value, what is allowed and the fix."""

from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "DatasetError",
    "ExchangeError",
    "FormatError",
    "GossamerError",
    "RecipeError",
    "one_of",
]


class GossamerError(Exception):
    """Base of all errors raised on purpose by this library."""


class ArgumentError(GossamerError, ValueError):
    """An argument is outside what is allowed."""


class FormatError(GossamerError, ValueError):
    """A file is truncated, corrupt, hostile or of another format; nothing was loaded."""


class RecipeError(GossamerError, ValueError):
    """A recipe does not validate; the message points at the key and the allowed values."""


class DatasetError(GossamerError, RuntimeError):
    """A dataset is missing or corrupt; the message says where it was looked for."""


class ExchangeError(GossamerError, RuntimeError):
    """Workers could not exchange: one is killed, hangs, failed, or holds something else."""


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is one of the ``allowed`` names."""
    allowed = list(allowed)
    if value not in allowed:
        raise ArgumentError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
