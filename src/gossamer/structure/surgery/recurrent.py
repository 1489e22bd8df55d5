"""Rules of recurrent layers: intrinsic sparse structures.

Wen et al., Learning Intrinsic Sparse Structures within LSTM (2018), section 3: state k is row k of
every gate's matrices, column k of the recurrent matrix, and what the next layer reads of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.structure.surgery.memory import varying
from gossamer.structure.surgery.node import Fold, Map, Node
from gossamer.structure.surgery.products import depends
from gossamer.structure.surgery.rules import rule, whole
from gossamer.structure.surgery.trace import Trace

__all__: list[str] = []

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_VALUE = {"lstm": 2, "gru": 2, "rnn_tanh": 0, "rnn_relu": 0}  # the gate that a state's value is of


@whole(torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu)
def recurrent(trace: Trace, node: Node, out: Any, *args: Any, **kw: Any) -> None:
    """Layers of an LSTM, GRU or plain recurrent network."""
    packed = isinstance(args[3], (list, tuple))  # data, batch_sizes, hx, weights, ...
    x = args[0]
    hx, weights = (args[2], args[3]) if packed else (args[1], args[2])
    bias, layers, _, _, two = args[4:9] if packed else args[3:8]
    sides = 2 if two else 1
    states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    per = 4 if bias else 2
    kind = node.op
    hidden = weights[1].shape[1]
    if len(weights) != per * layers * sides:  # projections
        raise NotImplementedError
    inputs, rest = None, trace.labels(x)
    for layer in rest:
        axes = varying(layer)
        if axes == [x.ndim - 1]:
            inputs = trace.line(node, layer, -1)
        elif axes:
            trace.pin(node, layer, f"{kind} runs over it", read=True)
    flat, blind = x.reshape(-1, x.shape[-1]), trace.unknown(x).reshape(-1, x.shape[-1])
    alive = blind.any(0) | (flat != 0).any(0)
    constant = ~blind.any(0) & (flat == flat[:1]).all(0) & alive
    first = flat[0]
    units = trace.ledger.fresh(layers * sides * hidden).view(layers, sides, hidden)
    node.axes.append((units.numpy().reshape(-1), f"{kind} state"))
    quiet = all(not bool(trace.unknown(s).any()) and not bool((s != 0).any()) for s in states)
    _states(trace, node, states, units)
    for level in range(layers):
        reaches = []
        for side in range(sides):
            at = (level * sides + side) * per
            four = weights[at : at + per]
            mine = units[level, side]
            zero = _gated(trace, node, kind, four, mine, inputs, alive, constant, first, quiet)
            reaches.append(~zero)
        inputs = units[level].reshape(-1)
        alive = torch.cat(reaches)
        constant = torch.zeros_like(alive)
        first = torch.zeros(len(alive))
    result, *last = out
    layer = units[-1].reshape(-1).expand(result.shape)
    trace.ledger.write(result, [layer], alive.expand(result.shape))
    for t in last:
        numbers = units.view(layers * sides, *([1] * (t.ndim - 2)), hidden)
        trace.ledger.write(t, [numbers.expand(t.shape)], torch.ones((), dtype=torch.bool))
    if sides == 2:  # one call a layer: both directions have one size
        for level in range(layers):
            node.maps.append(Map(units[level].numpy(), fixed=(0,), ordered=True))
    # states of all layers in one tensor: all of one size
    more = Node(f"{kind}'s last states", node.where, node.owner)
    more.reads = {trace.ledger.key(result)}
    more.writes = {trace.ledger.key(t) for t in last}
    more.aside = True
    more.maps = [Map(units.view(layers * sides, hidden).numpy(), fixed=(0,), ordered=True)]
    node.writes = {trace.ledger.key(result)}
    trace.nodes.insert(-1, node)
    trace.nodes[-1] = more
    more.reads |= node.reads | node.writes


def _states(trace: Trace, node: Node, states: Sequence[Tensor], units: Tensor) -> None:
    """Given first states: of no unit where all are zero, else tied to the layers'."""
    rows = units.reshape(-1, units.shape[-1])
    for s in states:
        labels = trace.labels(s)
        for layer in labels:
            if s.shape[0] == len(rows):
                for i, row in enumerate(rows):
                    trace.unite(node, layer[i].reshape(-1, s.shape[-1]), row)
            else:
                trace.pin(node, layer, f"{node.op} begins with it")
        if (not labels and bool(trace.unknown(s).any())) or (not labels and bool((s != 0).any())):
            trace.pin(node, units, f"{node.op} begins with given states")


def _gated(trace: Trace, node: Node, kind: str, weights: Sequence[Tensor], units: Tensor,
           inputs: Tensor | None, alive: Tensor, constant: Tensor, first: Tensor, quiet: bool
           ) -> Tensor:  # fmt: skip
    """One direction of one layer; which of its states are always zero."""
    gates, hidden = _GATES[kind], len(units)
    w_in, w_rec = weights[0], weights[1]
    rows = units.repeat(gates)
    for at, w in enumerate(weights):
        for layer in trace.labels(w):
            for axis in range(w.ndim):
                mine = trace.line(node, layer, axis)
                if mine is None:
                    continue
                trace.use(node, mine, "consumes" if axis else "produces")
                if axis == 0:
                    trace.unite(node, rows, mine)
                elif at == 1:
                    trace.unite(node, units, mine)
                elif inputs is None:
                    trace.pin(node, mine, f"{kind} reads what has no units")
                else:
                    trace.unite(node, inputs, mine)
    if hidden == 1 or (w_in.shape[1] == 1 and inputs is not None):
        trace.pin(node, rows, f"{kind} has a single one")
    # zero states: nothing but other zero states reaches the gate that makes the value
    gate = slice(_VALUE[kind] * hidden, (_VALUE[kind] + 1) * hidden)
    zero = torch.full((hidden,), quiet)
    zero &= ~((w_in[gate] != 0) & alive).any(1)
    for b in weights[2:]:
        zero &= b[gate] == 0
    while True:
        reached = ((w_rec[gate] != 0) & ~zero).any(1)
        if not bool((zero & reached).any()):
            break
        zero = zero & ~reached
    if inputs is not None:
        name = trace.name_of(w_in)
        if name is not None and len(weights) > 2 and bool(constant.any()):
            same = constant.nonzero().flatten()
            added = (w_in[:, same] * first[same]).T.double()
            bias = name.replace("weight_ih", "bias_ih")
            node.folds.append(Fold(name, bias, inputs.numpy()[same.numpy()], rows.numpy(), added))
            alive = alive & ~constant
        depends(trace, node, inputs, rows, (w_in != 0).T & alive[:, None])
    depends(trace, node, units, rows, (w_rec != 0).T & ~zero[:, None])
    return zero


@rule("_pack_padded_sequence")
def _pack(trace: Trace, node: Node, out: Any, x: Tensor, *rest: Any) -> None:
    _sequence(trace, node, out[0], x)


@rule("_pad_packed_sequence")
def _pad(trace: Trace, node: Node, out: Any, x: Tensor, *rest: Any) -> None:
    _sequence(trace, node, out[0], x)


def _sequence(trace: Trace, node: Node, out: Tensor, x: Tensor) -> None:
    layers = []
    for layer in trace.labels(x):
        if varying(layer) == [x.ndim - 1]:
            ids = trace.line(node, layer, -1)
            assert ids is not None
            layers.append(ids.expand(out.shape))
        else:
            trace.pin(node, layer, f"{node.op} runs over it", read=True)
    unknown = trace.unknown(x).reshape(-1, x.shape[-1]).any(0)
    trace.ledger.write(out, layers, (unknown | torch.ones((), dtype=torch.bool)).expand(out.shape))
