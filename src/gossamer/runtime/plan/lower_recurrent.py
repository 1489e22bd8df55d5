"""LSTM and GRU as operators of a plan: one linear layer for the inputs of all steps, then the loop.

``aten.lstm.input``, ``aten.gru.input`` and their cells; of any number of layers, both directions,
any first state. What is packed by lengths, projected, or as long as it likes stays in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gossamer.runtime.plan.lower import Emitter, Left

__all__ = ["RULES"]

_GATES = {"lstm": 4, "gru": 3}


def _fill(value: float) -> Callable[..., str]:
    def rule(e: Emitter, *args: Any, **rest: Any) -> str:
        return e.emit("fill", (), shape=list(e.out.shape), value=value)

    return rule


def _full(e: Emitter, sizes: Any, value: Any, **rest: Any) -> str:
    if not isinstance(value, (int, float)) or not np.isfinite(value):
        raise Left("filled with what is no number")
    return e.emit("fill", (), shape=list(e.out.shape), value=value)


def _expand(e: Emitter, x: str, *rest: Any, **more: Any) -> str:
    """A first state for each example of the batch: added to zeros of that shape."""
    if e.out.dtype != "float32" or e.kind(x).dtype != "float32":
        raise Left(f"repeated {e.out.dtype}")
    if e.kind(x) == e.out:
        return x
    shape = list(e.out.shape)
    return e.emit(
        "binary", (x, e.emit("fill", (), shape, shape=shape, value=0)), function="add",
        activation=None,
    )  # fmt: skip


def _part(e: Emitter, x: str, first: int, last: int) -> str:
    """Rows ``first`` up to ``last`` of the first axis."""
    shape = e.kind(x).shape
    if (first, last) == (0, shape[0]):
        return x
    index = [[first, last, 1], *([None, None, None] for _ in shape[1:])]
    return e.emit("slice", (x,), (last - first, *shape[1:]), index=index)


def _shaped(e: Emitter, x: str, shape: Sequence[int]) -> str:
    return e.emit("reshape", (x,), shape, shape=list(shape))


def _first(e: Emitter, states: str, number: int, shape: tuple[int, ...]) -> str:
    """A first state (N, H) of (layers, N, H); "" for zeros."""
    return "" if e.zeros(states) else _shaped(e, _part(e, states, number, number + 1), shape)


def _steps(
    e: Emitter, op: str, x: str, weights: Sequence[str], first: Sequence[str], reverse: bool
) -> str:
    """One layer in one direction of x (T, N, I): the loop's result.

    ``weights``: of inputs and state, and their biases where there are; ``first``: state, and cell.
    """
    steps, batch, inputs = e.kind(x).shape
    into, state = weights[:2]
    units = e.array(state).shape[1]
    wide = _GATES[op] * units
    if e.array(state).shape != (wide, units):
        raise Left("a projection of the state")
    if any(e.array(w).dtype != np.float32 for w in weights) or e.kind(x).dtype != "float32":
        raise Left(f"{op} of {e.kind(x).dtype}")
    bias = own = ""
    if len(weights) == 4:
        given, more = (e.array(w) for w in weights[2:])
        if op == "gru":  # the state's part of n is multiplied by r, its bias with it
            own = e.constant(np.ascontiguousarray(more[2 * units :]))
            more = np.concatenate([more[: 2 * units], np.zeros_like(more[2 * units :])])
        bias = e.constant(given + more)
    flat = _shaped(e, x, (steps * batch, inputs))
    made = e.emit("linear", (flat, into, bias, ""), (steps * batch, wide), activation=None)
    parts = _shaped(e, made, (steps, batch, wide))
    terms = (*first,) if op == "lstm" else (own, *first)
    return e.emit(
        op, (parts, state, *terms), (steps + (op == "lstm"), batch, units), reverse=reverse
    )


def _layers(op: str) -> Callable[..., tuple[str, ...]]:
    def rule(
        e: Emitter, x: str, states: Any, weights: Any, biases: Any, count: Any, dropout: float,
        train: bool, both: bool, batch_first: bool,
    ) -> tuple[str, ...]:  # fmt: skip
        states = [states] if op == "gru" else states
        if not all(isinstance(v, (list, tuple)) for v in (states, weights)):
            raise Left("sequences that are packed by their lengths")
        each, ways = (4 if biases else 2), (2 if both else 1)
        if (train and dropout) or len(weights) != each * ways * count:
            raise Left("dropout, or a projection of the state")
        if len(e.kind(x).shape) != 3:
            raise Left("a sequence without a batch")
        if batch_first:
            n, t, i = e.kind(x).shape
            x = e.emit("permute", (x,), (t, n, i), axes=[1, 0, 2])
        steps, batch = e.kind(x).shape[:2]
        if steps < 1:
            raise Left("sequences of any length, or of none")
        last: list[list[str]] = [[] for _ in states]
        for layer in range(count):
            made = []
            for way in range(ways):
                number = layer * ways + way
                mine = weights[each * number : each * (number + 1)]
                units = e.array(mine[1]).shape[1]
                first = [_first(e, s, number, (batch, units)) for s in states]
                y = _steps(e, op, x, mine, first, bool(way))
                made.append(_part(e, y, 0, steps))
                at = 0 if way else steps - 1
                last[0].append(_part(e, y, at, at + 1))
                if op == "lstm":
                    last[1].append(_part(e, y, steps, steps + 1))
            x = made[0]
            if both:
                x = e.emit("cat", made, (steps, batch, 2 * units), axis=2)
        x = e.emit("permute", (x,), axes=[1, 0, 2]) if batch_first else x
        return x, *(_joined(e, parts) for parts in last)

    return rule


def _joined(e: Emitter, parts: Sequence[str]) -> str:
    shape = e.kind(parts[0]).shape
    return parts[0] if len(parts) == 1 else e.emit(
        "cat", parts, (len(parts), *shape[1:]), axis=0
    )  # fmt: skip


def _cell(op: str) -> Callable[..., tuple[str, ...]]:
    def rule(e: Emitter, x: str, states: Any, *weights: Any) -> tuple[str, ...]:
        if any(w is None for w in weights[:2]):
            raise Left("a cell without weights")
        batch, inputs = e.kind(x).shape
        states = [states] if op == "gru" else states
        first = ["" if e.zeros(s) else s for s in states]
        mine = [w for w in weights if w is not None]
        y = _steps(e, op, _shaped(e, x, (1, batch, inputs)), mine, first, False)
        units = e.kind(y).shape[2]
        rows = range(len(states))
        return tuple(_shaped(e, _part(e, y, k, k + 1), (batch, units)) for k in rows)

    return rule


RULES: Mapping[str, Callable[..., Any]] = {
    "lstm": _layers("lstm"), "gru": _layers("gru"),
    "lstm_cell": _cell("lstm"), "gru_cell": _cell("gru"),
    "zeros": _fill(0), "zeros_like": _fill(0), "new_zeros": _fill(0), "ones": _fill(1),
    "ones_like": _fill(1), "new_ones": _fill(1), "full": _full, "expand": _expand,
}  # fmt: skip
"""Operation of torch -> its rule; one of several results gives their names."""
