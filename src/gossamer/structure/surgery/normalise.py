"""Rules of normalisation layers and of attention that is kept whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.structure.surgery.memory import compact, varying
from gossamer.structure.surgery.rules import whole
from gossamer.structure.surgery.trace import Node, Trace

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
    """The normalised axes share their mean and variance: none of them goes."""
    last = set(range(x.ndim - len(shape), x.ndim))
    for layer in trace.labels(x):
        if set(varying(layer)) & last:
            trace.pin(node, layer, "a layer norm takes the mean over it", read=True)
    for t in (weight, bias):
        for layer in trace.labels(t) if t is not None else ():
            trace.pin(node, layer, "a layer norm takes the mean over it", read=True)
    unknown = trace.unknown(x)
    for d in last:
        unknown = unknown.any(d, keepdim=True)
    unknown = unknown.expand(x.shape)
    if weight is not None:
        unknown = unknown & (weight != 0)
    trace.ledger.write(out, trace.labels(x), unknown)


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
