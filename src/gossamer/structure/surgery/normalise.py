"""Rules of normalisation layers and of attention that is kept whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.structure.surgery.memory import compact, varying
from gossamer.structure.surgery.node import Node
from gossamer.structure.surgery.rules import rule, whole
from gossamer.structure.surgery.trace import Trace

__all__: list[str] = []


def _channels(trace: Trace, node: Node, x: Tensor, given: list[Tensor | None]) -> Tensor | None:
    """Units along axis 1, which the parameters share."""
    lines = []
    for layer in trace.labels(x):
        found = trace.line(node, layer, 1)
        if found is None or varying(layer) != [1]:
            trace.pin(node, layer, f"{node.op} runs over it", read=True)
        else:
            lines.append(found)
    for t in given:
        for layer in trace.labels(t) if t is not None else ():
            mine = trace.line(node, layer, 0)
            if mine is not None:
                trace.use(node, mine, "scales")
                if not lines:
                    trace.pin(node, mine, f"{node.op} meets what has no units")
                lines.append(mine)
    for one in lines[1:]:
        trace.unite(node, lines[0], one)
    return lines[0] if lines else None


def _wide(values: Tensor, ndim: int) -> Tensor:
    view = [1] * ndim
    view[1] = -1
    return values.view(view)


@whole(torch.batch_norm)
def batch_norm(trace: Trace, node: Node, out: Tensor, x: Tensor, weight: Any, bias: Any,
               mean: Any, var: Any, training: bool, *rest: Any) -> None:  # fmt: skip
    """One scale and one shift a channel."""
    ids = _channels(trace, node, x, [weight, bias, mean, var])
    if ids is not None:
        node.sizes = {"num_features": ids.numpy()}
    unknown = trace.unknown(x)
    if training:
        unknown = torch.ones((), dtype=torch.bool)
    if weight is not None:
        unknown = unknown & _wide(weight != 0, x.ndim)
    trace.ledger.write(out, trace.labels(x), unknown.expand(out.shape))


@whole(torch.instance_norm)
def instance_norm(trace: Trace, node: Node, out: Tensor, x: Tensor, weight: Any, bias: Any,
                  *rest: Any) -> None:  # fmt: skip
    """One scale and one shift a channel, of its own mean and variance."""
    ids = _channels(trace, node, x, [weight, bias, *rest[:2]])
    if ids is not None:
        node.sizes = {"num_features": ids.numpy()}
    unknown = trace.unknown(x)
    for d in range(2, x.ndim):
        unknown = unknown.any(d, keepdim=True)
    if weight is not None:
        unknown = unknown & _wide(weight != 0, x.ndim)
    trace.ledger.write(out, trace.labels(x), unknown.expand(out.shape))


@whole(torch.group_norm)
def group_norm(trace: Trace, node: Node, out: Tensor, x: Tensor, groups: int, weight: Any = None,
               bias: Any = None, *rest: Any) -> None:  # fmt: skip
    """Channels of a group share their mean and variance: they go together."""
    ids = _channels(trace, node, x, [weight, bias])
    if ids is not None:
        rows = ids.view(groups, -1)
        trace.unite(node, rows[:, :1].expand(rows.shape), rows)
        node.sizes = {"num_channels": ids.numpy(), "num_groups": rows[:, 0].numpy()}
    # known zeros of a whole group stay zero; of a part of it nothing is known
    blind = trace.unknown(x)
    shaped = blind.reshape(x.shape[0], groups, -1).any(2)
    per = x.shape[1] // groups
    unknown = _wide(shaped.any(0).repeat_interleave(per), x.ndim)
    if weight is not None:
        unknown = unknown & _wide(weight != 0, x.ndim)
    trace.ledger.write(out, trace.labels(x), unknown.expand(out.shape))


@whole(torch.layer_norm)
def layer_norm(trace: Trace, node: Node, out: Tensor, x: Tensor, shape: Any, weight: Any = None,
               bias: Any = None, *rest: Any) -> None:  # fmt: skip
    """The normalised axes share their mean and variance: what goes must be zero there."""
    last = set(range(x.ndim - len(shape), x.ndim))
    why = "a layer norm takes the mean over it"
    own = isinstance(node.module, nn.LayerNorm) and len(shape) == 1
    own = own and (weight is None or trace.name_of(weight) is not None)
    lines: list[Tensor] = []
    for layer in trace.labels(x):
        axes = varying(layer)
        if own and axes == [x.ndim - 1]:
            ids = trace.line(node, layer, -1)
            assert ids is not None
            others = list(range(x.ndim - 1))
            trace.pin(node, ids[(trace.unknown(x) | (x != 0)).any(dim=others)], why, read=True)
            lines.append(ids)
            node.sizes = {"normalized_shape": ids.numpy()}
        elif set(axes) & last:
            trace.pin(node, layer, why, read=True)
    for t in (weight, bias):
        for layer in trace.labels(t) if t is not None else ():
            mine = trace.line(node, layer, 0) if lines else None
            if mine is None:
                trace.pin(node, layer, why, read=True)
            else:
                trace.use(node, mine, "scales")
                trace.unite(node, lines[0], mine)
    unknown = trace.unknown(x)
    for d in last:
        unknown = unknown.any(d, keepdim=True)
    unknown = unknown.expand(x.shape)
    if weight is not None:
        unknown = unknown & (weight != 0)
    trace.ledger.write(out, trace.labels(x), unknown)


@rule("_weight_norm_interface")
def weight_norm(trace: Trace, node: Node, out: Any, v: Tensor, g: Tensor, dim: int = 0) -> None:
    """Rows of any length are made of one length: a column may go where it is zero."""
    trace.flows(node, v, g)
    rows = None
    for layer in trace.labels(v):
        axes = varying(layer)
        if axes == [dim % v.ndim]:
            rows = trace.line(node, layer, dim)
        elif len(axes) == 1:
            ids = trace.line(node, layer, axes[0])
            others = [d for d in range(v.ndim) if d != axes[0]]
            if ids is not None:
                trace.pin(node, ids[(v != 0).any(dim=others)], "weight norm reads it", read=True)
    for layer in trace.labels(g):
        mine = trace.line(node, layer, dim)
        if mine is not None and rows is not None:
            trace.unite(node, rows, mine)
    for one in out:
        trace.ledger.write(one, trace.labels(v if one.shape == v.shape else g), None)


@whole(F.scaled_dot_product_attention)
def attention(trace: Trace, node: Node, out: Tensor, query: Tensor, key: Tensor, value: Tensor,
              attn_mask: Any = None, *rest: Any, **kw: Any) -> None:  # fmt: skip
    """Heads go as a whole: queries, keys and values of one are tied.

    (..., heads, L, width) each; grouped queries have several heads a key.
    """
    heads: list[Tensor] = []
    counts = {t.shape[-3] if t.ndim > 2 else 1 for t in (query, key, value)}
    for t in (query, key, value):
        found = False
        for layer in trace.labels(t):
            axes = varying(layer)
            if t.ndim > 3 and t.ndim - 3 in axes and t.ndim - 2 not in axes:
                layer = compact(layer)
                base = layer.narrow(-1, 0, 1)
                trace.unite(node, base.expand(layer.shape), layer)
                if base.numel() != t.shape[-3]:
                    trace.pin(node, layer, "attention takes heads of a batch")
                    continue
                base = base.reshape(-1)
                heads.append(base.repeat_interleave(max(counts) // len(base)))
                found = True
            elif axes:
                trace.pin(node, layer, "attention is scaled by the width of a head")
        if not found and heads:
            trace.pin(node, heads[0], "attention meets what has no units")
    for one in heads[1:]:
        trace.unite(node, heads[0], one)
    trace.use(node, heads[0] if heads else None, "head")
    if len(heads) not in (0, 3):
        for one in heads:
            trace.pin(node, one, "attention meets what has no units")
    mask = kw.get("attn_mask", attn_mask)
    if isinstance(mask, Tensor):
        for layer in trace.labels(mask):
            trace.pin(node, layer, "it is a mask of attention")
        if heads and mask.ndim > 2 and mask.shape[-3] > 1:
            trace.pin(node, heads[0], "a mask of attention has heads")
    unknown = (trace.unknown(value) | (value != 0)).any(-2, keepdim=True)
    if unknown.ndim > 2 and unknown.shape[-3] != out.shape[-3]:  # grouped queries
        unknown = unknown.repeat_interleave(out.shape[-3] // unknown.shape[-3], -3)
    layers = []
    if heads:
        layers.append(heads[0].view(-1, 1, 1).expand(out.shape))
    trace.ledger.write(out, layers, unknown.expand(out.shape))
