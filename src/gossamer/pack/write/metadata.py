"""A caller's metadata as JSON text, or an error: what a file gives back is what was put in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gossamer.core.errors import ArgumentError

__all__ = ["json_text"]


def json_text(
    metadata: Mapping[str, Any], *, around: Mapping[str, Any] | None = None, ensure_ascii: bool
) -> str:
    """The JSON object of ``metadata``; with ``around``, that object, under its key ``metadata``.

    Raises :class:`ArgumentError` for what JSON cannot hold. A key that is no string is refused:
    ``json`` would write 1 as "1", and of {1: ..., "1": ...} a reader would get one entry.

    >>> json_text({"epochs": [1, 2]}, ensure_ascii=True)
    '{"epochs":[1,2]}'
    """
    try:
        whole = dict(metadata)
        _check_keys(whole)
        text = json.dumps(
            whole if around is None else {**around, "metadata": whole},
            separators=(",", ":"),
            ensure_ascii=ensure_ascii,
            allow_nan=False,
        )
        text.encode()
    except (TypeError, ValueError) as e:
        raise ArgumentError(f"metadata is not JSON: {e}; use strings, numbers, lists") from None
    except RecursionError:
        raise ArgumentError("metadata is nested too deeply, or holds itself; flatten it") from None
    return text


def _check_keys(value: object) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no string")
            _check_keys(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _check_keys(part)
