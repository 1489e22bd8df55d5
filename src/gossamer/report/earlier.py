"""run.json of earlier versions, which knew accuracy alone, under the keys of this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["renamed"]

_OLD = {
    "accuracy": "score",
    "validation_accuracy": "score",
    "float_accuracy": "float_score",
}
"""Keys of earlier versions, which knew no other score, where they are not the evaluation's own."""


def renamed(run: Mapping[str, Any]) -> dict[str, Any]:
    """The figures under the keys of this version."""
    found = dict(run)
    if "accuracy" in found:
        found["evaluation"] = found.pop("accuracy")
        if isinstance(found["evaluation"], Mapping):
            found["evaluation"] = {
                when: {**value, "score": value.get("score", value.get("accuracy"))}
                if isinstance(value, Mapping)
                else value
                for when, value in found["evaluation"].items()
            }
    for key in ("stages", "curves", "floor"):
        found[key] = _deep(found.get(key))
    return {key: value for key, value in found.items() if key in run or value is not None}


def _deep(value: Any, depth: int = 0) -> Any:
    """Keys renamed in nested rows; deeper than any run's are left alone."""
    if depth < 8 and isinstance(value, Mapping):
        return {
            _OLD.get(key, key) if _OLD.get(key) not in value else key: _deep(part, depth + 1)
            for key, part in value.items()
        }
    return [_deep(part, depth + 1) for part in value] if isinstance(value, list) else value
