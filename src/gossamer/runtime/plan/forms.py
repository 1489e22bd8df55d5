"""Nests of tensors as plain values: what a network takes and gives, without the tensors.

A form is ``None`` for a tensor, ``["tuple" | "list", forms]``, ``["dict", [[key, form], ...]]``, or
``["value", x]`` for what is no tensor (a number, a string, ``None``). JSON takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gossamer.core.errors import FormatError

__all__ = ["built", "check", "form_of", "leaves"]

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
        return ["dict", [[str(key), form_of(part)] for key, part in value.items()]]
    if isinstance(value, (tuple, list)):
        return ["list" if isinstance(value, list) else "tuple", [form_of(part) for part in value]]
    return ["value", value if isinstance(value, (int, float, str, bool)) else None]


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
                p for p in parts if isinstance(p, list) and len(p) == 2 and isinstance(p[0], str)
            ]
            if len(pairs) == len(parts):
                return sum(check(part, where) for _, part in pairs)
    raise FormatError(f"{where}: {str(form)[:60]!r} is no form of a nest of tensors")
