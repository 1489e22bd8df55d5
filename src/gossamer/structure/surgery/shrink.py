"""Networks made physically smaller: what is dead by its values is taken out of the modules.

Dead filters, channels, states of LSTMs and heads of attention, as group lasso (Wen et al.,
Learning Structured Sparsity in Deep Neural Networks, 2016; Learning Intrinsic Sparse Structures
within LSTM, 2018) or any pruning leaves them. One forward pass is followed operation by operation
(:mod:`.trace`); what no output depends on goes (:mod:`.solve`), constants of what goes are put
into the biases behind, and the smaller network must give the outputs of the large one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from gossamer.core import flops
from gossamer.core.access import copied
from gossamer.core.errors import ArgumentError
from gossamer.structure.lowered import LoweredConv2d, live
from gossamer.structure.surgery import normalise, products, recurrent, rules, windows  # noqa: F401
from gossamer.structure.surgery.collapse import branches
from gossamer.structure.surgery.compare import TOLERANCE, Sameness
from gossamer.structure.surgery.cut import Cut, cut
from gossamer.structure.surgery.node import Ids
from gossamer.structure.surgery.plan import Plan, Replaced, apply, fill
from gossamer.structure.surgery.solve import Units, settle
from gossamer.structure.surgery.trace import traced

__all__ = ["Pinned", "Shrunk", "shrink"]


@dataclass(frozen=True)
class Pinned:
    """Zero units that stayed.

    Attributes:
        tensor: the parameter that has them.
        count: how many.
        why: what keeps them.
        where: module, file and line of the forward, where it is known.
    """

    tensor: str
    count: int
    why: str
    where: str = ""

    def __str__(self) -> str:
        """In one line."""
        return f"{self.count} of {self.tensor}: {self.why}" + (
            f" ({self.where})" * bool(self.where)
        )


@dataclass(frozen=True)
class Shrunk:
    """A network without its dead units.

    Attributes:
        model: the smaller network, of the same class; the one that was given is as it was.
        plan: how its modules differ, for a file.
        removed: parameter or buffer -> its shape before and after.
        pinned: zero units that stayed, and why.
        parameters: numbers of them, before and after.
        difference: of the outputs, relative to the largest, on the examples.
    """

    model: nn.Module
    plan: Plan
    removed: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    pinned: list[Pinned]
    parameters: tuple[int, int]
    difference: float = 0.0
    _original: nn.Module | None = field(default=None, repr=False)
    _example: Any = field(default=None, repr=False)

    @cached_property
    def macs(self) -> tuple[float, float]:
        """Multiply-accumulates of one example, before and after (:mod:`gossamer.core.flops`).

        Counted when first asked for. Raises :class:`ArgumentError` where they cannot be.
        """
        assert self._original is not None  # shrink gives it
        before, after = (flops.count(m, self._example) for m in (self._original, self.model))
        return before.macs, after.macs

    def metadata(self) -> dict[str, Any]:
        """For :func:`gossamer.pack.pack`: :func:`gossamer.load` makes the same network again."""
        return {"structure": [self.plan.as_dict()]} if self.removed else {}

    def __str__(self) -> str:
        """A table of what went, and what stayed and why."""
        wide = max((len(n) for n in self.removed), default=0)
        lines = [
            f"{n:{wide}}  {_shape(a)} -> {_shape(b)}"
            for n, (a, b) in self.removed.items()
            if a != b
        ] or ["nothing is dead"]
        before, after = self.parameters
        lines.append(f"parameters {before:,} -> {after:,}")
        with contextlib.suppress(ArgumentError):
            lines.append("multiply-adds an example {:,.0f} -> {:,.0f}".format(*self.macs))
        lines.append(f"outputs differ by {self.difference:.1e} of the largest")
        return "\n".join(lines + [f"stays: {p}" for p in self.pinned])


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def shrink(model: nn.Module, example_inputs: Any, *, lowered: bool = False) -> Shrunk:
    """Take out what is dead: a copy of the network, physically smaller, with the same outputs.

    Dead is what no output depends on, by the values of the weights alone: filters and channels
    that are zero, give a constant or are read by nobody, states of LSTMs and GRUs, heads and
    hidden units of transformers, whole branches. The modules stay of their classes where these can
    have the new sizes. What the forward pass has as fixed numbers stays, and is named.

    Args:
        model: in any mode; stays as it is.
        example_inputs: one batch: a tensor, a tuple of inputs in order, or a mapping by name. The
            outputs are compared on it, on other values, and on other sizes that the network takes.
        lowered: what is dead within convolutions goes too: rows and columns of their lowered
            matrices, by :class:`gossamer.structure.lowered.LoweredConv2d` where there are some.

    Returns: the smaller network, and what went and what stayed.

    Raises :class:`ArgumentError` where the network does not take the example, takes another way
    for other inputs, or where there are dead units of which none can go; naming the operation.
    """
    trace = traced(model, example_inputs)
    units = Units.found(trace)
    attempt = _Attempt(model, units, example_inputs)
    gone = settle(units, units.dead(), attempt.limits)
    made: _Made | None = None
    kept: set[int] = set()
    failure = ""
    if gone.any():
        made, kept, failure = attempt.best(gone)
    made = attempt.collapsed(made)
    if lowered:
        made = attempt.lowered(made) or made
    stay = _pinned(units, made.gone if made else np.zeros_like(gone), kept, failure)
    before, given = _count(model), (model, example_inputs)
    if made is None:
        if stay:
            raise ArgumentError(
                f"{type(model).__name__}: zero units are there, and none can be taken out: "
                + "; ".join(map(str, stay[:5]))
            )
        return Shrunk(copied(model), Plan(), {}, [], (before, before), 0.0, *given)
    old = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {n: tuple(v.shape) for n, v in made.cut.values.items()}
    removed = {n: (tuple(old[n].shape) if n in old else (), s) for n, s in shapes.items()}
    both = before, _count(made.model)
    return Shrunk(made.model, made.plan, removed, stay, both, made.difference, *given)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class _Made:
    """A smaller network that gives the right outputs."""

    model: nn.Module
    plan: Plan
    cut: Cut
    gone: Ids
    difference: float


@dataclass
class _Attempt:
    """Ways to take units out of one network, each compared with it."""

    model: nn.Module
    units: Units
    example: Any
    limits: list[Any] = field(init=False)
    same: Sameness = field(init=False)
    failure: str = ""

    def __post_init__(self) -> None:
        self.limits = self.units.limits()
        self.same = Sameness(self.model, self.example)

    def best(self, gone: Ids) -> tuple[_Made | None, set[int], str]:
        """All units that can go, those that cannot (and what happened where they went)."""
        made = self.made(gone)
        if made is not None:
            return made, set(), ""
        first = self.failure
        groups = self._groups(gone)
        kept: set[int] = set()
        good: set[int] = set()

        def tried(some: list[set[int]]) -> None:
            nonlocal made, first
            units = set().union(*some)
            if (new := self.made(self._only(good | units))) is not None:
                made = new
                good.update(units)
            elif len(some) == 1:
                kept.update(units)
                first = self.failure
            else:
                tried(some[: len(some) // 2])
                tried(some[len(some) // 2 :])

        tried(groups[: (len(groups) + 1) // 2])
        tried(groups[(len(groups) + 1) // 2 :]) if len(groups) > 1 else None
        return made, kept, first

    def _only(self, wanted: set[int]) -> Ids:
        """What goes where nothing but these units may go."""
        others = set(np.unique(self.units.of).tolist()) - wanted
        return settle(self.units, self.units.dead(others), self.limits)

    def _groups(self, gone: Ids) -> list[set[int]]:
        """Units by the first parameter that has them, and what is tied to it by limits."""
        of, groups = self.units.of, []
        seen: set[int] = set()
        for memory in self.units.trace.ledger.memories.values():
            for ids in memory.axes.values():
                mine = set(of[ids.numpy()][gone[ids.numpy()]].tolist()) - seen
                if mine:
                    seen |= mine
                    groups.append(mine)
        rest = set(of[gone].tolist()) - seen
        return groups + ([rest] if rest else [])

    def lowered(self, made: _Made | None) -> _Made | None:
        """The network with lowered convolutions, where some have dead rows or columns."""
        model = copied(self.model if made is None else made.model)
        replaced, values = {}, {}
        for name, conv in list(model.named_modules()):
            if type(conv) is not nn.Conv2d or conv.groups != 1 or conv.padding_mode != "zeros":
                continue
            rows, columns = live(conv)
            plain = isinstance(conv.padding, tuple)
            if not name or not plain or rows.numel() * columns.numel() == conv.weight.numel():
                continue
            sizes = (len(rows), len(columns))
            replaced[name] = Replaced("lowered", sizes, (*rows.tolist(), *columns.tolist()))
            for leaf, p in LoweredConv2d(conv, rows, columns).named_parameters():
                values[f"{name}.{leaf}"] = p.detach()
        return self._replaced(made, replaced, values) if replaced else None

    def collapsed(self, made: _Made | None) -> _Made | None:
        """The network without branches that only give constants, which are added as such."""
        model = self.model if made is None else made.model
        for name, value, replaced in branches(model, traced(model, self.example)):
            there = dict((model if made is None else made.model).named_modules())
            if all(n in there and not isinstance(there[n], nn.Identity) for n in replaced):
                values = {f"{name}.value": value}
                # what follows in place must not write into what the shortcut reads
                apart = {
                    n: Replaced("constant", (1, 1, 1)) if r.kind == "identity" else r
                    for n, r in replaced.items()
                }
                made = (
                    self._replaced(made, replaced, values)
                    or self._replaced(made, apart, values)
                    or made
                )
        return made

    def _replaced(
        self, made: _Made | None, replaced: dict[str, Replaced], values: dict[str, Tensor]
    ) -> _Made | None:
        """The network with other modules besides; None where that changes its outputs."""
        model = copied(self.model if made is None else made.model)
        apply(model, Plan(replaced))
        fill(model, values)
        try:
            off = self.same.off(model)
        except Exception:  # the user's own code, on what it did not expect
            return None
        if off > TOLERANCE:
            return None
        gone = np.zeros(len(self.units.of), dtype=bool) if made is None else made.gone
        old = Cut(Plan(), {}, [{}]) if made is None else made.cut
        plan = Plan() if made is None else made.plan
        inside = tuple(f"{n}." for n, r in replaced.items() if r.kind != "lowered")
        shapes = {n: s for n, s in plan.shapes.items() if not (inside and n.startswith(inside))}
        numbers = {n: v for n, v in plan.numbers.items() if n not in replaced}
        picked = {n: p for n, p in plan.picked.items() if n in shapes}
        plan = Plan({**plan.replaced, **replaced}, shapes, numbers, picked)
        kept = {n: v for n, v in old.values.items() if not (inside and n.startswith(inside))}
        return _Made(model, plan, replace(old, values={**kept, **values}), gone, off)

    def made(self, gone: Ids) -> _Made | None:
        """The network without these units, where it gives the right outputs."""
        if not gone.any():
            return None
        one = cut(self.units, gone)
        for guess in one.guesses:
            each = [(n, a) for n, numbers in guess.items() for a in numbers]
            made = self._guessed(one, guess, gone)
            if made is None:
                # one of them alone: the others may count something else of the same size
                for name, attribute in each if len(each) > 1 else ():
                    alone = {name: {attribute: guess[name][attribute]}}
                    if (made := self._guessed(one, alone, gone)) is not None:
                        return made
                continue
            for name, attribute in each:
                fewer = {n: {**numbers} for n, numbers in guess.items()}
                del fewer[name][attribute]
                if (without := self._guessed(one, fewer, gone)) is not None:
                    made, guess = without, fewer
            return made
        return None

    def _guessed(self, one: Cut, guess: dict[str, dict[str, int]], gone: Ids) -> _Made | None:
        """The network with these numbers in its modules, where it gives the right outputs."""
        numbers = {n: {**one.plan.numbers.get(n, {}), **v} for n, v in guess.items() if v}
        plan = replace(one.plan, numbers={**one.plan.numbers, **numbers})
        model = copied(self.model)
        try:
            apply(model, plan)
            fill(model, one.values)
            off = self.same.off(model)
        except Exception as e:  # the user's own code, on sizes it did not expect
            self.failure = f"the forward pass then fails: {(str(e).splitlines() or [''])[0][:200]}"
            return None
        if off <= TOLERANCE:
            return _Made(model, plan, one, gone, off)
        self.failure = f"outputs then differ by {off:.1e} of the largest"
        return None


def _pinned(units: Units, gone: Ids, kept: set[int], failure: str) -> list[Pinned]:
    """Zero rows of weights that stayed, by reason."""
    found: dict[tuple[str, str, str], int] = {}
    for memory in units.trace.ledger.memories.values():
        for number, why, where in _zeros(units, memory, gone):
            if int(units.of[number]) in kept:
                why, where = failure, where
            found[memory.name, why, where] = found.get((memory.name, why, where), 0) + 1
    return [Pinned(name, n, why, where) for (name, why, where), n in found.items()]


_SIDES = {"produces", "consumes"}


def _zeros(units: Units, memory: Any, gone: Ids) -> Iterator[tuple[int, str, str]]:
    """Zero rows and columns whose units stay, and what keeps them."""
    tensor = memory.base
    made = {int(units.of[n]) for n, roles in units.roles.items() if "produces" in roles}
    for axis, ids in memory.axes.items():
        if tensor.ndim < 2:
            continue
        silent = (tensor.movedim(axis, 0).flatten(1) == 0).all(1).numpy()
        for number in ids.numpy()[silent].tolist():
            unit = int(units.of[number])
            if gone[number] or unit not in made or not units.roles.get(number, set()) & _SIDES:
                continue
            node = units.reasons.get(unit)
            why = units.pinned.get(unit, "an output depends on it")
            if why != "it is an output of the network":
                yield number, why, node.where if node else ""
