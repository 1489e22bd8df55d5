"""Operators of torch as operators of a plan: a rule for each, one table.

A rule gets the call's arguments with constants in place, and emits nodes. What it cannot express
it refuses with :class:`Left`, saying why; the call then stays in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gossamer.runtime.plan.graph import Value

__all__ = ["RULES", "SAME", "Batch", "Emitter", "Left"]

_BIG = 1 << 62  # torch's end of a slice without end


class Left(Exception):
    """A call that no operator of a plan expresses; the message says why."""


@dataclass(frozen=True)
class Batch:
    """An argument that is a multiple of the batch's size."""

    times: int


class Emitter(Protocol):
    """What a rule works with: ``out`` is what the call gives."""

    out: Value

    def kind(self, name: str) -> Value:
        """What a value or constant is."""

    def zeros(self, name: str) -> bool:
        """Whether a value is a ``fill`` of zeros."""

    def array(self, name: str) -> np.ndarray:
        """A constant; raises :class:`Left` for a value that is computed."""

    def constant(self, array: np.ndarray) -> str:
        """The name of a new constant."""

    def emit(
        self,
        op: str,
        inputs: Sequence[str],
        between: Sequence[int] | None = None,
        **attributes: Any,
    ) -> str:
        """Append a node; its result's name. ``between``: the shape of a step before the last."""


def _pair(value: Any, count: int) -> list[int]:
    found = [value] * count if isinstance(value, int) else list(value)
    return [int(v) for v in (found * count if len(found) == 1 else found)]


def _numbers(*values: Any) -> None:
    if any(not isinstance(v, (int, float)) for v in values):
        raise Left("a setting depends on the inputs")


def _conv(e: Emitter, x: str, w: str, b: str | None = None, stride: Any = 1, padding: Any = 0,
          dilation: Any = 1, groups: int = 1) -> str:  # fmt: skip
    weight = e.array(w)
    rank = weight.ndim - 2
    if len(e.kind(x).shape) != rank + 2:
        raise Left("a convolution without a batch dimension")
    spread, strides = _pair(dilation, rank), _pair(stride, rank)
    if padding == "same":
        spans = [(k - 1) * d for k, d in zip(weight.shape[2:], spread, strict=True)]
        pads = [[s // 2, s - s // 2] for s in spans]
    else:
        pads = [[p, p] for p in _pair(0 if padding == "valid" else padding, rank)]
    return e.emit("conv", (x, w, b or "", ""), stride=strides, padding=pads, dilation=spread,
                  groups=groups, activation=None)  # fmt: skip


def _linear(e: Emitter, x: str, w: str, b: str | None = None) -> str:
    e.array(w)
    return e.emit("linear", (x, w, b or "", ""), activation=None)


def _addmm(e: Emitter, b: str, x: str, w: str, *, beta: float = 1, alpha: float = 1) -> str:
    if beta != 1 or alpha != 1 or e.array(b).ndim != 1:
        raise Left("addmm with factors")
    return _linear(e, x, e.constant(np.ascontiguousarray(e.array(w).T)), b)


def _batch_norm(
    e: Emitter, x: str, w: str | None, b: str | None, mean: str, var: str, *rest: Any
) -> str:
    # rest: momentum and eps; torch's other form has the mode before them and cudnn behind
    eps = rest[1] if len(rest) == 2 else rest[2]
    if len(rest) > 2 and rest[0]:
        raise Left("batch norm in training mode")
    m, v = (e.array(n).astype(np.float64) for n in (mean, var))
    scale = 1 / np.sqrt(v + eps)
    if w:
        scale = scale * e.array(w)
    shift = -m * scale + (e.array(b) if b else 0.0)
    names = [e.constant(a.astype(np.float32)) for a in (scale, shift)]
    return e.emit("affine", (x, *names), activation=None)


def _unary(name: str, *fixed: float) -> Callable[..., str]:
    def rule(e: Emitter, x: str, *given: Any) -> str:
        _numbers(*given)
        return e.emit("unary", (x,), activation=[name, *(fixed or map(float, given))])

    return rule


def _clamp(e: Emitter, x: str, low: Any = None, high: Any = None) -> str:
    ends = [-np.inf if low is None else low, np.inf if high is None else high]
    _numbers(*ends)
    if ends == [0, np.inf]:
        return e.emit("unary", (x,), activation=["relu"])
    floats = e.out.dtype == e.kind(x).dtype == "float32"
    if floats and np.isinf(ends).tolist() in ([True, False], [False, True]):
        # an end of the greatest number would turn infinity into it
        name, end = ("minimum", ends[1]) if ends[0] == -np.inf else ("maximum", ends[0])
        value = e.constant(np.array(end, np.float32))
        return e.emit("binary", (x, value), function=name, activation=None)
    if e.out.dtype != "float32" and any(abs(v) > 2**53 for v in ends if np.isfinite(v)):
        raise Left("whole numbers that float64 does not hold")
    if not np.isfinite(ends).all():  # JSON has no infinity
        ends = [float(np.clip(v, -3.4e38, 3.4e38)) for v in ends]
    return e.emit("unary", (x,), activation=["clamp", *map(float, ends)])


def _gelu(e: Emitter, x: str, *, approximate: str = "none") -> str:
    name = "gelu" if approximate == "none" else "gelu_tanh"
    return e.emit("unary", (x,), activation=[name])


def _leaky(e: Emitter, x: str, slope: float = 0.01) -> str:
    return e.emit("unary", (x,), activation=["leaky_relu", float(slope)])


def _pow(e: Emitter, x: str, exponent: Any) -> str:
    if not isinstance(x, str):
        raise Left("a number to the power of a tensor")
    _numbers(exponent)
    return e.emit("unary", (x,), activation=["pow", float(exponent)])


def _elu(e: Emitter, x: str, alpha: float = 1.0, scale: float = 1, input_scale: float = 1) -> str:
    if scale != 1 or input_scale != 1:
        raise Left("a scaled ELU")
    return e.emit("unary", (x,), activation=["elu", float(alpha)])


def _binary(name: str, *, turned: bool = False) -> Callable[..., str]:
    def rule(e: Emitter, x: Any, y: Any, *, alpha: float = 1, **rest: Any) -> str:
        if alpha != 1 or rest:
            raise Left(f"{name} with {'alpha' if alpha != 1 else sorted(rest)[0]}")
        if e.out.dtype != "float32":
            raise Left(f"{name} of {e.out.dtype}")
        names = [_operand(e, v) for v in ((y, x) if turned else (x, y))]
        return e.emit("binary", names, function=name, activation=None)

    return rule


def _operand(e: Emitter, value: Any) -> str:
    if isinstance(value, str):
        if e.kind(value).dtype != "float32":
            raise Left(f"arithmetic of float32 and {e.kind(value).dtype}")
        return value
    _numbers(value)
    return e.constant(np.array(value, np.float32))


def _max_pool(rank: int) -> Callable[..., str]:
    def rule(e: Emitter, x: str, kernel: Any, stride: Any = (), padding: Any = 0,
             dilation: Any = 1, ceil: bool = False) -> str:  # fmt: skip
        sides, spread, pads = _pair(kernel, rank), _pair(dilation, rank), _pair(padding, rank)
        strides = _pair(stride or kernel, rank)
        have, want = e.kind(x).shape[-rank:], e.out.shape[-rank:]
        if len(e.kind(x).shape) != rank + 2:
            raise Left("pooling without a batch dimension")
        ends = _ends(have, want, sides, strides, pads, spread)
        return e.emit("max_pool", (x,), kernel=sides, stride=strides, padding=ends, dilation=spread)

    return rule


def _ends(have: Sequence[int], want: Sequence[int], sides: list[int], strides: list[int],
          pads: list[int], spread: list[int]) -> list[list[int]]:  # fmt: skip
    """Padding before and after, such that the last window fits (ceil_mode hangs over)."""
    return [
        [p, max(p, (w - 1) * s + (k - 1) * d + 1 - h - p)]
        for h, w, k, s, p, d in zip(have, want, sides, strides, pads, spread, strict=True)
    ]


def _avg_pool(rank: int) -> Callable[..., str]:
    def rule(e: Emitter, x: str, kernel: Any, stride: Any = (), padding: Any = 0,
             ceil: bool = False, counted: bool = True, divisor: Any = None) -> str:  # fmt: skip
        sides, pads = _pair(kernel, rank), _pair(padding, rank)
        strides = _pair(stride or kernel, rank)
        have, want = e.kind(x).shape[-rank:], e.out.shape[-rank:]
        if len(e.kind(x).shape) != rank + 2:
            raise Left("pooling without a batch dimension")
        ends = _ends(have, want, sides, strides, pads, [1] * rank)
        if divisor is not None:
            raise Left("average pooling with a divisor")
        if ceil and any(a != b for a, b in ends):  # windows that hang over
            if counted and any(pads):
                raise Left("average pooling whose windows hang over padding that counts")
            counted = False  # what hangs over never counts
        return e.emit("avg_pool", (x,), kernel=sides, stride=strides, padding=ends, counted=counted)

    return rule


def _adaptive(op: str, rank: int) -> Callable[..., str]:
    def rule(e: Emitter, x: str, size: Any) -> str:
        have, want = e.kind(x).shape, e.out.shape[-rank:]
        if len(have) != rank + 2:
            raise Left("pooling without a batch dimension")
        if want == (1,) * rank and op == "avg_pool":
            return e.emit("mean", (x,), axes=list(range(2, 2 + rank)), keep=True)
        if any(h % w for h, w in zip(have[-rank:], want, strict=True)):
            raise Left("adaptive pooling over windows of different sizes")
        sides = [h // w for h, w in zip(have[-rank:], want, strict=True)]
        more = {"counted": True} if op == "avg_pool" else {"dilation": [1] * rank}
        return e.emit(op, (x,), kernel=sides, stride=sides, padding=[[0, 0]] * rank, **more)

    return rule


def _mean(e: Emitter, x: str, axes: Any = None, keep: bool = False, *, dtype: Any = None) -> str:
    rank = len(e.kind(x).shape)
    found = sorted(a % rank for a in _pair(axes, 1)) if axes else list(range(rank))
    if any(e.kind(x).shape[a] < 0 for a in found):
        raise Left("a mean over the batch")
    if e.out.dtype != "float32":
        raise Left(f"a mean of {e.out.dtype}")
    return e.emit("mean", (x,), axes=found, keep=keep)


def _reshape(e: Emitter, x: str, *rest: Any) -> str:
    return e.emit("reshape", (x,), shape=list(e.out.shape))


def _permute(e: Emitter, x: str, axes: Sequence[int]) -> str:
    rank = len(e.kind(x).shape)
    return e.emit("permute", (x,), axes=[a % rank for a in axes])


def _transpose(e: Emitter, x: str, first: int = 0, second: int = 1) -> str:
    axes = list(range(len(e.kind(x).shape)))
    axes[first], axes[second] = axes[second], axes[first]
    return e.emit("permute", (x,), axes=axes)


def _slice(e: Emitter, x: str, axis: int = 0, start: Any = None, stop: Any = None,
           step: int = 1) -> str:  # fmt: skip
    shape = e.kind(x).shape
    axis %= len(shape)
    every = stop is None or stop == (Batch(-shape[axis]) if shape[axis] < 0 else shape[axis])
    every = every or (isinstance(stop, int) and stop >= _BIG)
    if every and start in (None, 0) and step == 1:
        return x
    if shape[axis] < 0:
        raise Left("a slice of the batch")
    _numbers(*(v for v in (start, stop) if v is not None))
    index: list[list[Any]] = [[None, None, None] for _ in shape]
    index[axis] = [start, None if every else stop, step]
    return e.emit("slice", (x,), index=index)


def _select(e: Emitter, x: str, axis: int, at: Any) -> str:
    shape = e.kind(x).shape
    axis %= len(shape)
    _numbers(at)
    if shape[axis] < 0:
        raise Left("one example of the batch")
    at %= shape[axis]
    index: list[list[Any]] = [[None, None, None] for _ in shape]
    index[axis] = [at, at + 1, 1]
    part = e.emit("slice", (x,), (*shape[:axis], 1, *shape[axis + 1 :]), index=index)
    return e.emit("reshape", (part,), shape=list(e.out.shape))


def _pad(e: Emitter, x: str, pads: Sequence[int], mode: Any = "constant", value: Any = None) -> str:
    if not isinstance(mode, str):  # constant_pad_nd has no mode
        mode, value = "constant", mode
    if mode != "constant" or any(p < 0 for p in pads):
        raise Left(f"padding in mode {mode}, or of less than nothing")
    pairs = [[int(a), int(b)] for a, b in zip(pads[::2], pads[1::2], strict=True)][::-1]
    rank = len(e.kind(x).shape)
    around = [[0, 0]] * (rank - len(pairs)) + pairs
    if any(sum(p) and d < 0 for p, d in zip(around, e.kind(x).shape, strict=True)):
        raise Left("padding of the batch")
    return e.emit("pad", (x,), pads=around, value=float(value or 0))


def _cat(e: Emitter, parts: Sequence[str], axis: int = 0) -> str:
    shape = e.out.shape
    axis %= len(shape)
    if shape[axis] < 0:
        raise Left("batches one behind the other")
    if len(shape) > 1:  # torch passes over an empty list of numbers whatever the others are
        parts = [p for p in parts if e.kind(p).shape != (0,)]
    return e.emit("cat", tuple(parts), axis=axis)


def _softmax(e: Emitter, x: str, axis: int, *rest: Any) -> str:
    if e.out.dtype != "float32":
        raise Left(f"a softmax of {e.out.dtype}")
    return e.emit("softmax", (x,), axis=axis % len(e.out.shape))


def _layer_norm(
    e: Emitter,
    x: str,
    sizes: Sequence[int],
    w: str | None = None,
    b: str | None = None,
    eps: float = 1e-5,
    fast: Any = None,
) -> str:
    return e.emit("layer_norm", (x, w or "", b or ""), rank=len(sizes), eps=float(eps))


def _embedding(e: Emitter, w: str, indices: str, padding: int = -1, by_count: bool = False,
               sparse: bool = False) -> str:  # fmt: skip
    e.array(w)
    return e.emit("embedding", (w, indices))


def _matmul(e: Emitter, x: str, y: str) -> str:
    if e.out.dtype != "float32" or min(len(e.kind(n).shape) for n in (x, y)) < 2:
        raise Left("a product of vectors, or of whole numbers")
    return e.emit("matmul", (x, y))


SAME = {"clone", "contiguous", "alias", "detach", "dropout", "lift_fresh_copy", "dropout_",
        "feature_dropout", "alpha_dropout", "to"}  # fmt: skip
"""Calls that give their first argument, where type and shape stay."""

RULES: Mapping[str, Callable[..., Any]] = {
    **{f"conv{d}d": _conv for d in (1, 2, 3)},
    "linear": _linear, "addmm": _addmm,
    "_native_batch_norm_legit_no_training": _batch_norm, "batch_norm": _batch_norm,
    **{name: _unary(name) for name in (
        "relu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "silu", "exp", "neg", "sqrt", "abs",
        "rsqrt")},
    "relu6": _unary("clamp", 0.0, 6.0), "hardtanh": lambda e, x, low=-1.0, high=1.0: _clamp(
        e, x, low, high),
    "clamp": _clamp, "clamp_min": lambda e, x, low: _clamp(e, x, low), "gelu": _gelu,
    "leaky_relu": _leaky, "elu": _elu, "pow": _pow,
    "add": _binary("add"), "sub": _binary("sub"), "mul": _binary("mul"), "div": _binary("div"),
    "rsub": _binary("sub", turned=True), "maximum": _binary("maximum"),
    "minimum": _binary("minimum"),
    **{f"max_pool{d}d": _max_pool(d) for d in (1, 2, 3)},
    **{f"avg_pool{d}d": _avg_pool(d) for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": _adaptive("avg_pool", d) for d in (1, 2, 3)},
    "mean": _mean,
    **dict.fromkeys(("view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten",
                     "_unsafe_view"), _reshape),
    "permute": _permute, "transpose": _transpose, "t": _transpose, "slice": _slice,
    "select": _select, "pad": _pad, "constant_pad_nd": _pad, "cat": _cat, "softmax": _softmax,
    "_softmax": _softmax, "layer_norm": _layer_norm, "embedding": _embedding, "matmul": _matmul,
    "bmm": _matmul, "mm": _matmul,
}  # fmt: skip
"""Operation of torch -> its rule."""
