"""Rules of operations that sum over units: linear layers, convolutions, products of matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.structure.surgery.memory import varying
from gossamer.structure.surgery.node import Fold, Grouped, Node
from gossamer.structure.surgery.rules import merge, rule, whole
from gossamer.structure.surgery.trace import Trace

__all__ = ["depends"]

_NONE = np.zeros(1, dtype=np.int32)


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _axis(trace: Trace, node: Node, weight: Tensor, axis: int, role: str) -> Tensor | None:
    """Units along an axis of a weight."""
    lines = [trace.line(node, one, axis) for one in trace.labels(weight) if one.ndim]
    found = [one for one in lines if one is not None]
    for one in found[1:]:
        trace.unite(node, found[0], one)
    if not found:
        return None
    trace.use(node, found[0], role)
    return found[0]


def depends(
    trace: Trace,
    node: Node,
    inputs: Tensor | None,
    outputs: Tensor | None,
    matrix: Tensor,
) -> None:
    """The outputs' units depend on the inputs' where the matrix (inputs, outputs) says so."""
    if inputs is None:
        return
    where, to = inputs.numpy(), _NONE if outputs is None else outputs.numpy()
    if outputs is None:
        matrix = matrix.any(1, keepdim=True)
    node.edges.append((where, to, matrix.numpy()))


def _meets(trace: Trace, node: Node, inputs: Tensor | None, columns: Tensor | None) -> None:
    """The units of the values and the weight's columns are one."""
    if inputs is not None and columns is not None:
        trace.unite(node, inputs, columns)
    for one in (inputs, columns):
        if one is not None and (inputs is None or columns is None):
            trace.pin(node, one, f"{node.op} meets what has no units")


def _last(trace: Trace, node: Node, x: Tensor, axis: int) -> tuple[Tensor | None, list[Tensor]]:
    """The units along an axis, and the layers that do not vary along it."""
    inside, rest = None, []
    for layer in trace.labels(x):
        axes = varying(layer)
        if axis % x.ndim in axes and len(axes) > 1:
            # rows and columns at once: a row keeps all its columns
            base = layer.narrow(axis, 0, 1)
            trace.unite(node, base.expand(layer.shape), layer)
            rest.append(base)
        elif axis % x.ndim in axes:
            found = trace.line(node, layer, axis)
            if inside is not None and found is not None:
                trace.unite(node, inside, found)
            inside = found
        elif axes:
            rest.append(layer.narrow(axis, 0, 1))
        elif layer.numel():
            trace.pin(node, layer, f"{node.op} reads a single one")
    return inside, rest


def _linear(
    trace: Trace, node: Node, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    home: str | None,
) -> None:  # fmt: skip
    """``x @ weight.T + bias``; ``home``: the weight's name where a bias can take constants."""
    rows = _axis(trace, node, weight, 0, "produces")
    columns = _axis(trace, node, weight, 1, "consumes")
    inputs, rest = _last(trace, node, x, -1)
    _meets(trace, node, inputs, columns)
    unknown = trace.unknown(x)
    flat, blind = x.reshape(-1, x.shape[-1]), unknown.reshape(-1, x.shape[-1])
    used = (weight != 0) | trace.unknown(weight)
    alive = blind.any(0) | (flat != 0).any(0)
    if home is not None and inputs is not None:
        same = ~blind.any(0) & (flat == flat[:1]).all(0) & alive
        if same.any():
            at = same.nonzero().flatten()
            added = (weight[:, at] * flat[0, at]).T.double()
            names = (home, _bias_of(home))
            ends = _NONE if rows is None else rows.numpy()
            node.folds.append(Fold(*names, inputs.numpy()[at.numpy()], ends, added))
            alive = alive & ~same
    depends(trace, node, inputs, rows, (used & alive).T)
    layers = [one.expand(out.shape) for one in rest]
    if rows is not None:
        layers.append(rows.expand(out.shape))
    if bias is not None:
        _bias(trace, node, bias, rows)
    wide = (unknown.float() @ used.float().T) > 0
    if bool(trace.unknown(weight).any()):
        wide = torch.ones((), dtype=torch.bool)
    trace.ledger.write(out, layers, wide.expand(out.shape))


def _bias(trace: Trace, node: Node, bias: Tensor, rows: Tensor | None) -> None:
    if bias.ndim != 1:
        raise NotImplementedError
    mine = _axis(trace, node, bias, 0, "produces")
    _meets(trace, node, rows, mine)


@whole(torch.nn.functional.linear, torch._C._nn.linear)
def linear(trace: Trace, node: Node, out: Tensor, input: Tensor, weight: Tensor,
           bias: Tensor | None = None, **kw: Any) -> None:  # fmt: skip
    """A linear layer."""
    name = trace.name_of(weight)
    whole_name = name if name and (bias is None or trace.name_of(bias) == _bias_of(name)) else None
    _linear(trace, node, out, input, weight, bias, whole_name)


@rule("mm", "addmm", "mv")
def _mm(trace: Trace, node: Node, out: Tensor, *args: Any, **kw: Any) -> None:
    bias, a, b = args if node.op == "addmm" else (None, *args)
    if kw.get("beta", 1) != 1 or kw.get("alpha", 1) != 1:
        raise NotImplementedError
    if node.op == "mv":
        raise NotImplementedError
    if bool(trace.unknown(b).any()):
        _batched(trace, node, out.unsqueeze(0), a.unsqueeze(0), b.unsqueeze(0))
        if bias is not None:
            raise NotImplementedError
        return
    if bias is not None and bias.ndim != 1:
        raise NotImplementedError
    _linear(trace, node, out, a, b.t(), bias, None)


@rule("bmm", "baddbmm")
def _bmm(trace: Trace, node: Node, out: Tensor, *args: Any, **kw: Any) -> None:
    a, b = args[-2:]
    _batched(trace, node, out, a, b)
    if node.op == "baddbmm":
        mine = trace.labels(out), trace.unknown(out)
        both = merge(trace, node, out.shape, [out, args[0]])
        if len(both) != len(mine[0]) or trace.labels(args[0]):
            for layer in (*mine[0], *trace.labels(args[0])):
                trace.pin(node, layer, "baddbmm adds it to what has other units")
        node.reads |= {trace.ledger.key(args[0])}
        blind = trace.unknown(args[0]).expand(out.shape)
        trace.ledger.write(out, mine[0], mine[1] | (blind if kw.get("beta", 1) else False))


def _batched(trace: Trace, node: Node, out: Tensor, a: Tensor, b: Tensor) -> None:
    """(B, i, k) times (B, k, j): a unit of the batch is one head, whatever it holds."""
    trace.flows(node, a, b)
    heads: list[Tensor] = []
    lines: dict[str, list[Tensor]] = {"i": [], "ak": [], "bk": [], "j": []}
    for t, names in ((a, ("i", "ak")), (b, ("bk", "j"))):
        for layer in trace.labels(t):
            axes = varying(layer)
            if 0 in axes:
                base = layer[:, :1, :1]
                trace.unite(node, base.expand(layer.shape), layer)
                heads.append(base)
            elif len(axes) > 1:
                trace.pin(node, layer, f"{node.op} mixes its rows and columns")
            elif axes:
                ids = trace.line(node, layer, axes[0])
                assert ids is not None
                lines[names[axes[0] - 1]].append(ids)
            elif layer.numel():
                trace.pin(node, layer, f"{node.op} reads a single one")
    for one in heads[1:]:
        trace.unite(node, heads[0], one)
    trace.use(node, heads[0] if heads else None, "head")
    for t in (a, b):
        if heads and not any(0 in varying(one) for one in trace.labels(t)) and t.shape[0] > 1:
            trace.pin(node, heads[0], f"{node.op} mixes it with what has no units")
    ua, ub = trace.unknown(a), trace.unknown(b)
    ka, kb = (
        (ua | (a != 0)).flatten(0, 1).any(0),
        (ub | (b != 0)).transpose(1, 2).flatten(0, 1).any(0),
    )
    alive = (ka & kb)[:, None]
    for one in (*lines["ak"], *lines["bk"]):
        if lines["j"]:
            depends(trace, node, one, lines["j"][0], alive.expand(-1, len(lines["j"][0])))
        else:
            trace.pin(node, one[ka & kb], f"{node.op} sums over it", read=True)
    inner = lines["ak"] + lines["bk"]
    for one in inner[1:]:
        trace.unite(node, inner[0], one)
    if bool(lines["ak"]) != bool(lines["bk"]):
        trace.pin(node, inner[0], f"{node.op} meets what has no units")
    layers = [one.expand(out.shape) for one in heads[:1]]
    layers += [one[None, :, None].expand(out.shape) for one in lines["i"][:1]]
    layers += [one[None, None, :].expand(out.shape) for one in lines["j"][:1]]
    # a product with a known zero is zero, whatever the other is
    za, zb = (ua | (a != 0)).float(), (ub | (b != 0)).float()
    wide = (torch.bmm(za, ub.float()) + torch.bmm(ua.float(), zb)) > 0
    trace.ledger.write(out, layers, wide)


@rule("embedding")
def _embedding(trace: Trace, node: Node, out: Tensor, weight: Tensor, at: Tensor, *rest: Any
               ) -> None:  # fmt: skip
    rows, columns = (
        _axis(trace, node, weight, 0, "consumes"),
        _axis(trace, node, weight, 1, "produces"),
    )
    if rows is not None:
        trace.pin(node, rows, "it is looked up by number")
    for layer in trace.labels(at):
        trace.pin(node, layer, "it is a number to look up")
    layers = [] if columns is None else [columns.expand(out.shape)]
    if bool(trace.unknown(at).any()):
        unknown = (weight != weight[:1]).any(0).expand(out.shape)
    else:
        unknown = torch.zeros((), dtype=torch.bool).expand(out.shape)
    trace.ledger.write(out, layers, unknown | trace.unknown(weight).any())


@rule("convolution", "_convolution")
def _convolution(trace: Trace, node: Node, out: Tensor, x: Tensor, weight: Tensor,
                 bias: Tensor | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
                 output_padding: Any, groups: int, *rest: Any) -> None:  # fmt: skip
    setting = (stride, padding, dilation, transposed, output_padding, groups)
    run = torch.ops.aten.convolution
    unknown = trace.unknown(x)
    blind = bool(trace.unknown(weight).any())
    used = ((weight != 0) | trace.unknown(weight)).float()
    wide = run(unknown.float().contiguous(), used, None, *setting) > 0
    for layer in trace.labels(weight):
        if set(varying(layer)) & set(range(2, weight.ndim)):
            trace.pin(node, layer, "it is a place of a kernel")
    inputs = None
    for layer in trace.labels(x):
        found = trace.line(node, layer, 1)
        if varying(layer) != [1]:
            trace.pin(node, layer, f"{node.op} runs over it", read=True)
        if found is not None:
            if inputs is not None:
                trace.unite(node, inputs, found)
            inputs = found
    channels = [d for d in range(x.ndim) if d != 1]
    alive = unknown.any(dim=channels) | (x != 0).any(dim=channels)
    spatial = list(range(2, weight.ndim))
    taps = used.bool().any(dim=spatial) if spatial else used.bool()
    out_channels = out.shape[1]
    if groups == 1:
        ahead, behind = (1, 0) if transposed else (0, 1)
        rows = _axis(trace, node, weight, ahead, "produces")
        columns = _axis(trace, node, weight, behind, "consumes")
        _meets(trace, node, inputs, columns)
        name = trace.name_of(weight)
        foldable = name and not transposed and not any(padding)
        if foldable and bias is not None:
            foldable = trace.name_of(bias) == _bias_of(str(name))
        if foldable and inputs is not None and not blind:
            first = x[:1, :, *([slice(0, 1)] * len(spatial))]
            same = ~unknown.any(dim=channels) & (x == first).all(dim=channels) & alive
            if same.any():
                at = same.nonzero().flatten()
                sums = weight.double().sum(dim=spatial)[:, at]
                added = (sums * first.flatten()[at]).T
                ends = _NONE if rows is None else rows.numpy()
                names = (str(name), _bias_of(str(name)))
                node.folds.append(Fold(*names, inputs.numpy()[at.numpy()], ends, added))
                alive = alive & ~same
        matrix = (taps if transposed else taps.T) & alive[:, None]
        depends(trace, node, inputs, rows, matrix)
    else:
        rows = _grouped(trace, node, x, weight, inputs, groups, transposed, out_channels)
        per = x.shape[1] // groups
        if inputs is not None and per > 1:
            each = out_channels // groups
            matrix = torch.zeros(x.shape[1], out_channels, dtype=torch.bool)
            for g in range(groups):
                ins, outs = slice(g * per, (g + 1) * per), slice(g * each, (g + 1) * each)
                matrix[ins, outs] = taps[ins] if transposed else taps[outs].T
            depends(trace, node, inputs, rows, matrix & alive[:, None])
    if bias is not None:
        _bias(trace, node, bias, rows)
    layers = []
    if rows is not None:
        view = [1] * out.ndim
        view[1] = -1
        layers.append(rows.view(view).expand(out.shape))
    trace.ledger.write(out, layers, torch.ones((), dtype=torch.bool) if blind else wide)


def _grouped(trace: Trace, node: Node, x: Tensor, weight: Tensor, inputs: Tensor | None,
             groups: int, transposed: bool, out_channels: int) -> Tensor | None:  # fmt: skip
    """Output units of a grouped convolution."""
    main = _axis(trace, node, weight, 0, "produces")
    side = _axis(trace, node, weight, 1, "consumes")
    if side is not None:
        trace.pin(node, side, "it is a place within a group")
    name = trace.name_of(weight)
    per = x.shape[1] // groups
    if name is None or inputs is None or main is None:
        for one in (inputs, main):
            if one is not None:
                trace.pin(node, one, "a grouped convolution reads what has no units")
        if transposed:
            return None
        return main
    if transposed:
        trace.unite(node, inputs, main)
        rows = trace.ledger.fresh(out_channels)
        node.axes.append((rows.numpy(), "produces"))
    else:
        rows = main
    if per == 1:  # depthwise: an input and its outputs are one
        each = out_channels // groups
        trace.unite(node, inputs.repeat_interleave(each), rows)
    node.grouped.append(Grouped(name, inputs.numpy(), rows.numpy(), groups, transposed))
    return rows
