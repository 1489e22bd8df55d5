"""Attention, and what takes tensors apart before it, as operators of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gossamer.runtime.plan.lower import Emitter, Left

__all__ = ["RULES"]

_NEVER = np.float32(-1e30)  # added to a score that is not to count; finite, as int8 ranges are


def _attention(
    e: Emitter, q: str, k: str, v: str, mask: str | None = None, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> str:  # fmt: skip
    """softmax(q k^T * scale + mask) v, each product an operator of its own."""
    if dropout or enable_gqa:
        raise Left("attention with dropout, or with heads that are shared")
    (*head, steps, width), (*_, seen, _) = e.kind(q).shape, e.kind(k).shape
    if min(steps, seen, width) < 0 or e.out.dtype != "float32":
        raise Left("attention over the batch, or of another type")
    factor = e.constant(np.array(1 / math.sqrt(width) if scale is None else scale, np.float32))
    scaled = e.emit("binary", (q, factor), (*head, steps, width), function="mul", activation=None)
    order = [*range(len(head)), len(head) + 1, len(head)]
    turned = e.emit("permute", (k,), (*e.kind(k).shape[:-2], width, seen), axes=order)
    scores = e.emit("matmul", (scaled, turned), (*head, steps, seen))
    if causal:
        above = np.triu(np.full((steps, seen), _NEVER, np.float32), 1)
        scores = _added(e, scores, e.constant(above))
    if mask:
        if e.kind(mask).dtype == "bool":
            given = e.array(mask)
            if not given.any(-1).all():
                raise Left("attention with rows that see nothing")
            mask = e.constant(np.where(given, np.float32(0), _NEVER))
        scores = _added(e, scores, mask)
        if not _constant(e, mask):
            return e.emit("matmul", (_seeing(e, scores, mask), v))
        if np.isneginf(e.array(mask)).all(-1).any():
            raise Left("attention with rows that see nothing")
    part = e.emit("softmax", (scores,), e.kind(scores).shape, axis=len(head) + 1)
    return e.emit("matmul", (part, v))


def _constant(e: Emitter, name: str) -> bool:
    try:
        e.array(name)
    except Left:
        return False
    return True


def _seeing(e: Emitter, scores: str, mask: str) -> str:
    """The softmax of scores whose mask is computed; zeros in rows that see nothing, as torch has.

    Those are all minus infinity, of which a softmax is NaN: they get an end, and a factor of 0.
    """
    shape, own = e.kind(scores).shape, e.kind(mask).shape
    most = np.finfo(np.float32).max
    least, scale, two = (e.constant(np.array(v, np.float32)) for v in (-most, most, 2))
    ended = e.emit("binary", (scores, least), shape, function="maximum", activation=None)
    part = e.emit("softmax", (ended,), shape, axis=len(shape) - 1)
    # of minus infinity less than nothing, of every number 1 or more
    above = e.emit("binary", (mask, scale), own, function="div", activation=None)
    above = e.emit("binary", (above, two), own, function="add", activation=["clamp", 0.0, 1.0])
    return e.emit("binary", (part, above), shape, function="mul", activation=None)


def _added(e: Emitter, scores: str, mask: str) -> str:
    if e.kind(mask).dtype != "float32":
        raise Left(f"a mask of {e.kind(mask).dtype}")
    return e.emit("binary", (scores, mask), e.kind(scores).shape, function="add", activation=None)


def _parts(e: Emitter, x: str, sizes: Sequence[int], axis: int) -> tuple[str, ...]:
    """Neighbouring parts of an axis."""
    shape, found, at = e.kind(x).shape, [], 0
    if shape[axis] != sum(sizes):
        raise Left("parts of the batch")
    for size in sizes:
        index: list[list[Any]] = [[None, None, None] for _ in shape]
        index[axis] = [at, at + size, 1]
        between = (*shape[:axis], size, *shape[axis + 1 :])
        found.append(e.emit("slice", (x,), between, index=index))
        at += size
    return tuple(found)


def _split(e: Emitter, x: str, size: Any, axis: int = 0) -> tuple[str, ...]:
    shape = e.kind(x).shape
    axis %= len(shape)
    if isinstance(size, int):
        size = [min(size, shape[axis] - at) for at in range(0, shape[axis], size)]
    return _parts(e, x, size, axis)


def _chunk(e: Emitter, x: str, count: int, axis: int = 0) -> tuple[str, ...]:
    return _split(e, x, -(-e.kind(x).shape[axis] // count), axis)


def _unbind(e: Emitter, x: str, axis: int = 0) -> tuple[str, ...]:
    shape = e.kind(x).shape
    axis %= len(shape)
    parts = _parts(e, x, [1] * max(0, shape[axis]), axis)
    rest = (*shape[:axis], *shape[axis + 1 :])
    return tuple(e.emit("reshape", (p,), rest, shape=list(rest)) for p in parts)


def _arange(e: Emitter, *ends: Any, **rest: Any) -> str:
    if any(not isinstance(v, (int, float)) for v in ends) or min(e.out.shape) < 0:
        raise Left("numbers up to one that depends on the inputs")
    return e.constant(np.arange(*ends).astype(e.out.dtype))


RULES: Mapping[str, Any] = {
    "scaled_dot_product_attention": _attention, "unbind": _unbind, "split": _split,
    "split_with_sizes": _split, "chunk": _chunk, "arange": _arange,
}  # fmt: skip
"""Operation of torch -> its rule; one of several results gives their names."""
