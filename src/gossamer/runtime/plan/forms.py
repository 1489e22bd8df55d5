"""Nests of tensors as plain values: what a network takes and gives, without the tensors.

A form is ``None`` for a tensor, ``["tuple" | "list", forms]``, ``["dict", [[key, form], ...]]``, or
``["value", x]`` for what is no tensor (a number, a string, ``None``). JSON takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gossamer.core.errors import ArgumentError, FormatError

__all__ = ["built", "check", "form_of", "holds", "leaves", "taken", "values"]

_KINDS = {"tuple": tuple, "list": list}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def form_of(value: Any) -> Any:
    """The form of a nest; what is neither a nest nor plain becomes ``None`` in it.

    >>> form_of((np.zeros(2), {"a": np.zeros(1), "n": 3}))
    ['tuple', [None, ['dict', [['a', None], ['n', ['value', 3]]]]]]
    """
    if _is_tensor(value):
        return None
    if isinstance(value, Mapping):
        return ["dict", [[_key(key), form_of(part)] for key, part in value.items()]]
    if isinstance(value, (tuple, list)):
        return ["list" if isinstance(value, list) else "tuple", [form_of(part) for part in value]]
    return ["value", value if isinstance(value, (int, float, str, bool)) else None]


def _key(key: Any) -> Any:
    return key if type(key) is int else str(key)


def values(form: Any) -> list[Any]:
    """What is no tensor in a form, in order.

    >>> values(["tuple", [None, ["value", 2]]])
    [2]
    """
    if form is None:
        return []
    kind, parts = form
    if kind == "value":
        return [parts]
    return [v for part in parts for v in values(part[1] if kind == "dict" else part)]


def holds(form: Any) -> bool:
    """Whether there is a tensor in a form."""
    if form is None:
        return True
    kind, parts = form
    return kind != "value" and any(holds(part[1] if kind == "dict" else part) for part in parts)


def taken(form: Any, value: Any, where: str = "the input") -> list[Any]:
    """The tensors of a nest of this form, in the form's order.

    A mapping may have its keys in any order, and what holds no tensor may be left out at an end.

    Raises :class:`ArgumentError` where the nest is another, or what is no tensor in it has another
    value: a plan keeps the example's.

    >>> taken(["dict", [["a", None], ["b", ["value", 3]]]], {"b": 3, "a": np.zeros(1)})
    [array([0.])]
    """
    if form is None:
        if _is_tensor(value):
            return [value]
        raise ArgumentError(f"{where} is {_shown(value)}; the plan takes a tensor or an array")
    kind, parts = form
    if kind == "value":
        _check_value(parts, value, where)
        return []
    if kind == "dict":
        return _of_mapping(parts, value, where)
    if not isinstance(value, (tuple, list)):
        raise ArgumentError(f"{where} is {_shown(value)}; the plan takes {len(parts)} in a {kind}")
    if len(value) > len(parts) or any(map(holds, parts[len(value) :])):
        raise ArgumentError(f"{where} holds {len(value)} values; the plan takes {len(parts)}")
    found: list[Any] = []
    for number, (part, one) in enumerate(zip(parts, value, strict=False)):
        if part is None and _is_tensor(one):
            found.append(one)
        else:
            found += taken(part, one, f"{where} [{number}]")
    return found


def _of_mapping(parts: Any, value: Any, where: str) -> list[Any]:
    keys = [key for key, _ in parts]
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{where} is {_shown(value)}; the plan takes a mapping of {keys}")
    given = {_key(key): part for key, part in value.items()}
    missing = [key for key, part in parts if key not in given and holds(part)]
    if missing or set(given) - set(keys):
        raise ArgumentError(f"{where} has the keys {list(given)}; the plan takes {keys}")
    return [leaf for key, part in parts if key in given
            for leaf in taken(part, given[key], f"{where} [{key!r}]")]  # fmt: skip


def _check_value(want: Any, value: Any, where: str) -> None:
    plain = value is None or isinstance(value, (int, float, str, bool))
    if want is None and not plain and not _is_tensor(value):
        return  # an object, as the example's may have been: forms do not hold them
    if _is_tensor(value) or value != want or isinstance(value, bool) != isinstance(want, bool):
        raise ArgumentError(
            f"{where} is {_shown(value)}; the plan is for {want!r}, its example's: compile one for "
            "each value of what is no tensor"
        )


def _shown(value: Any) -> str:
    if _is_tensor(value):
        return f"a tensor of {tuple(value.shape)}"
    plain = value is None or isinstance(value, (int, float, str, bool))
    return repr(value)[:60] if plain else f"of type {type(value).__name__}"


def leaves(value: Any) -> list[Any]:
    """The arrays and tensors of a nest, in order."""
    if _is_tensor(value):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (Mapping, tuple, list)):
        return [leaf for part in parts for leaf in leaves(part)]
    return []


def built(form: Any, found: Sequence[Any]) -> Any:
    """The nest of a form with these in the places of its tensors.

    >>> built(["list", [None, ["value", 2]]], ["x"])
    ['x', 2]
    """
    return _built(form, iter(found))


def _built(form: Any, left: Iterator[Any]) -> Any:
    if form is None:
        return next(left)
    kind, parts = form
    if kind == "value":
        return parts
    if kind == "dict":
        return {key: _built(part, left) for key, part in parts}
    return _KINDS[kind](_built(part, left) for part in parts)


def check(form: Any, where: str) -> int:
    """How many tensors a form has; :class:`FormatError` for what is none."""
    if form is None:
        return 1
    if isinstance(form, list) and len(form) == 2:
        kind, parts = form
        if kind == "value" and (parts is None or isinstance(parts, (int, float, str, bool))):
            return 0
        if kind in _KINDS and isinstance(parts, list):
            return sum(check(part, where) for part in parts)
        if kind == "dict" and isinstance(parts, list):
            pairs = [
                p for p in parts if isinstance(p, list) and len(p) == 2 and type(p[0]) in (str, int)
            ]
            if len(pairs) == len(parts):
                return sum(check(part, where) for _, part in pairs)
    raise FormatError(f"{where}: {str(form)[:60]!r} is no form of a nest of tensors")
