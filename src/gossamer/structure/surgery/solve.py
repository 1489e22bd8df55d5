"""Which units of a traced network can go.

A unit stays where an output of the network depends on it: followed backwards over the operations
that reach an output, through the weights that are not zero. What is left is dead: its values are
zero, or constants that the next bias takes, or read by nobody. Some of it stays all the same,
because a tensor must stay a tensor: a row of a table of heads, as many channels in each group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gossamer.structure.surgery.node import Fold, Given, Grouped, Ids, Map, Node, Split
from gossamer.structure.surgery.trace import Trace

__all__ = ["Units", "live_nodes", "settle"]


def live_nodes(trace: Trace, given: Given | None = None) -> list[Node]:
    """The operations that an output depends on; those before it not, where a tensor is given."""
    wanted = set(trace.outputs)
    kept = []
    for at in reversed(range(len(trace.nodes))):
        node = trace.nodes[at]
        if given is not None and at == given.after - 1:
            wanted.discard(trace.ledger.key(given.out))
        if node.op == "output" or node.writes & wanted:
            wanted |= node.reads
            kept.append(node)
    return kept[::-1]


def _classes(count: int, pairs: Iterable[tuple[Ids, Ids]]) -> Ids:
    """The smallest unit tied to each."""
    parent = list(range(count))

    def root(a: int) -> int:
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        return a

    for one, other in pairs:
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            x, y = root(a), root(b)
            if x != y:
                parent[max(x, y)] = min(x, y)
    return np.array([root(a) for a in range(count)])


@dataclass
class Units:
    """The units of a network, tied and followed.

    Attributes:
        nodes: the operations.
        live: those that an output depends on.
        of: number -> the unit that it is tied to.
        pinned: units that have to stay, and why.
        roles: parameters' axes that rules accounted for: number -> roles.
    """

    trace: Trace
    nodes: list[Node]
    live: list[Node]
    of: Ids
    pinned: dict[int, str]
    reasons: dict[int, Node]
    roles: dict[int, set[str]]

    @classmethod
    def found(cls, trace: Trace) -> Units:
        """What the operations say."""
        nodes, live = trace.nodes, live_nodes(trace)
        of = _classes(trace.ledger.count, (pair for n in nodes for pair in n.unions))
        pinned: dict[int, str] = {0: "it is no unit"}
        reasons: dict[int, Node] = {}
        alive = {id(n) for n in live}
        for node in nodes:
            for ids, why, read in node.pins:
                if read and id(node) not in alive:
                    continue  # what comes of it is thrown away
                for unit in set(of[ids].tolist()):
                    if unit not in pinned:
                        pinned[unit], reasons[unit] = why, node
        roles: dict[int, set[str]] = {}
        for node in nodes:
            for ids, role in node.axes:
                for number in set(ids.reshape(-1).tolist()):
                    roles.setdefault(number, set()).add(role)
        units = cls(trace, nodes, live, of, pinned, reasons, roles)
        for memory in trace.ledger.memories.values():
            for numbers in memory.axes.values():
                for number in numbers.tolist():
                    if number not in roles or memory.name in trace.shared:
                        pinned.setdefault(int(of[number]), "no rule accounts for it")
        return units

    def dead(self, kept: Iterable[int] = ()) -> Ids:
        """By number: units that no output depends on, once these are kept."""
        live = np.zeros(len(self.of), dtype=bool)
        live[[*self.pinned, *kept]] = True
        edges = [(self.of[a], self.of[b], m) for n in self.live for a, b, m in n.edges]
        edges += self._unfolded()
        changed = True
        while changed:
            changed = False
            for a, b, matrix in reversed(edges):
                new = a[matrix[:, live[b]].any(1) & ~live[a]]
                if len(new):
                    live[new] = True
                    changed = True
        return ~live[self.of]

    def folds(self) -> list[Fold]:
        """Constants that a bias can take: each weight in one place only."""
        found = [f for n in self.nodes for f in n.folds]
        return [f for f in found if self._uses(f) == 1]

    def _unfolded(self) -> list[tuple[Ids, Ids, Ids]]:
        folds = [f for n in self.live for f in n.folds if self._uses(f) > 1]
        return [(self.of[f.inputs], self.of[f.outputs], (f.added != 0).numpy()) for f in folds]

    def _uses(self, fold: Fold) -> int:
        base = self.trace.named[fold.weight]
        key = self.trace.ledger.key(base)
        return sum(key in n.reads for n in self.nodes)

    def limits(self) -> list[Any]:
        """What has to stay whole."""
        found: list[Any] = []
        for memory in self.trace.ledger.memories.values():
            found += [Map(ids.numpy()) for ids in memory.axes.values()]
        alive = {id(n) for n in self.live}
        for n in self.nodes:
            if n.aside and id(n) not in alive:
                continue
            found += [*n.maps, *n.splits, *n.grouped]
        return found


def settle(units: Units, removed: Ids, limits: Sequence[Any]) -> Ids:
    """Keep what has to stay for tensors to stay tensors.

    Args:
        removed: by number, as :meth:`Units.dead` gives them, or fewer.

    Returns: fewer, or the same.
    """
    gone = np.zeros(len(units.of), dtype=bool)
    gone[units.of[removed]] = True
    by: dict[type, Any] = {Map: _map, Split: _split, Grouped: _grouped}
    changed = True
    while changed:
        changed = False
        for limit in limits:
            for back in by[type(limit)](limit, units.of, gone):
                gone[back] = False
                changed = True
    return gone[units.of]


def _map(limit: Map, of: Ids, gone: Ids) -> list[int]:
    """Units to keep for the map's sake."""
    units = of[limit.ids]
    out = gone[units]
    if not out.any():
        return []
    if out.all():
        return [int(units.reshape(-1)[0])]
    if out.ndim == 1:
        return []
    kept = ~out
    stays = np.ones(out.shape, dtype=bool)
    for axis in range(out.ndim - 1 if limit.ordered else out.ndim):
        if axis not in limit.fixed:
            line = kept.any(tuple(d for d in range(out.ndim) if d != axis))
            stays &= line.reshape([-1 if d == axis else 1 for d in range(out.ndim)])
    if not limit.ordered:
        return sorted(set(units[stays & out].tolist()))
    # rows of the last axis: each as many as the fullest
    rows, alive = units.reshape(-1, out.shape[-1]), kept.reshape(-1, out.shape[-1])
    whole = stays.reshape(rows.shape)[:, 0]
    most = alive[whole].sum(1).max()
    back: set[int] = set()
    for r in np.flatnonzero(whole & (alive.sum(1) < most)):
        back |= set(rows[r][~alive[r]][: most - alive[r].sum()].tolist())
    return sorted(back)


def _split(limit: Split, of: Ids, gone: Ids) -> list[int]:
    units = of[limit.ids]
    out = gone[units]
    if not out.any():
        return []
    step = int(np.gcd.reduce(limit.sizes))
    ends = np.cumsum(limit.sizes)
    pieces = [slice(e - s, e) for e, s in zip(ends, limit.sizes, strict=True)]
    share = max(
        -(-int((~out[p]).sum()) // (s // step)) for p, s in zip(pieces, limit.sizes, strict=True)
    )
    share = max(1, share)
    back: set[int] = set()
    for p, s in zip(pieces, limit.sizes, strict=True):
        missing = share * (s // step) - int((~out[p]).sum())
        back |= set(units[p][out[p]][:missing].tolist()) if missing > 0 else set()
    return sorted(back)


def _grouped(limit: Grouped, of: Ids, gone: Ids) -> list[int]:
    """Whole groups may go; the others lose equally many."""
    ins, outs = (of[i].reshape(limit.groups, -1) for i in (limit.inputs, limit.outputs))
    back: set[int] = set()
    empty = gone[ins].all(1) & gone[outs].all(1)
    if empty.all():
        return [int(ins[0, 0]), int(outs[0, 0])]
    for side in (ins, outs):
        out = gone[side]
        most = max(1, int((~out[~empty]).sum(1).max()))
        for g in np.flatnonzero(~empty):
            missing = most - int((~out[g]).sum())
            if missing > 0:
                back |= set(side[g][out[g]][:missing].tolist())
    return sorted(back)
