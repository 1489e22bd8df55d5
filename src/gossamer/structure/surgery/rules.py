"""Rules of operations that act element by element, move elements, or reduce axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.structure.surgery.memory import compact, varying
from gossamer.structure.surgery.node import Map, Node, Split
from gossamer.structure.surgery.trace import FUNCTIONS, RULES, Trace

__all__ = ["merge", "passed", "rule", "whole"]


def rule(*ops: str) -> Callable[[Any], Any]:
    """Make a function the rule of operations of aten."""

    def register(function: Any) -> Any:
        for op in ops:
            RULES[op] = function
        return function

    return register


def whole(*functions: Any) -> Callable[[Any], Any]:
    """Make a function the rule of calls that are kept whole."""

    def register(function: Any) -> Any:
        for one in functions:
            FUNCTIONS[one] = function
        return function

    return register


def merge(
    trace: Trace, node: Node, shape: Sequence[int], operands: Sequence[Tensor]
) -> list[Tensor]:
    """The layers of a result whose elements come from the operands' at the same place."""
    shape = tuple(shape)
    trace.flows(node, *operands)
    merged: list[tuple[Tensor, list[int]]] = []
    for t in operands:
        for layer in trace.labels(t):
            layer = layer.expand(shape)
            axes = varying(layer)
            if not axes:
                trace.pin(node, layer, f"{node.op} spreads a single one")
                continue
            for at, (there, near) in enumerate(merged):
                if set(axes) & set(near):
                    trace.unite(node, compact(there), compact(layer))
                    if set(axes) - set(near) or not set(near) - set(axes):
                        there = torch.where(there != 0, there, layer)
                    merged[at] = (there, sorted({*axes, *near}))
                    break
            else:
                merged.append((layer, axes))
    for layer, axes in merged:
        for t in operands:
            lead = len(shape) - t.ndim
            mine = [varying(one.expand(shape)) for one in trace.labels(t)]
            if any(set(axes) & set(one) for one in mine):
                continue
            if any(a >= lead and t.shape[a - lead] > 1 for a in axes):
                trace.pin(node, layer, f"{node.op} mixes it with what has no units")
    return [layer for layer, _ in merged]


def _spread(trace: Trace, shape: Sequence[int], operands: Sequence[Tensor]) -> Tensor:
    """Elements of which one operand at least is unknown."""
    unknown = torch.zeros((), dtype=torch.bool)
    for t in operands:
        unknown = unknown | trace.unknown(t)
    return unknown.expand(tuple(shape))


_ELEMENTWISE = """
    add sub rsub neg abs exp exp2 log log2 log10 log1p expm1 sqrt rsqrt square pow sin cos tan
    tanh sigmoid relu relu6 leaky_relu elu gelu silu mish hardswish hardsigmoid hardtanh softplus
    celu selu threshold clamp clamp_min clamp_max maximum minimum eq ne lt le gt ge logical_and
    logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not isnan isinf sign sgn
    reciprocal floor ceil round trunc erf erfc lerp addcmul addcdiv atan atan2 fmod remainder
    log_sigmoid_forward _prelu_kernel softshrink hardshrink nan_to_num fill heaviside zeros_like
    ones_like full_like empty_like detach bernoulli zero sinh cosh asin acos
"""


@rule(*_ELEMENTWISE.split())
def _elementwise(trace: Trace, node: Node, out: Any, *args: Any, **kwargs: Any) -> None:
    fixed = node.op in ("zeros_like", "ones_like", "full_like", "empty_like", "fill_", "zero_")
    operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    for one in out if isinstance(out, (tuple, list)) else [out]:
        if not one.numel():
            continue
        layers = merge(trace, node, one.shape, operands)
        trace.ledger.write(one, layers, None if fixed else _spread(trace, one.shape, operands))


@rule("mul", "div")
def _product(trace: Trace, node: Node, out: Tensor, a: Any, b: Any, **kwargs: Any) -> None:
    operands = [t for t in (a, b) if isinstance(t, Tensor)]
    unknown = _spread(trace, out.shape, operands)
    for t in operands[:1] if node.op.startswith("div") else operands:
        unknown = unknown & ~((t == 0) & ~trace.unknown(t))
    trace.ledger.write(out, merge(trace, node, out.shape, operands), unknown)


@rule("where", "masked_fill")
def _where(trace: Trace, node: Node, out: Tensor, *args: Any, **kwargs: Any) -> None:
    operands = [a for a in args if isinstance(a, Tensor)]
    layers = merge(trace, node, out.shape, operands)
    trace.ledger.write(out, layers, _spread(trace, out.shape, operands))


@rule("copy")
def _copy(trace: Trace, node: Node, out: Tensor, old: Tensor, new: Tensor, *rest: Any) -> None:
    # what was there is gone: its units are neither read nor tied
    trace.flows(node, new)
    layers = [one.expand(out.shape) for one in trace.labels(new)]
    trace.ledger.write(out, layers, trace.unknown(new).expand(out.shape))


@rule("clone", "_to_copy", "contiguous", "lift_fresh_copy", "dropout", "alias_copy")
def _moved(trace: Trace, node: Node, out: Tensor, x: Tensor, *rest: Any, **kwargs: Any) -> None:
    trace.flows(node, x)
    trace.ledger.write(out, trace.labels(x), trace.unknown(x))


def passed(
    trace: Trace, node: Node, out: Tensor, x: Tensor, change: Callable[[Tensor], Tensor]
) -> None:
    """An operation that only moves elements: the same is done to what is known of them."""
    trace.flows(node, x)
    trace.ledger.write(
        out, [change(one) for one in trace.labels(x)], change(trace.unknown(x).int()).bool()
    )


@rule("repeat", "flip", "roll", "tile", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def _rearranged(trace: Trace, node: Node, out: Tensor, x: Tensor, *rest: Any, **kw: Any) -> None:
    function = getattr(torch.ops.aten, node.op)
    if node.op in ("flip", "roll", "channel_shuffle"):
        dims = rest[-1] if node.op != "channel_shuffle" else [-3]
        dims = [d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)]
        for layer in trace.labels(x):
            if set(varying(layer)) & set(dims):
                trace.pin(node, layer, f"{node.op} moves it among the others")
    passed(trace, node, out, x, lambda t: function(t.contiguous(), *rest, **kw))


@rule("slice", "narrow")
def _slice(trace: Trace, node: Node, out: Tensor, x: Tensor, dim: int = 0, start: Any = None,
           end: Any = None, step: int = 1) -> None:  # fmt: skip
    size = x.shape[dim] if x.ndim else 0
    if out.shape == x.shape:
        return
    start = 0 if start is None else max(0, start + size if start < 0 else start)
    stop = start + (out.shape[dim] - 1) * step + 1
    _cut(trace, node, x, dim, [s for s in (start, stop - start, size - stop) if s > 0], step)


def _cut(
    trace: Trace, node: Node, x: Tensor, dim: int, sizes: Sequence[int], step: int = 1
) -> None:
    for layer in trace.labels(x):
        axes = varying(layer)
        if dim % x.ndim not in axes:
            continue
        if step != 1:
            trace.pin(node, layer, f"{node.op} takes every {step}th")
        elif len(axes) == 1:
            ids = trace.line(node, layer, dim)
            assert ids is not None
            node.splits.append(Split(ids.numpy(), tuple(sizes)))
        else:
            _fixed(node, layer, dim % x.ndim)


def _fixed(node: Node, layer: Tensor, dim: int) -> None:
    """The axis keeps its length."""
    axes = varying(layer)
    node.maps.append(Map.of(layer, axes, (axes.index(dim),)))


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk",
      "chunk", "tensor_split")  # fmt: skip
def _split(trace: Trace, node: Node, out: Any, x: Tensor, sizes: Any, dim: int = 0) -> None:
    if len(out) > 1:
        _cut(trace, node, x, dim, [t.shape[dim] for t in out])


@rule("select", "unbind")
def _select(trace: Trace, node: Node, out: Any, x: Tensor, dim: int = 0, index: Any = None) -> None:
    for layer in trace.labels(x):
        axes = varying(layer)
        if axes == [dim % x.ndim]:
            trace.pin(node, layer, f"{node.op} takes it by its place")
        elif dim % x.ndim in axes:
            _fixed(node, layer, dim % x.ndim)


@rule("as_strided", "diagonal", "unfold", "view_as_real", "view_as_complex")
def _by_memory(trace: Trace, node: Node, out: Tensor, x: Tensor, *rest: Any, **kw: Any) -> None:
    raise NotImplementedError  # looks at memory in its own way


@rule("cat", "stack")
def _cat(trace: Trace, node: Node, out: Tensor, parts: Any, dim: int = 0) -> None:
    if node.op == "stack":
        parts = [p.unsqueeze(dim if dim >= 0 else dim + p.ndim + 1) for p in parts]
    parts = [p for p in parts if p.ndim == out.ndim]  # torch skips empty ones of another rank
    dim %= out.ndim
    trace.flows(node, *parts)
    along: list[list[Tensor | None]] = [[]]  # of one layer, the pieces
    across: list[Tensor] = []
    firsts: list[list[Tensor]] = []
    for p in parts:
        mine = [(one, varying(one)) for one in trace.labels(p)]
        for one, axes in mine:
            if not axes:
                trace.pin(node, one, f"{node.op} joins a single one")
        ahead = [one for one, axes in mine if dim in axes]
        if len(ahead) > 1:
            raise NotImplementedError
        along[0].append(ahead[0] if ahead else None)
        firsts.append([one for one, axes in mine if axes and dim not in axes])
    most = max((len(f) for f in firsts), default=0)
    for at in range(most):
        there = [f[at].narrow(dim, 0, 1) if len(f) > at else None for f in firsts]
        lead = next(t for t in there if t is not None)
        for piece in there:
            if piece is None or varying(piece) != varying(lead):
                trace.pin(node, lead, f"{node.op} joins it with what has no units")
                if piece is not None:
                    trace.pin(node, piece, f"{node.op} joins it with what has other units")
            elif piece is not lead:
                trace.unite(node, compact(lead), compact(piece))
        across.append(lead.expand(out.shape))
    layers = list(across)
    if any(one is not None for one in along[0]):
        zero = torch.zeros((), dtype=torch.int32)
        joined = [
            zero.expand(p.shape) if one is None else one.expand(p.shape)
            for p, one in zip(parts, along[0], strict=True)
        ]
        layers.append(torch.cat(joined, dim))
    unknown = torch.cat([trace.unknown(p) for p in parts], dim)
    trace.ledger.write(out, layers, unknown)


@rule("constant_pad_nd")
def _pad(trace: Trace, node: Node, out: Tensor, x: Tensor, pad: Any, value: Any = 0) -> None:
    layers = []
    trace.flows(node, x)
    for layer in trace.labels(x):
        axes = varying(layer)
        padded = compact(layer)
        for at in range(len(pad) // 2):
            axis = x.ndim - 1 - at
            if axis in axes:
                two = [0] * (2 * at) + list(pad[2 * at : 2 * at + 2])
                padded = torch.ops.aten.constant_pad_nd(padded, two, 0)
        layers.append(padded.expand(out.shape))
    unknown = torch.ops.aten.constant_pad_nd(trace.unknown(x), pad, False)
    trace.ledger.write(out, layers, unknown)


@rule("index_select", "index", "gather", "take_along_dim")
def _index(trace: Trace, node: Node, out: Tensor, x: Tensor, *rest: Any) -> None:
    if node.op == "index":
        given = list(rest[0])
        dims = [d for d, i in enumerate(given) if i is not None]
        if any(given[d].dtype == torch.bool for d in dims) and dims != [0]:
            raise NotImplementedError
        indices = [i for i in given if i is not None]
    else:
        dims, indices = [rest[0] % x.ndim], [rest[1]]
    for i in indices:
        for layer in trace.labels(i):
            if varying(layer):
                trace.pin(node, layer, f"{node.op} reads it as an index")
    for layer in trace.labels(x):
        if set(varying(layer)) & set(dims) or (node.op == "gather" and varying(layer)):
            trace.pin(node, layer, f"{node.op} takes it by its place")
    trace.flows(node, x)
    # by name: the layers move as the elements do, whatever the indices are
    function = getattr(torch.ops.aten, node.op)
    known = all(not bool(trace.unknown(i).any()) for i in indices)
    unknown = function(trace.unknown(x).int(), *rest).bool()
    if not known and dims == [0] and out.shape[1:] == x.shape[1:]:  # any of the rows
        rows = (trace.unknown(x) | (x != x[:1])).any(0, keepdim=True)
        unknown = rows.expand(out.shape)
    elif not known:
        unknown = torch.ones((), dtype=torch.bool)
    trace.ledger.write(out, [function(one.contiguous(), *rest) for one in trace.labels(x)], unknown)


def _dims(given: Any, ndim: int) -> list[int]:
    if given is None or (isinstance(given, (tuple, list)) and not given):
        return list(range(ndim))
    return [d % ndim for d in ([given] if isinstance(given, int) else given)] if ndim else []


@rule("sum", "mean", "amax", "amin", "max", "min", "var", "std", "prod", "argmax", "argmin", "any",
      "all", "logsumexp", "linalg_vector_norm", "norm", "median", "var_mean")  # fmt: skip
def _reduced(trace: Trace, node: Node, out: Any, x: Tensor, *rest: Any, **kw: Any) -> None:
    if node.op in ("max", "min") and rest and isinstance(rest[0], Tensor):
        _elementwise(trace, node, out, x, *rest)
        return
    if node.op in ("linalg_vector_norm", "norm"):
        rest = rest[1:]
    where = (
        kw["dim"]
        if "dim" in kw
        else next(
            (r for r in rest if isinstance(r, (int, list, tuple)) and not isinstance(r, bool)), None
        )
    )
    dims = _dims(where, x.ndim)
    trace.flows(node, x)
    unknown = trace.unknown(x)
    layers = []
    for layer in trace.labels(x):
        inside = set(varying(layer)) & set(dims)
        if inside:
            silent = ~unknown & (x == 0)
            if node.op == "sum" and len(varying(layer)) == 1:
                # a sum does not notice zeros that are gone
                (axis,) = inside
                others = [d for d in range(x.ndim) if d != axis]
                quiet = silent.all(dim=others) if others else silent
                ids = trace.line(node, layer, axis)
                assert ids is not None
                trace.pin(node, ids[~quiet.reshape(-1)], "a sum over it is read", read=True)
            else:
                trace.pin(node, layer, f"{node.op} runs over it", read=True)
        else:
            for d in dims:
                layer = layer.narrow(d, 0, 1)
            layers.append(layer)
    for d in dims:
        unknown = unknown.any(d, keepdim=True)
    for one in out if isinstance(out, (tuple, list)) else [out]:
        kept = one.ndim == x.ndim
        shaped = [m if kept else m.squeeze(dims) for m in layers]
        trace.ledger.write(one, shaped, unknown if kept else unknown.squeeze(dims))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "softmin",
      "_safe_softmax", "logcumsumexp")  # fmt: skip
def _along(trace: Trace, node: Node, out: Any, x: Tensor, dim: Any = -1, *rest: Any, **kw: Any
           ) -> None:  # fmt: skip
    dim = dim % x.ndim
    for layer in trace.labels(x):
        if dim in varying(layer):
            trace.pin(node, layer, f"{node.op} runs over it", read=True)
    unknown = trace.unknown(x).any(dim, keepdim=True).expand(x.shape)
    for one in out if isinstance(out, (tuple, list)) else [out]:
        trace.ledger.write(one, trace.labels(x), unknown)


@rule("glu")
def _glu(trace: Trace, node: Node, out: Tensor, x: Tensor, dim: int = -1) -> None:
    dim %= x.ndim
    half = x.shape[dim] // 2
    layers = []
    for layer in trace.labels(x):
        first, second = layer.narrow(dim, 0, half), layer.narrow(dim, half, half)
        trace.unite(node, compact(first), compact(second))
        layers.append(first)
    u = trace.unknown(x)
    silent = (x.narrow(dim, 0, half) == 0) & ~u.narrow(dim, 0, half)
    unknown = (u.narrow(dim, 0, half) | u.narrow(dim, half, half)) & ~silent
    trace.ledger.write(out, layers, unknown)


@rule("arange", "zeros", "ones", "full", "empty", "scalar_tensor", "eye", "linspace",
      "tril_indices", "empty_strided", "new_zeros", "new_ones", "new_full", "new_empty",
      "new_empty_strided", "triu", "tril", "lift_fresh", "_assert_async", "tensor")  # fmt: skip
def _made(trace: Trace, node: Node, out: Any, *args: Any, **kwargs: Any) -> None:
    if node.op in ("triu", "tril"):
        x = args[0]
        trace.ledger.write(out, trace.labels(x), trace.unknown(x))
        for layer in trace.labels(x):
            if set(varying(layer)) & {x.ndim - 1, x.ndim - 2}:
                trace.pin(node, layer, f"{node.op} takes it by its place")
        return
    node.reads = set()
    if isinstance(out, Tensor) and node.op != "lift_fresh":
        trace.ledger.write(out, [], None)
