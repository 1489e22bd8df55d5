"""A stage's layer patterns against a network: resolved, and checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError

__all__ = ["PatternError", "check_setting", "chosen", "per_layer", "trying"]

T = TypeVar("T")


class PatternError(ArgumentError):
    """A pattern that does not fit the network; ``key``: where in the stage's settings it is."""

    key: tuple[str, ...] = ()


@contextmanager
def trying(*key: str) -> Iterator[None]:
    """Errors within are :class:`PatternError` of this key."""
    try:
        yield
    except ArgumentError as e:
        error = PatternError(str(e))
        error.key = key
        raise error from e


def chosen(
    model: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
) -> dict[str, nn.Parameter]:
    """The weights that a stage acts on: clean name -> parameter.

    Raises :class:`ArgumentError` for a pattern that matches nothing, or when nothing is left.
    """
    found = names.weights(model, include=include, exclude=exclude)
    if not found:
        everything = names.parameters(model)
        raise ArgumentError(
            "no weight is left to act on; parameters are: " + ", ".join([*everything][:40])
        )
    return found


def per_layer(model: nn.Module, weights: Iterable[str], value: T | Mapping[str, T]) -> dict[str, T]:
    """A value for each weight: one for all, or by pattern, of which the last that matches wins.

    A weight that no pattern names is left out (:func:`gossamer.core.names.select`).

    Raises :class:`ArgumentError` for a pattern that matches nothing, naming the layers.
    """
    pool = list(weights)
    if not isinstance(value, Mapping):
        return dict.fromkeys(pool, value)
    found: dict[str, T] = {}
    for pattern, one in value.items():
        found.update(dict.fromkeys(names.select(pool, pattern, model), one))
    return {name: found[name] for name in pool if name in found}


def check_setting(model: nn.Module, weights: Iterable[str], key: str, value: object) -> None:
    """Try the patterns of a setting that is given by layer.

    Raises :class:`PatternError` for one that matches nothing.
    """
    for pattern in value if isinstance(value, Mapping) else ():
        with trying(key, pattern):
            names.select(list(weights), pattern, model)
